module;
#include <charconv>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.source;
import :bodies;

namespace cobuild::ops {

namespace {

constexpr std::string_view prefix = "chain:";

std::optional<snapshot::chain> from_text(std::string_view text) {
    if (!text.starts_with(prefix)) return std::nullopt;
    text.remove_prefix(prefix.size());
    snapshot::chain out;
    if (text.empty()) return out;
    for (const auto part : split(text, ',')) {
        snapshot::layer_id id;
        const auto [end, ec] = std::from_chars(part.data(), part.data() + part.size(), id.value);
        if (ec != std::errc{} || end != part.data() + part.size()) return std::nullopt;
        out.layers.push_back(id);
    }
    return out;
}

class chain_store final : public solver::result_store {
public:
    explicit chain_store(snapshot::store& snapshots) : snapshots_(snapshots) {}

    async::task<std::string> save(solver::result r) override {
        const auto* c = dynamic_cast<const chain_value*>(r.get());
        // Anything else (a live directory) is keyed for one build only and never saved.
        if (c == nullptr) throw error{errc::internal, "a result that is no chain of layers cannot be remembered"};
        co_return cat(prefix, source::chain_text(c->chain));
    }

    async::task<std::optional<solver::result>> load(std::string text) override {
        auto c = from_text(text);
        if (!c) co_return std::nullopt;
        auto keep = co_await snapshots_.hold(*c);
        if (!keep) co_return std::nullopt;
        auto out = std::make_shared<chain_value>();
        out->chain = std::move(*c);
        out->keep = std::move(*keep);
        co_return out;
    }

    async::task<bool> alive(std::string text) override { co_return (co_await load(std::move(text))).has_value(); }

private:
    snapshot::store& snapshots_;
};

}  // namespace

std::shared_ptr<solver::result_store> make_result_store(snapshot::store& snapshots) { return std::make_shared<chain_store>(snapshots); }

async::task<std::shared_ptr<chain_value>> as_chain_value(environment& env, solver::result value) { return as_chain(env, std::move(value), ""); }

async::task<std::shared_ptr<chain_value>> hold_chain(environment& env, snapshot::chain c) {
    auto keep = co_await env.snapshots.hold(c);
    if (!keep) throw error{errc::not_found, "a layer this build stands on was removed meanwhile; build again"};
    auto out = std::make_shared<chain_value>();
    out->chain = std::move(c);
    out->keep = std::move(*keep);
    co_return out;
}

std::shared_ptr<chain_value> with_layer(const chain_value& below, snapshot::layer top) {
    auto out = std::make_shared<chain_value>(below);
    out->chain.layers.push_back(top.id);
    out->keep += top.keep;
    return out;
}

digest key_of(std::string_view kind, const llb::op& without_inputs) {
    hasher h;
    h.update(kind).update(std::string_view("\0", 1)).update(llb::marshal(without_inputs));
    return h.finish();
}

}  // namespace cobuild::ops
