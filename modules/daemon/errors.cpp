module;
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <google/protobuf/util/json_util.h>

#include "gateway.pb.h"
#include "status.pb.h"

module cobuild.daemon;

import cobuild.json;
import cobuild.llb;
import :internal;

namespace cobuild::daemon {

namespace {

void add_detail(google::rpc::Status& s, std::string_view type, json::object what) {
    auto* any = s.add_details();
    any->set_type_url(cat("github.com/moby/buildkit/", type, "+json"));
    any->set_value(json::serialize(json::value(std::move(what))));
}

json::value place(const llb::position& p) {
    json::object o;
    if (p.line != 0) o.set("line", static_cast<std::int64_t>(p.line));
    if (p.character != 0) o.set("character", static_cast<std::int64_t>(p.character));
    return json::value(std::move(o));
}

json::object source_detail(const build::job::failure_source& from) {
    json::object info;
    info.set("filename", from.file.filename);
    info.set("data", base64_encode(from.file.data));
    if (!from.file.language.empty()) info.set("language", from.file.language);
    json::object definition;
    if (from.file.definition) {
        json::array ops;
        for (const auto& op : from.file.definition->ops) ops.emplace_back(base64_encode(op));
        definition.set("def", json::value(std::move(ops)));
        info.set("definition", json::value(std::move(definition)));
    }
    json::array ranges;
    for (const auto& r : from.ranges) {
        json::object one;
        one.set("start", place(r.start));
        one.set("end", place(r.end));
        ranges.emplace_back(std::move(one));
    }
    json::object out;
    out.set("info", json::value(std::move(info)));
    out.set("ranges", json::value(std::move(ranges)));
    return out;
}

/// What the step had and left as refs of the frontend, so that it can start a container there.
std::string failed_solve(const build::job::failure& from, bridge_state& told) {
    moby::buildkit::v1::frontend::FailedSolve out;
    for (const auto& r : from.inputs) out.add_inputids(keep_ref(told, r));
    for (const auto& r : from.mounts) out.add_mountids(keep_ref(told, r));
    if (!from.op.empty()) out.mutable_op()->ParseFromString(from.op);
    if (from.action) out.mutable_file()->set_index(static_cast<std::int64_t>(*from.action));
    if (from.unread) out.mutable_cache()->set_index(static_cast<std::int64_t>(*from.unread));
    for (const auto& [key, value] : from.description) (*out.mutable_description())[key] = value;
    std::string text;
    if (!google::protobuf::util::MessageToJsonString(out, &text).ok()) throw error{errc::internal, "the failed step cannot be described"};
    return text;
}

/// Which program and process an error comes from, as BuildKit's clients print it with --debug: its stack, without the stack.
json::object this_program() {
    json::object out;
    out.set("cmdline", json::value(std::vector<std::string>{"cobuildd"}));
    out.set("pid", static_cast<std::int64_t>(::getpid()));
    out.set("version", std::string(version()));
    return out;
}

/// BuildKit answers most failures with Unknown, whose name clients do not show before the sentence.
rpc::code code_of(errc kind) {
    switch (kind) {
        case errc::canceled: return rpc::code::canceled;
        case errc::permission: return rpc::code::permission_denied;
        case errc::unauthorized: return rpc::code::unauthenticated;
        case errc::exists: return rpc::code::already_exists;
        case errc::no_space: return rpc::code::resource_exhausted;
        case errc::internal: return rpc::code::internal;
        default: return rpc::code::unknown;
    }
}

/// What BuildKit says of a file that a COPY does not find; scripts look for it.
std::string sentence(const error& e, const std::optional<build::job::failure>& where) {
    const std::string_view text = e.what();
    const auto missing = text.find("\": not found");
    if (!where || !where->vertex || missing == std::string_view::npos) return std::string(text);
    const auto quote = text.rfind('"', missing - 1);
    if (quote == std::string_view::npos) return std::string(text);
    return cat("failed to compute cache key: failed to calculate checksum of ref ", where->vertex->hex().substr(0, 25), ": ", text.substr(quote));
}

}  // namespace

rpc::status build_status(const error& e, const std::optional<build::job::failure>& where, bridge_state* told,
                         const std::vector<std::string>& denied) {
    rpc::status out{code_of(e.kind()), sentence(e, where), {}};
    if (!where && !e.exit_code() && denied.empty()) return out;
    google::rpc::Status s;
    s.set_code(static_cast<int>(out.code));
    s.set_message(out.message);
    if (!denied.empty()) {
        json::object decision;
        json::array messages;
        for (const auto& text : denied) messages.emplace_back(json::object{{"message", text}});
        decision.set("action", "DENY");
        decision.set("denyMessages", json::value(std::move(messages)));
        add_detail(s, "policysession.DecisionResponse", std::move(decision));
    }
    if (const auto code = e.exit_code()) {
        json::object exit;
        exit.set("Code", static_cast<std::int64_t>(*code));
        add_detail(s, "gatewayapi.ExitMessage", std::move(exit));
    }
    if (where) {
        // Clients wrap the error from the last detail to the first; the last place given comes out first.
        for (auto from = where->sources.rbegin(); from != where->sources.rend(); ++from) add_detail(s, "errdefs.Source", source_detail(*from));
        if (!where->unknown_kind.empty()) {
            s.set_code(static_cast<int>(out.code = rpc::code::unimplemented));
            add_detail(s, cat("errdefs.", where->unknown_kind), json::object{{"name", where->unknown_name}});
        }
        add_detail(s, "stack.Stack", this_program());
        if (where->vertex) add_detail(s, "errdefs.Vertex", json::object{{"digest", where->vertex->str()}});
        if (told != nullptr && where->vertex) {
            auto* any = s.add_details();
            any->set_type_url("github.com/moby/buildkit/errdefs.Solve+json");
            any->set_value(failed_solve(*where, *told));
        }
    }
    out.details = s.SerializeAsString();
    return out;
}

rpc::status failure_status(std::exception_ptr failed, const std::optional<build::job::failure>& where, bridge_state* told,
                           const std::vector<std::string>& denied) {
    try {
        std::rethrow_exception(failed);
    } catch (const told_error& e) {
        return e.full;
    } catch (...) {
        return build_status(describe(failed), where, told, denied);
    }
}

}  // namespace cobuild::daemon
