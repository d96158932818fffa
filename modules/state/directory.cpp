module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.state;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import :internal;

namespace cobuild::state {
namespace {

void lock_file(int fd, int operation, std::string_view what) {
    while (::flock(fd, operation) != 0) {
        if (errno != EINTR) throw_errno(cat("cannot lock ", what));
    }
}

bool try_lock(int fd, int operation) { return ::flock(fd, operation | LOCK_NB) == 0; }

unique_fd open_file(int dirfd, const std::string& name, int flags) {
    unique_fd out(::openat(dirfd, name.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!out) throw_errno(cat("cannot open ", name, " in the state directory"));
    return out;
}

void make_root(const std::string& root) {
    for (std::size_t slash = root.find('/', 1);; slash = root.find('/', slash + 1)) {
        const auto part = root.substr(0, slash);
        const bool last = slash == std::string::npos;
        if (::mkdir(part.c_str(), last ? 0700 : 0755) != 0 && errno != EEXIST) throw_errno(cat("cannot make the state directory ", part));
        if (last) return;
    }
}

std::string pid_of(const std::string& text) {
    const auto lines = split(text, '\n');
    return lines.empty() || lines[0].empty() ? "another process" : std::string(lines[0]);
}

}  // namespace

void crash_point(std::string_view point) noexcept {
    const char* const wanted = std::getenv("COBUILD_CRASH_AT");
    if (wanted != nullptr && point == wanted) ::kill(::getpid(), SIGKILL);
}

unique_fd open_dir(int dirfd, const std::string& path) {
    unique_fd out(::openat(dirfd, path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!out) throw_errno(cat("cannot open ", path, " in the state directory"));
    return out;
}

unique_fd make_dir(int dirfd, const std::string& path, unsigned mode) {
    for (std::size_t slash = path.find('/');; slash = path.find('/', slash + 1)) {
        const auto part = path.substr(0, slash);
        if (::mkdirat(dirfd, part.c_str(), mode) != 0 && errno != EEXIST) throw_errno(cat("cannot make ", part, " in the state directory"));
        if (slash == std::string::npos) break;
    }
    return open_dir(dirfd, path);
}

std::vector<std::string> names_in(int dirfd) {
    std::vector<std::string> out;
    unique_fd again(::openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    DIR* stream = again ? ::fdopendir(again.get()) : nullptr;
    if (stream == nullptr) throw_errno("cannot list a directory of the state directory");
    (void)again.release();
    const scope_exit close([&] { ::closedir(stream); });
    while (const auto* e = ::readdir(stream)) {
        if (e->d_name[0] != '.') out.emplace_back(e->d_name);
    }
    return out;
}

std::string read_small(int dirfd, const std::string& name, std::size_t limit) {
    const unique_fd in(::openat(dirfd, name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (!in) return {};
    std::string out(limit, '\0');
    std::size_t have = 0;
    for (::ssize_t n = 1; n > 0 && have < limit; have += static_cast<std::size_t>(n > 0 ? n : 0))
        n = ::read(in.get(), out.data() + have, limit - have);
    out.resize(have);
    return out;
}

bool directory::state::exclusive() {
    const bool got = try_lock(lock.get(), LOCK_EX);
    lock_file(lock.get(), LOCK_SH, cat(root, "/lock"));  // a failed attempt loses the shared lock as well
    return got;
}

std::pair<std::unique_ptr<db::database>, bool> directory::state::open_database(const std::string& name, db::options o) {
    const auto file = cat(root, "/", name);
    if (!alone) o.check = db::integrity::never;
    std::optional<error> damage;
    try {
        return {std::make_unique<db::database>(file, o), false};
    } catch (const error& e) {
        if (e.kind() != errc::corrupt) throw;
        damage = e;
    }
    if (!exclusive()) throw error{errc::corrupt, cat(damage->what(), "; it is replaced once every other build on this state directory has ended")};
    const auto aside = db::set_aside(file);
    log(log_level::warning, "a damaged database was set aside and is made anew", {{"reason", damage->what()}, {"now", aside}});
    return {std::make_unique<db::database>(file, o), true};
}

directory::directory() = default;

std::shared_ptr<directory> directory::open(std::string root, async::blocking_pool& pool, options o) {
    while (root.size() > 1 && root.back() == '/') root.pop_back();
    if (root.empty()) throw error{errc::invalid, "the state directory has no name"};
    make_root(root);
    std::shared_ptr<directory> out(new directory);
    out->state_ = std::make_unique<state>(pool);
    auto& s = *out->state_;
    s.root = root;
    s.fd = open_dir(AT_FDCWD, root);
    if (const auto net = db::network_file_system(root); !net.empty()) {
        throw error{errc::unsupported, cat("the state directory ", root, " stands on a network file system (", net,
                                           "), where locks and overlays do not work: choose one on a local disk")};
    }
    s.boot = o.boot_id.empty() ? std::string(trim(read_small(AT_FDCWD, "/proc/sys/kernel/random/boot_id", 64))) : o.boot_id;
    for (const auto* name : {"owners", "ledger"}) (void)make_dir(s.fd.get(), name, 0700);
    s.trash = make_dir(s.fd.get(), "trash", 0700);

    const auto opening = open_file(s.fd.get(), "open.lock", O_RDWR | O_CREAT);
    lock_file(opening.get(), LOCK_EX, cat(root, "/open.lock"));
    s.lock = open_file(s.fd.get(), "lock", O_RDWR | O_CREAT);
    s.alone = s.exclusive();
    s.owner = random_id().substr(0, 16);
    const auto file = cat("owners/", s.owner);
    s.owner_lock = open_file(s.fd.get(), file, O_RDWR | O_CREAT | O_EXCL);
    lock_file(s.owner_lock.get(), LOCK_EX, file);
    const auto text = cat("pid ", ::getpid(), "\nboot ", s.boot, "\n");
    if (::write(s.owner_lock.get(), text.data(), text.size()) != static_cast<::ssize_t>(text.size())) {
        const int reason = errno;
        ::unlinkat(s.fd.get(), file.c_str(), 0);
        throw os_error(reason, cat("cannot write ", root, "/", file));
    }
    std::tie(s.database, s.rebuilt) = s.open_database("state.db", {});
    return out;
}

directory::~directory() {
    if (!state_ || !state_->owner_lock) return;
    auto& s = *state_;
    s.database.reset();
    if (s.suspect) ::unlinkat(s.fd.get(), "state.db.ok", 0);
    try {
        sweep_scratch(*this, s.owner);
    } catch (const error& e) {
        log(log_level::warning, e.what());
    }
    const auto mine = cat("ledger/", s.owner);
    if (s.ledger && ::unlinkat(s.fd.get(), mine.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT)
        return;  // pending entries: the next start replays them
    ::unlinkat(s.fd.get(), cat("owners/", s.owner).c_str(), 0);
}

const std::string& directory::root() const noexcept { return state_->root; }
int directory::fd() const noexcept { return state_->fd.get(); }
const std::string& directory::owner() const noexcept { return state_->owner; }
const std::string& directory::boot_id() const noexcept { return state_->boot; }
async::blocking_pool& directory::pool() const noexcept { return state_->pool; }
unique_fd directory::subdir(const std::string& path) const { return make_dir(state_->fd.get(), path, 0700); }
std::string directory::fresh_name() { return cat(state_->owner, "-", state_->names++); }
db::database& directory::database() noexcept { return *state_->database; }
bool directory::rebuilt() const noexcept { return state_->rebuilt; }
void directory::suspect() noexcept { state_->suspect = true; }

directory::opened directory::open_database(const std::string& name, db::options o) {
    auto& s = *state_;
    const auto opening = open_file(s.fd.get(), "open.lock", O_RDWR | O_CREAT);
    lock_file(opening.get(), LOCK_EX, cat(s.root, "/open.lock"));
    auto [made, replaced] = s.open_database(name, o);
    return {.database = std::move(made), .replaced = replaced};
}

std::vector<std::string> directory::others() const {
    const auto& s = *state_;
    const auto owners = open_dir(s.fd.get(), "owners");
    std::vector<std::string> out;
    for (const auto& name : names_in(owners.get())) {
        if (name == s.owner) continue;
        const unique_fd file(::openat(owners.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
        if (file && !try_lock(file.get(), LOCK_SH)) out.push_back(pid_of(read_small(owners.get(), name, 256)));
    }
    return out;
}

}  // namespace cobuild::state
