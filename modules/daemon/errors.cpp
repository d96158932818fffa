module;
#include <unistd.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

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

rpc::status build_status(const error& e, const std::optional<build::job::failure>& where) {
    rpc::status out{code_of(e.kind()), sentence(e, where), {}};
    if (!where) return out;
    google::rpc::Status s;
    s.set_code(static_cast<int>(out.code));
    s.set_message(out.message);
    for (const auto& from : where->sources) add_detail(s, "errdefs.Source", source_detail(from));
    if (!where->unknown_kind.empty()) {
        s.set_code(static_cast<int>(out.code = rpc::code::unimplemented));
        add_detail(s, cat("errdefs.", where->unknown_kind), json::object{{"name", where->unknown_name}});
    }
    add_detail(s, "stack.Stack", this_program());
    if (where->vertex) add_detail(s, "errdefs.Vertex", json::object{{"digest", where->vertex->str()}});
    out.details = s.SerializeAsString();
    return out;
}

}  // namespace cobuild::daemon
