module;
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.state;

import cobuild.base;
import cobuild.async;
import :internal;

namespace cobuild::state {
namespace {

constexpr std::size_t max_entry = 64 << 10;

std::string encode(std::string_view kind, std::string_view text) { return cat(kind, " ", text.size(), "\n", text); }

/// Empty for one that was cut off while it was written: its deed was not begun.
std::optional<undo> decode(const std::string& owner, std::string_view file) {
    const auto line = file.find('\n');
    if (line == std::string_view::npos) return std::nullopt;
    const auto head = split(file.substr(0, line), ' ');
    std::size_t size = 0;
    if (head.size() != 2 || std::from_chars(head[1].data(), head[1].data() + head[1].size(), size).ec != std::errc()) return std::nullopt;
    const auto text = file.substr(line + 1);
    if (text.size() != size) return std::nullopt;
    return undo{.owner = owner, .kind = std::string(head[0]), .text = std::string(text)};
}

std::vector<dead_owner::entry> entries_of(int root, const std::string& owner) {
    std::vector<dead_owner::entry> out;
    const unique_fd dir(::openat(root, cat("ledger/", owner).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!dir) return out;
    auto names = names_in(dir.get());
    std::sort(names.begin(), names.end(), std::greater<>());
    for (auto& name : names) {
        if (auto what = decode(owner, read_small(dir.get(), name, max_entry + 256))) {
            out.push_back({std::move(name), std::move(*what)});
        } else {
            ::unlinkat(dir.get(), name.c_str(), 0);
        }
    }
    return out;
}

/// An owner without a text yet: its maker holds open.lock from before the file is made until the text is written, unless it
/// died in between.
bool being_born(int root, int owner) {
    const unique_fd opening(::openat(root, "open.lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    struct stat now{};
    return !opening || ::flock(opening.get(), LOCK_EX | LOCK_NB) != 0 || ::fstat(owner, &now) != 0 || now.st_size != 0;
}

/// Every owner whose lock can be taken; holding it, we alone repair.
std::vector<dead_owner> take_dead(int root, const std::string& self) {
    std::vector<dead_owner> out;
    const auto owners = open_dir(root, "owners");
    for (const auto& name : names_in(owners.get())) {
        if (name == self) continue;
        unique_fd file(::openat(owners.get(), name.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
        if (!file || ::flock(file.get(), LOCK_EX | LOCK_NB) != 0) continue;
        struct stat held{}, there{};
        if (::fstat(file.get(), &held) != 0 || ::fstatat(owners.get(), name.c_str(), &there, AT_SYMLINK_NOFOLLOW) != 0) continue;
        if (held.st_ino != there.st_ino) continue;  // removed meanwhile
        if (held.st_size == 0 && being_born(root, file.get())) continue;
        auto entries = entries_of(root, name);
        out.push_back({name, std::move(file), std::move(entries)});
    }
    return out;
}

}  // namespace

const std::vector<std::string>& scratch_places() {
    static const std::vector<std::string> places{"steps", "content/ingest", "active"};
    return places;
}

void sweep_scratch(directory& d, const std::string& only) {
    for (const auto& place : scratch_places()) {
        const unique_fd dir(::openat(d.fd(), place.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!dir) continue;
        for (const auto& name : names_in(dir.get())) {
            const auto owner = name.substr(0, name.find('-'));
            // an owner's file stands before its first scratch entry does, and goes after the last
            const bool gone = only.empty() ? ::faccessat(d.fd(), cat("owners/", owner).c_str(), F_OK, 0) != 0 && errno == ENOENT : owner == only;
            if (gone) d.discard(dir.get(), name);
        }
    }
}

std::shared_ptr<const unique_fd> directory::state::own_ledger() {
    const std::lock_guard hold(busy);
    if (!ledger) {
        const auto parent = open_dir(fd.get(), "ledger");
        ledger = std::make_shared<const unique_fd>(make_dir(parent.get(), owner, 0700));
        // the owner's file must be found after power failure too, or nobody looks at the entries
        if (::fsync(parent.get()) != 0 || ::fsync(owner_lock.get()) != 0 || ::fsync(open_dir(fd.get(), "owners").get()) != 0)
            throw_errno("cannot write the ledger");
    }
    return ledger;
}

ledger_entry directory::record(std::string_view kind, std::string_view text) {
    if (kind.empty() || kind.find_first_of(" \n") != std::string_view::npos || text.size() > max_entry) {
        throw error{errc::internal, cat("not a ledger entry: ", quoted(kind.substr(0, 40)), " with ", text.size(), " bytes")};
    }
    ledger_entry out;
    out.dir_ = state_->own_ledger();
    const auto number = cat(state_->entries++);
    const auto name = std::string(10 - std::min<std::size_t>(10, number.size()), '0') + number;
    const auto what = cat("cannot write the ledger below ", root());
    const unique_fd file(::openat(out.dir_->get(), name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!file) throw_errno(what);
    const auto bytes = encode(kind, text);
    crash_point("ledger-created");
    if (::write(file.get(), bytes.data(), bytes.size()) != static_cast<::ssize_t>(bytes.size()) || ::fsync(file.get()) != 0 ||
        ::fsync(out.dir_->get()) != 0) {
        const int reason = errno;
        ::unlinkat(out.dir_->get(), name.c_str(), 0);
        throw os_error(reason, what);
    }
    out.name_ = name;
    return out;
}

void ledger_entry::forget() {
    if (name_.empty()) return;
    if (::unlinkat(dir_->get(), name_.c_str(), 0) != 0 && errno != ENOENT) throw_errno("cannot remove a ledger entry");
    name_.clear();
}

void directory::on_undo(std::string kind, undo_handler handler) {
    const std::lock_guard hold(state_->busy);
    state_->handlers[std::move(kind)] = std::move(handler);
}

void directory::on_dead_owner(std::function<void(const std::string&)> f) {
    const std::lock_guard hold(state_->busy);
    state_->callbacks.push_back(std::move(f));
}

async::task<recovery> directory::recover() {
    auto& s = *state_;
    auto dead = co_await s.pool.run([&s] { return take_dead(s.fd.get(), s.owner); });
    recovery out;
    out.dead_owners = dead.size();
    for (auto& owner : dead) {
        std::size_t kept = 0;
        for (auto& entry : owner.entries) {
            undo_handler handler;
            {
                const std::lock_guard hold(s.busy);
                if (const auto found = s.handlers.find(entry.what.kind); found != s.handlers.end()) handler = found->second;
            }
            std::string reason = handler ? "" : "nothing here knows how";
            if (handler) {
                try {
                    co_await handler(entry.what);
                } catch (...) {
                    reason = describe(std::current_exception()).what();
                }
            }
            if (!reason.empty()) {
                ++kept;
                log(log_level::warning, "what a dead build left could not be undone; the next start tries again",
                    {{"kind", entry.what.kind}, {"owner", owner.id}, {"reason", reason}});
                continue;
            }
            ++out.undone;
            co_await s.pool.run([&] { ::unlinkat(s.fd.get(), cat("ledger/", owner.id, "/", entry.name).c_str(), 0); });
        }
        out.kept += kept;
        co_await s.pool.run([this, &s, &owner, kept] {
            std::vector<std::function<void(const std::string&)>> callbacks;
            {
                const std::lock_guard hold(s.busy);
                callbacks = s.callbacks;
            }
            for (const auto& f : callbacks) f(owner.id);
            sweep_scratch(*this, owner.id);
            if (kept != 0) return;
            ::unlinkat(s.fd.get(), cat("ledger/", owner.id).c_str(), AT_REMOVEDIR);
            ::unlinkat(s.fd.get(), cat("owners/", owner.id).c_str(), 0);
        });
    }
    co_await s.pool.run([this] { sweep_scratch(*this, ""); });
    co_return out;
}

}  // namespace cobuild::state
