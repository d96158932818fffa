module;
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.policy;

namespace cobuild::policy {

namespace {

error bad(std::string_view what) { return error{errc::invalid, cat("the source policy: ", what)}; }

/// A member by either of its spellings: the field's, and protobuf's JSON one.
const json::value* member(const json::value& v, std::string_view name, std::string_view other = {}) {
    if (const auto* found = v.find(name)) return found;
    return other.empty() ? nullptr : v.find(other);
}

std::string text(const json::value* v, std::string_view what) {
    if (v == nullptr || v->is_null()) return {};
    if (!v->is_string()) throw bad(cat(what, " is no text"));
    return v->as_string();
}

/// By name or number; the first when it is not there.
template<class E>
E choice(const json::value* v, std::span<const std::string_view> names, std::string_view what) {
    if (v == nullptr || v->is_null()) return E{};
    if (v->is_number()) {
        const auto n = v->as_int();
        if (n >= 0 && n < static_cast<std::int64_t>(names.size())) return static_cast<E>(n);
        throw bad(cat(what, " ", n, " is not known"));
    }
    const auto given = text(v, what);
    for (std::size_t i = 0; i < names.size(); ++i)
        if (given == names[i]) return static_cast<E>(i);
    throw bad(cat(what, " ", quoted(given), " is not known"));
}

constexpr std::array<std::string_view, 3> actions{"ALLOW", "DENY", "CONVERT"}, types{"WILDCARD", "EXACT", "REGEX"},
    conditions{"EQUAL", "NOTEQUAL", "MATCHES"};

std::vector<const json::value*> list(const json::value* v, std::string_view what) {
    std::vector<const json::value*> out;
    if (v == nullptr || v->is_null()) return out;
    if (!v->is_array()) throw bad(cat(what, " are no list"));
    for (const auto& one : v->as_array()) {
        if (!one.is_object()) throw bad(cat("one of its ", what, " is no object"));
        out.push_back(&one);
    }
    return out;
}

selector parse_selector(const json::value& v) {
    if (!v.is_object()) throw bad("a selector is no object");
    selector out;
    out.identifier = text(member(v, "identifier"), "a selector's identifier");
    out.type = choice<match_type>(member(v, "match_type", "matchType"), types, "the match type");
    for (const auto* c : list(member(v, "constraints"), "constraints"))
        out.constraints.push_back({.key = text(member(*c, "key"), "a constraint's key"),
                                   .value = text(member(*c, "value"), "a constraint's value"),
                                   .condition = choice<condition>(member(*c, "condition"), conditions, "the condition")});
    return out;
}

update parse_update(const json::value& v) {
    if (!v.is_object()) throw bad("updates are no object");
    update out{.identifier = text(member(v, "identifier"), "an update's identifier"), .attrs = {}};
    if (const auto* attrs = member(v, "attrs"); attrs != nullptr && !attrs->is_null()) {
        if (!attrs->is_object()) throw bad("an update's attrs are no object");
        for (const auto& m : attrs->as_object().members()) out.attrs[m.key] = text(&m.val, "an update's attribute");
    }
    return out;
}

}  // namespace

policy parse(std::string_view json_text) {
    json::value all;
    try {
        all = json::parse(json_text);
    } catch (const error& e) {
        throw bad(e.what());
    }
    if (!all.is_object()) throw bad("an object is expected");
    policy out;
    for (const auto* r : list(member(all, "rules"), "rules")) {
        rule one;
        one.action = choice<action>(member(*r, "action"), actions, "the action");
        const auto* s = member(*r, "selector");
        if (s == nullptr || s->is_null()) throw bad("invalid nil selector in policy");
        one.selector = parse_selector(*s);
        if (const auto* u = member(*r, "updates"); u != nullptr && !u->is_null()) one.updates = parse_update(*u);
        out.rules.push_back(std::move(one));
    }
    return out;
}

}  // namespace cobuild::policy
