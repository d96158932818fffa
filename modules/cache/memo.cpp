module;
#include <sys/vfs.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cache;

namespace cobuild::cache {

namespace {

constexpr std::size_t max_entries = 2'000'000;
constexpr nanoseconds settled = std::chrono::seconds(2);

struct place {
    std::uint64_t fs;
    std::uint64_t device;
    std::uint64_t inode;
    bool operator==(const place&) const = default;
};
struct place_hash {
    std::size_t operator()(const place& p) const noexcept {
        return static_cast<std::size_t>((p.inode * 0x9E3779B97F4A7C15ULL) ^ (p.device << 17) ^ p.fs);
    }
};
place place_of(const file_key& k) { return {k.fs, k.device, k.inode}; }

std::int64_t today() { return std::chrono::floor<std::chrono::days>(std::chrono::system_clock::now()).time_since_epoch().count(); }

}  // namespace

struct stat_memo::state {
    mutable std::mutex guard;
    std::unordered_map<place, memo_entry, place_hash> entries;
    std::unordered_set<place, place_hash> fresh;
    std::int64_t day = today();
};

stat_memo::stat_memo() : state_(std::make_unique<state>()) {}
stat_memo::~stat_memo() = default;

std::optional<file_value> stat_memo::find(const file_key& key) {
    const std::lock_guard lock(state_->guard);
    const auto found = state_->entries.find(place_of(key));
    if (found == state_->entries.end() || found->second.key != key) return std::nullopt;
    if (found->second.used_day != state_->day) {
        found->second.used_day = state_->day;
        state_->fresh.insert(found->first);
    }
    return found->second.value;
}

bool stat_memo::remember(const file_key& before, time_point asked, const file_key& after, const file_value& value) {
    if (before != after) return false;
    if (nanoseconds(before.ctime) + settled >= asked.time_since_epoch()) return true;
    const std::lock_guard lock(state_->guard);
    state_->day = today();
    const auto where = place_of(before);
    if (state_->entries.size() >= max_entries && !state_->entries.contains(where)) return true;
    state_->entries.insert_or_assign(where, memo_entry{before, value, state_->day});
    state_->fresh.insert(where);
    return true;
}

void stat_memo::load(std::vector<memo_entry> entries) {
    const std::lock_guard lock(state_->guard);
    state_->entries.reserve(state_->entries.size() + entries.size());
    for (auto& e : entries)
        if (state_->entries.size() < max_entries) state_->entries.try_emplace(place_of(e.key), e);
}

std::vector<memo_entry> stat_memo::take_new() {
    const std::lock_guard lock(state_->guard);
    std::vector<memo_entry> out;
    out.reserve(state_->fresh.size());
    for (const auto& where : state_->fresh) out.push_back(state_->entries.at(where));
    state_->fresh.clear();
    return out;
}

std::size_t stat_memo::size() const {
    const std::lock_guard lock(state_->guard);
    return state_->entries.size();
}

file_key key_of(std::uint64_t fs, const fs::file_info& info) {
    const auto ns = [](const fs::file_time& t) { return t.seconds * 1'000'000'000 + t.nanoseconds; };
    return {fs, info.device, info.inode, info.size, ns(info.mtime), ns(info.ctime)};
}

std::uint64_t file_system_of(int fd) {
    struct statfs s{};
    if (::fstatfs(fd, &s) != 0) throw_errno("cannot ask for the file system's id");
    std::uint64_t id = 0;
    static_assert(sizeof s.f_fsid == sizeof id);
    std::memcpy(&id, &s.f_fsid, sizeof id);
    return id ^ (static_cast<std::uint64_t>(s.f_type) << 32);
}

}  // namespace cobuild::cache
