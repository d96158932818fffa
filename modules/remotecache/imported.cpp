module;
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.remotecache;

namespace cobuild::remotecache {

imported::imported(document d, loader load) : document_(std::move(d)), load_(std::move(load)) {
    for (std::size_t i = 0; i < document_.records.size(); ++i) by_key_.try_emplace(document_.records[i].canonical, i);
    for (std::size_t i = 0; i < document_.records.size(); ++i)
        for (const auto& key : document_.records[i].keys) by_key_.try_emplace(key, i);
}

std::optional<solver::remote_cache::found> imported::find(const digest& key) const {
    const auto at = by_key_.find(key);
    if (at == by_key_.end()) return std::nullopt;
    const auto& r = document_.records[at->second];
    found out{.canonical = r.canonical, .loadable = r.chain.has_value() || !r.others.empty(), .outputs = r.chain ? 1U : 0U};
    for (const auto& [number, chain] : r.others) out.outputs |= std::uint64_t{1} << number;
    return out;
}

async::task<std::vector<solver::result>> imported::load(digest canonical, progress::writer progress) {
    std::vector<solver::result> out;
    const auto at = by_key_.find(canonical);
    if (at == by_key_.end()) co_return out;
    auto chains = document_.records[at->second].others;
    if (const auto& first = document_.records[at->second].chain) chains[0] = *first;
    for (const auto& [number, layers] : chains) {
        std::vector<layer> chain;
        for (const auto l : layers) chain.push_back(document_.layers.at(l));
        out.resize(number + 1);
        out[number] = co_await load_(std::move(chain), progress);
    }
    co_return out;
}

}  // namespace cobuild::remotecache
