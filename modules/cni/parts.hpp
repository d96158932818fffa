// What the bodies of cobuild.cni share. Includes nothing; stands after a body's imports so that it belongs to the module.
#pragma once

namespace cobuild::cni {

/// Runs `t` as a chain of coroutines of its own: cancellation reaches it, but a `no_cancel` in it does not make the rest of
/// the caller's chain deaf to cancellation.
template<class T>
async::task<T> apart(async::task<T> t) {
    return async::linked(async::cancel_token{}, std::move(t));
}

/// A parsed list: `plugins` are the objects as the file has them.
struct plugin_list {
    std::string name;
    std::vector<std::string> versions;
    json::array plugins;
};
/// Throws errc::invalid beginning with `where`.
plugin_list parse_list(std::string_view text, std::string_view where);
/// The list as the ledger keeps it; parse_list reads it back.
std::string list_text(const plugin_list& list, std::string_view version);

/// What one ADD or DEL is about.
struct call_target {
    std::string id;
    std::string netns;  ///< a path, or empty for a replay
    std::string hostname;
    json::object capabilities;
};

/// What came of ADD: a result, or a failure and whether everything was taken back.
struct added {
    json::value result{};
    std::exception_ptr failed{};
    bool undone = true;
};

/// Runs the plugins of one list.
class caller {
public:
    caller(process::spawner& programs, std::vector<std::string> dirs, nanoseconds limit);
    /// The plugin's file. Throws errc::not_found naming the directories looked in.
    [[nodiscard]] std::string find(std::string_view type) const;
    /// Every plugin and address manager of the list is there.
    void check(const plugin_list& list) const;
    /// The best of the list's versions that every plugin speaks; asks them only where there is a choice.
    async::task<std::string> negotiate(plugin_list list) const;
    /// ADD through the list. On failure DEL through the whole list.
    async::task<added> add(plugin_list list, std::string version, call_target target) const;
    /// DEL through the list in reverse, all of it; the first failure, if any, and a warning for each.
    async::task<std::optional<error>> del(plugin_list list, std::string version, call_target target, json::value result) const;
    [[nodiscard]] inline const std::vector<std::string>& dirs() const noexcept { return dirs_; }

private:
    async::task<json::value> call(std::string command, json::object plugin, plugin_list list, std::string version, call_target target,
                                  json::value previous) const;
    process::spawner* programs_;
    std::vector<std::string> dirs_;
    nanoseconds limit_;
};

/// Throws errc::corrupt where the result is not one.
addresses addresses_of(const json::value& result);

struct attachment::state {
    unique_fd ns;
    cni::addresses addresses;
    call_target target;
    json::value result;
    std::string entry;        ///< what stands in the ledger
    bool keep_entry = false;  ///< something could not be taken back
    bool poolable = false;
};

constexpr const char* interface_name = "eth0";

/// A new namespace, made by a thread that also runs `inside` in it.
unique_fd new_network_namespace(const std::function<void()>& inside);
/// In the calling thread's namespace: a link with the addresses a dead step's interface had.
void add_ghost_interface(std::string_view name, const addresses& had);

/// A descriptor of ours as other programs find it while we live.
std::string path_of(const unique_fd& fd);

/// Keeps namespaces of `inner` ready and uses them again; `idle_limit` holds for those beyond `size`.
std::unique_ptr<provider> make_pool(async::runtime& rt, std::unique_ptr<provider> inner, std::size_t size, nanoseconds idle_limit);

}  // namespace cobuild::cni
