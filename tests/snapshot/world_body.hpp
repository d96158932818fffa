// Stands after the imports.
#pragma once

using namespace cobuild;
using namespace cobuild::async;
using snapshot::chain;
using snapshot::layer;
using snapshot::layer_id;
using snapshot::store;
using state::directory;
using test::child;
namespace fs = std::filesystem;

namespace {

[[maybe_unused]] inline std::shared_ptr<store> open_kind(const std::string& kind, std::shared_ptr<directory> d, snapshot::options o = {}) {
    return kind == "native" ? snapshot::open_native(std::move(d), o) : snapshot::open_overlay(std::move(d), o);
}

inline void put(int dir, const std::string& name, std::string_view text) {
    const unique_fd f(::openat(dir, name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    BOOST_REQUIRE_MESSAGE(f && ::write(f.get(), text.data(), text.size()) == static_cast<::ssize_t>(text.size()), "cannot write " << name);
}

inline std::string get(int dir, const std::string& name) {
    const unique_fd f(::openat(dir, name.c_str(), O_RDONLY | O_CLOEXEC));
    if (!f) return "<absent>";
    std::string out(1 << 16, '\0');
    const auto n = ::read(f.get(), out.data(), out.size());
    out.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    return out;
}

inline bool is_whiteout(int dir, const char* name) {
    struct stat st{};
    return ::fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == 0;
}

inline bool absent(int dir, const char* name) { return ::faccessat(dir, name, F_OK, AT_SYMLINK_NOFOLLOW) != 0 && errno == ENOENT; }

inline std::set<std::string> names_in(const fs::path& dir) {
    std::set<std::string> out;
    if (!fs::exists(dir)) return out;
    for (const auto& e : fs::directory_iterator(dir)) out.insert(e.path().filename().string());
    return out;
}

inline std::string mount_table() {
    std::ifstream in("/proc/self/mountinfo");
    return {std::istreambuf_iterator<char>(in), {}};
}

/// One layer with what `f(root descriptor)` does.
template<class F>
task<layer> add(store& s, chain lower, F f, snapshot::commit_info info = {}) {
    auto w = co_await s.begin(std::move(lower));
    {
        const auto m = co_await w.mount();
        f(m.get());
    }
    co_return co_await s.commit(std::move(w), std::move(info));
}

inline chain on(const chain& below, const layer& top) {
    auto out = below;
    out.layers.push_back(top.id);
    return out;
}

template<class T>
task<std::optional<errc>> failing(task<T> t) {
    std::optional<errc> out;
    try {
        (void)co_await std::move(t);
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        out = e.kind();
    }
    co_return out;
}

}  // namespace

/// One contract, for both stores: `BOTH(name) { ... }` with `kind`, `rt`, `dir` (scratch), `d` (directory), `s` (store).
#define BOTH(name)                                                                                                                              \
    static task<void> name##_on(runtime& rt, std::string kind, const test::scratch_dir& dir, std::shared_ptr<directory> d,                      \
                                std::shared_ptr<store> s);                                                                                      \
    static void name##_run(const std::string& kind) {                                                                                           \
        if (!test::needs_root()) return;                                                                                                        \
        runtime rt;                                                                                                                             \
        const test::scratch_dir dir;                                                                                                            \
        const auto mounts = mount_table();                                                                                                      \
        {                                                                                                                                       \
            auto d = directory::open(dir.path().string(), rt.pool());                                                                           \
            auto s = open_kind(kind, d);                                                                                                        \
            rt.block_on(name##_on(rt, kind, dir, std::move(d), std::move(s)));                                                                  \
        }                                                                                                                                       \
        BOOST_TEST(mount_table() == mounts);                                                                                                    \
    }                                                                                                                                           \
    BOOST_AUTO_TEST_CASE(name##_overlay) { name##_run("overlay"); }                                                                             \
    BOOST_AUTO_TEST_CASE(name##_native) { name##_run("native"); }                                                                               \
    static task<void> name##_on([[maybe_unused]] runtime& rt, [[maybe_unused]] std::string kind, [[maybe_unused]] const test::scratch_dir& dir, \
                                [[maybe_unused]] std::shared_ptr<directory> d, [[maybe_unused]] std::shared_ptr<store> s)
