module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cache;

namespace cobuild::cache {

bool changes::empty() const noexcept { return size() == 0; }
std::size_t changes::size() const noexcept { return removed.size() + put.size() + links.size() + touched.size() + memos.size(); }

namespace {

class memory_storage final : public storage {
public:
    contents load(std::size_t max_records) override {
        const std::lock_guard lock(guard_);
        contents out;
        out.records.reserve(records_.size());
        for (const auto& [_, r] : records_) out.records.push_back(r);
        if (out.records.size() > max_records) {
            std::sort(out.records.begin(), out.records.end(), [](const auto& a, const auto& b) { return a.last_used > b.last_used; });
            out.records.resize(max_records);
            out.complete = false;
        }
        std::set<digest> chosen;
        for (const auto& r : out.records) chosen.insert(r.canonical);
        for (const auto& [key, canonical] : links_)
            if (chosen.contains(canonical)) out.links.push_back({key, canonical});
        return out;
    }

    std::optional<record> find(const digest& key) override {
        const std::lock_guard lock(guard_);
        const auto l = links_.find(key);
        if (l == links_.end()) return std::nullopt;
        const auto r = records_.find(l->second);
        if (r == records_.end()) return std::nullopt;
        return r->second;
    }

    std::vector<memo_entry> load_memos(std::int64_t oldest_day) override {
        const std::lock_guard lock(guard_);
        std::erase_if(memos_, [&](const auto& m) { return m.second.used_day < oldest_day; });
        std::vector<memo_entry> out;
        out.reserve(memos_.size());
        for (const auto& [_, m] : memos_) out.push_back(m);
        return out;
    }

    void apply(const changes& what) override {
        const std::lock_guard lock(guard_);
        for (const auto& c : what.removed) {
            records_.erase(c);
            std::erase_if(links_, [&](const auto& l) { return l.second == c; });
        }
        for (const auto& r : what.put) {
            auto& kept = records_.try_emplace(r.canonical, r).first->second;
            kept.result = r.result;
            kept.last_used = r.last_used;
        }
        put_links(what.links);
        for (const auto& [canonical, when] : what.touched)
            if (const auto r = records_.find(canonical); r != records_.end()) r->second.last_used = std::max(r->second.last_used, when);
        for (const auto& m : what.memos) memos_.insert_or_assign(std::tuple(m.key.fs, m.key.device, m.key.inode), m);
    }

    [[nodiscard]] bool shared() const noexcept override { return false; }

private:
    void put_links(const std::vector<link>& links) {
        std::set<digest> left;
        for (const auto& l : links) {
            if (!records_.contains(l.canonical)) continue;
            const auto [at, fresh] = links_.try_emplace(l.key, l.canonical);
            if (fresh || at->second == l.canonical) continue;
            left.insert(std::exchange(at->second, l.canonical));
        }
        for (const auto& l : links_) left.erase(l.second);
        for (const auto& canonical : left) records_.erase(canonical);
    }

    std::mutex guard_;
    std::unordered_map<digest, record> records_;
    std::unordered_map<digest, digest> links_;
    std::map<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>, memo_entry> memos_;
};

}  // namespace

std::shared_ptr<storage> make_memory_storage() { return std::make_shared<memory_storage>(); }

}  // namespace cobuild::cache
