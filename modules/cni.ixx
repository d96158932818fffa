/// cobuild.cni: the network a build step runs in: a namespace of its own, wired by CNI plugins, or an empty one, or the host's.
///
/// Follows the CNI specification 1.0 and 1.1 (older result forms are understood). A namespace is held as a descriptor only:
/// nothing is mounted anywhere, and when the last holder closes it or dies the kernel takes it down with all its links.
/// What outlives it (addresses, firewall rules) is taken back by DEL, which detach() always runs, for every plugin of the
/// list in reverse; an entry in the ledger stands from before ADD until DEL succeeded, so that the next start can replay it.
///
/// Plugins are other people's programs: time and output are limited, and what goes wrong is one sentence naming the plugin's
/// path, its command and how it ended. Errors of attach(): errc::invalid (configuration), not_found (a plugin is missing),
/// unavailable (the plugin asks to try again), timed_out, canceled, io; whatever ADD did has been undone by then.
///
/// Thread safety: a provider is used from the runtime's io thread; any number of attachments at once.
/// Not responsible for: resolv.conf and hosts files, entering the namespace (both executor), choosing when a step may use
/// the host's network.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.cni;

import cobuild.base;
import cobuild.async;
import cobuild.process;

export namespace cobuild::cni {

// ---------------------------------------------------------------- configuration

/// A network configuration list. A file with one plugin (`.conf`) becomes a list of one.
struct network {
    std::string name;
    std::vector<std::string> versions;  ///< cniVersions and cniVersion, best first, those we speak
    std::vector<std::string> plugins;   ///< types in order
    std::string list;                   ///< the whole list as JSON
};

/// Throws errc::invalid naming the file and what is wrong. `filename` is for messages.
network parse_network(std::string_view text, std::string_view filename);

// ---------------------------------------------------------------- what a step gets

/// What the plugins said about the step's interface.
struct addresses {
    struct ip {
        std::string address;  ///< with prefix length: "10.1.0.2/16"
        std::string gateway;
    };
    struct route {
        std::string to, via;
    };
    std::vector<ip> ips;
    std::vector<route> routes;
    std::vector<std::string> nameservers, search, options;
    std::string domain;
};

/// Owns a step's network. Dropping it closes the namespace but leaves the addresses taken: give it to detach().
class attachment {
public:
    struct state;  // of the bodies
    attachment() noexcept;
    explicit attachment(std::unique_ptr<state> s) noexcept;
    attachment(attachment&&) noexcept;
    attachment& operator=(attachment&&) noexcept;
    ~attachment();
    /// The namespace's descriptor for executor::step::network_namespace; -1: the host's network.
    [[nodiscard]] int network_namespace() const noexcept;
    [[nodiscard]] const cni::addresses& addresses() const noexcept;
    [[nodiscard]] state* get() const noexcept { return state_.get(); }

private:
    std::unique_ptr<state> state_;
};

struct attach_args {
    std::string hostname{};      ///< not the default one: handed to plugins as K8S_POD_NAME, and no pooled namespace is used
    std::string capabilities{};  ///< a JSON object of capability arguments ("portMappings", "dns"), given to plugins that declare them
};

enum class kind { cni, host, none };

class provider {
public:
    virtual ~provider() = default;
    /// `id` is unique among everything that shares the network: [A-Za-z0-9][A-Za-z0-9_.-]*. Cancelled: either it has undone its
    /// ADD and throws, or it was done already and the attachment is the caller's to detach.
    virtual async::task<attachment> attach(std::string id, attach_args args = {}) = 0;
    /// Never throws for what plugins do: failures are warnings in the log and the ledger's entry stays. Ignores cancellation.
    virtual async::task<void> detach(attachment a) = 0;
    /// Gives back what is kept ready. Call before destroying it; nothing may be attached.
    virtual async::task<void> close() = 0;
    [[nodiscard]] virtual cni::kind kind() const noexcept = 0;
};

// ---------------------------------------------------------------- providers

/// Where deeds are noted that outlive a killed process; each text is durable before record() returns.
class ledger {
public:
    virtual ~ledger() = default;
    virtual async::task<void> record(std::string text) = 0;
    virtual async::task<void> forget(std::string text) = 0;
};

enum class mode { automatic, cni, host, none };

struct options {
    cni::mode mode = cni::mode::automatic;
    std::optional<std::string> config_path{};  ///< unset: /etc/buildkit/cni.json
    std::string binary_dir = "/opt/cni/bin";   ///< then /usr/lib/cni
    std::size_t pool_size = 0;                 ///< namespaces kept ready
    std::string lock_file{};                   ///< taken around the first ADD, which makes the bridge; empty: none
    cni::ledger* ledger = nullptr;
    nanoseconds plugin_time_limit = std::chrono::seconds(60);
    nanoseconds idle_limit = std::chrono::minutes(5);  ///< a ready namespace beyond pool_size is given back after this
};

/// automatic: CNI where the configuration file exists, else the host's network with a warning. A file that was named, or
/// mode cni, must exist and be right. `rt`, `programs` and the ledger outlive the provider.
async::task<std::unique_ptr<provider>> make_provider(async::runtime& rt, process::spawner& programs, options o);
std::unique_ptr<provider> make_host_provider();
/// Every attachment a new namespace with nothing but loopback.
std::unique_ptr<provider> make_none_provider(async::runtime& rt);

/// Undoes what a ledger entry of a dead process says; throws when a plugin fails. Harmless when nothing is left.
async::task<void> replay(async::runtime& rt, process::spawner& programs, std::string text);

/// A new network namespace with loopback up, held by this descriptor alone. Blocks; the calling thread stays where it is.
unique_fd new_network_namespace();

}  // namespace cobuild::cni
