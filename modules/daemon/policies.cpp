// Source policies of clients: rules that they send, and verifiers among their session's services.
module;
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "policy.pb.h"
#include "policysession.pb.h"

module cobuild.daemon;

import cobuild.llb;
import cobuild.policy;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1::sourcepolicy;
namespace verifying = moby::buildkit::v1::sourcepolicy::policysession;

namespace {

constexpr std::string_view check_policy = "/moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier/CheckPolicy";
constexpr unsigned max_questions = 10;

template<class M>
void set_platform(M& to, const llb::platform& p) {
    to.set_architecture(p.architecture);
    to.set_os(p.os);
    to.set_variant(p.variant);
    to.set_os_version(p.os_version);
    for (const auto& f : p.os_features) to.add_os_features(f);
}

/// A verifier may ask about the source that it decides about, and about no other.
void check_same(const moby::buildkit::v1::frontend::SourceOp& asked, const llb::source_op& what) {
    if (asked.identifier() != what.identifier)
        throw error{errc::invalid,
                    cat("policy requested different source identifier: ", quoted(asked.identifier()), " != ", quoted(what.identifier))};
    if (std::map<std::string, std::string>(asked.attrs().begin(), asked.attrs().end()) != what.attrs)
        throw error{errc::invalid, cat("policy requested different source attrs for ", what.identifier)};
}

async::task<std::optional<llb::source_op>> ask_verifier(std::shared_ptr<world> w, std::weak_ptr<build_state> of, std::string session,
                                                        llb::source_op what, std::optional<llb::platform> platform) {
    const auto b = of.lock();
    if (!b) throw error{errc::canceled, "the build has ended"};
    const auto client = co_await w->sessions.get(std::move(session), std::chrono::seconds{5});
    verifying::CheckPolicyRequest q;
    if (platform) set_platform(*q.mutable_platform(), *platform);
    auto& source = *q.mutable_source()->mutable_source();
    source.set_identifier(what.identifier);
    source.mutable_attrs()->insert(what.attrs.begin(), what.attrs.end());
    for (unsigned round = 0; round < max_questions; ++round) {
        verifying::CheckPolicyResponse r;
        if (!r.ParseFromString(co_await client->channel->unary(std::string(check_policy), q.SerializeAsString())))
            throw error{errc::corrupt, "the answer of the client's policy verifier cannot be read"};
        if (r.has_request()) {
            check_same(r.request().source(), what);
            const auto found = co_await resolve_source_meta(b, r.request().SerializeAsString(), false);
            if (!q.mutable_source()->ParseFromString(found)) throw error{errc::internal, "what a source is cannot be told"};
            continue;
        }
        if (!r.has_decision()) throw error{errc::invalid, "no decision in policy response"};
        const auto& d = r.decision();
        if (d.action() == wire::CONVERT) {
            if (!d.has_update()) throw error{errc::invalid, "convert action requires updated source"};
            co_return llb::source_op{d.update().identifier(), {d.update().attrs().begin(), d.update().attrs().end()}};
        }
        if (d.action() == wire::ALLOW) co_return std::nullopt;
        for (const auto& m : d.deny_messages()) b->denied.push_back(m.message());
        throw error{errc::permission,
                    cat("source ", quoted(what.identifier), " not allowed by policy: action ", wire::PolicyAction_Name(d.action()))};
    }
    throw error{errc::invalid, cat("too many policy requests for the source ", quoted(what.identifier))};
}

}  // namespace

policy::policy read_policy(const std::string& bytes) {
    wire::Policy from;
    if (!from.ParseFromString(bytes)) throw error{errc::invalid, "the source policy cannot be read"};
    policy::policy out;
    for (const auto& r : from.rules()) {
        if (!r.has_selector()) throw error{errc::invalid, "invalid nil selector in policy"};
        policy::rule one;
        one.action = static_cast<policy::action>(r.action());
        one.selector.identifier = r.selector().identifier();
        one.selector.type = static_cast<policy::match_type>(r.selector().match_type());
        for (const auto& c : r.selector().constraints())
            one.selector.constraints.push_back({c.key(), c.value(), static_cast<policy::condition>(c.condition())});
        if (r.has_updates()) one.updates = policy::update{r.updates().identifier(), {r.updates().attrs().begin(), r.updates().attrs().end()}};
        out.rules.push_back(std::move(one));
    }
    return out;
}

build::source_verifier make_verifier(std::shared_ptr<world> w, const std::shared_ptr<build_state>& b, std::string session) {
    // The job lives in the build's state and holds this: a strong reference would hold both for ever.
    return [w, of = std::weak_ptr<build_state>(b), session](llb::source_op what, std::optional<llb::platform> platform) {
        return ask_verifier(w, of, session, std::move(what), std::move(platform));
    };
}

}  // namespace cobuild::daemon
