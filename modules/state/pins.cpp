module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

module cobuild.state;

import cobuild.base;

namespace cobuild::state {
namespace {

/// One byte's lock, by open file description.
bool lock_byte(int fd, std::uint64_t number, short type) {
    struct flock lock{};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<::off_t>(number);
    lock.l_len = 1;
    while (::fcntl(fd, F_OFD_SETLK, &lock) != 0) {
        if (errno == EAGAIN || errno == EACCES) return false;
        if (errno != EINTR) throw_errno("cannot lock in the state directory's pins");
    }
    return true;
}

}  // namespace

struct pin_table::state {
    unique_fd holds;     ///< our shared locks
    unique_fd removals;  ///< exclusive ones: another open file, so that they conflict with our own shared ones
    std::mutex busy;
    std::map<std::uint64_t, std::weak_ptr<const void>> live;
    std::set<std::uint64_t> removing;  ///< by this process: its removals share one open file and so do not exclude each other

    void let_go(std::uint64_t number) noexcept {
        const std::lock_guard lock(busy);
        const auto found = live.find(number);
        if (found == live.end() || !found->second.expired()) return;  // somebody has pinned it again meanwhile
        live.erase(found);
        try {
            lock_byte(holds.get(), number, F_UNLCK);
        } catch (...) {
            log(log_level::warning, "cannot drop a pin");
        }
    }
};

namespace {
struct held {
    std::shared_ptr<void> table;
    std::uint64_t number;
    void (*drop)(void*, std::uint64_t);
    ~held() { drop(table.get(), number); }
};
}  // namespace

pin& pin::operator+=(const pin& other) {
    held_.insert(held_.end(), other.held_.begin(), other.held_.end());
    return *this;
}

pin_table::pin_table(int dirfd, const std::string& file) : state_(std::make_shared<state>()) {
    for (auto* fd : {&state_->holds, &state_->removals}) {
        fd->reset(::openat(dirfd, file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
        if (!*fd) throw_errno(cat("cannot open ", file, " in the state directory"));
    }
}
pin_table::~pin_table() = default;
pin_table::pin_table(pin_table&&) noexcept = default;

std::optional<pin> pin_table::hold(std::uint64_t number) {
    auto& s = *state_;
    const std::lock_guard lock(s.busy);
    auto& slot = s.live[number];
    auto keep = slot.lock();
    if (!keep) {
        if (!lock_byte(s.holds.get(), number, F_RDLCK)) {
            s.live.erase(number);
            return std::nullopt;
        }
        const auto drop = [](void* table, std::uint64_t n) { static_cast<state*>(table)->let_go(n); };
        keep = std::shared_ptr<const held>(new held{state_, number, drop});
        slot = keep;
    }
    pin out;
    out.held_.push_back(std::move(keep));
    return out;
}

struct pin_table::removal::state {
    std::shared_ptr<pin_table::state> table;
    std::uint64_t number;
};

pin_table::removal::removal(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
pin_table::removal::removal(removal&&) noexcept = default;
pin_table::removal::~removal() {
    if (!state_) return;
    const std::lock_guard lock(state_->table->busy);
    state_->table->removing.erase(state_->number);
    try {
        lock_byte(state_->table->removals.get(), state_->number, F_UNLCK);
    } catch (...) {
        log(log_level::warning, "cannot drop a removal lock");
    }
}

std::optional<pin_table::removal> pin_table::try_remove(std::uint64_t number) {
    const std::lock_guard lock(state_->busy);
    if (state_->removing.contains(number) || !lock_byte(state_->removals.get(), number, F_WRLCK)) return std::nullopt;
    state_->removing.insert(number);
    return removal(std::make_unique<removal::state>(state_, number));
}

bool pin_table::pinned(std::uint64_t number) const {
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<::off_t>(number);
    lock.l_len = 1;
    if (::fcntl(state_->removals.get(), F_OFD_GETLK, &lock) != 0) throw_errno("cannot look at the state directory's pins");
    return lock.l_type != F_UNLCK;
}

}  // namespace cobuild::state
