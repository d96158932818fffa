module;
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

constexpr std::size_t shown_stderr = 2000;

std::string joined(const std::vector<std::string>& dirs, std::string_view between) {
    std::string out;
    for (const auto& d : dirs) out += cat(out.empty() ? "" : between, d);
    return out;
}

std::vector<std::string> environment(const std::string& command, const call_target& target, const std::vector<std::string>& dirs) {
    std::vector<std::string> out;
    for (char** e = ::environ; *e != nullptr; ++e)
        if (const std::string_view entry = *e; !entry.starts_with("CNI_")) out.emplace_back(entry);
    out.push_back("CNI_COMMAND=" + command);
    out.push_back("CNI_PATH=" + joined(dirs, ":"));
    if (command == "VERSION") return out;
    out.push_back("CNI_CONTAINERID=" + target.id);
    out.push_back("CNI_NETNS=" + target.netns);
    out.push_back(cat("CNI_IFNAME=", interface_name));
    if (!target.hostname.empty()) out.push_back("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=" + target.hostname);
    return out;
}

/// What the plugin gets on its standard input.
std::string request(json::object plugin, const plugin_list& list, const std::string& version, const call_target& target,
                    const json::value& previous) {
    json::object chosen;
    if (const auto* declared = json::optional_object(plugin, "capabilities"))
        for (const auto& m : declared->members())
            if (const auto* given = target.capabilities.find(m.key); m.val.as_bool() && given != nullptr) chosen.set(m.key, *given);
    plugin.erase("capabilities");
    plugin.erase("cniVersions");
    plugin.set("cniVersion", version);
    plugin.set("name", list.name);
    if (!chosen.empty()) plugin.set("runtimeConfig", std::move(chosen));
    if (!previous.is_null()) plugin.set("prevResult", previous);
    return json::serialize(plugin, {.escape_html = false});
}

/// "; it said: ..." from what a plugin printed, on one line and not too long.
std::string said(std::string_view text) {
    text = trim(text);
    if (text.empty()) return {};
    std::string out;
    for (const char c : text.size() > shown_stderr ? text.substr(text.size() - shown_stderr) : text) {
        const bool blank = static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
        if (!blank)
            out += c;
        else if (!out.empty() && out.back() != ' ')
            out += ' ';
    }
    return cat("; it said: ", out);
}

errc kind_of(std::int64_t code) {
    switch (code) {
        case 1:                        // incompatible version
        case 2:                        // unsupported field
        case 4:                        // bad environment
        case 6:                        // undecodable
        case 7: return errc::invalid;  // bad configuration
        case 11:                       // try again later
        case 50:
        case 51: return errc::unavailable;
        default: return errc::io;
    }
}

/// The error a plugin reported, or what can be said without one.
error failure(const std::string& what, const process::output& out) {
    try {
        const auto answer = json::parse(out.out);
        const auto& o = answer.as_object();
        std::string text = json::string_at(o, "msg");
        if (const auto details = json::optional_string(o, "details"); details && !details->empty()) text += "; " + *details;
        const auto code = json::optional_int(o, "code").value_or(999);
        return error{kind_of(code), cat(what, " failed: ", text, " (CNI error ", code, ", ", out.status.str(), ")", said(out.err))};
    } catch (const error&) {
        return error{errc::io, cat(what, " ended with ", out.status.str(), said(out.err.empty() ? out.out : out.err))};
    }
}

}  // namespace

caller::caller(process::spawner& programs, std::vector<std::string> dirs, nanoseconds limit)
    : programs_(&programs), dirs_(std::move(dirs)), limit_(limit) {}

std::string caller::find(std::string_view type) const {
    for (const auto& dir : dirs_)
        if (const auto path = cat(dir, '/', type); ::access(path.c_str(), X_OK) == 0) return path;
    throw error{errc::not_found, cat("the CNI plugin ", quoted(type), " is not in ", joined(dirs_, " or "), "; install it or set cniBinaryPath")};
}

void caller::check(const plugin_list& list) const {
    for (const auto& p : list.plugins) {
        (void)find(json::string_at(p.as_object(), "type"));
        if (const auto* ipam = json::optional_object(p.as_object(), "ipam"))
            if (const auto type = json::optional_string(*ipam, "type"); type && !type->empty()) (void)find(*type);
    }
}

async::task<std::string> caller::negotiate(plugin_list list) const {
    std::vector<std::string> left = list.versions;
    for (std::size_t i = 0; list.versions.size() > 1 && i < list.plugins.size(); ++i) {
        const auto answer = co_await call("VERSION", list.plugins[i].as_object(), list, left.front(), {}, {});
        const auto speaks = json::strings_at(answer.as_object(), "supportedVersions");
        std::erase_if(left, [&](const auto& v) { return std::find(speaks.begin(), speaks.end(), v) == speaks.end(); });
        if (left.empty())
            throw error{errc::invalid,
                        cat("the CNI plugin ", find(json::string_at(list.plugins[i].as_object(), "type")),
                            " speaks none of the versions that network ", quoted(list.name), " allows: ", joined(list.versions, ", "))};
    }
    co_return left.front();
}

async::task<json::value> caller::call(std::string command, json::object plugin, plugin_list list, std::string version, call_target target,
                                      json::value previous) const {
    const std::string path = find(json::string_at(plugin, "type"));
    std::string what = cat("CNI plugin ", path, ' ', command);
    if (!target.id.empty()) what += cat(" for ", target.id);
    process::command c{.args = {path}, .env = environment(command, target, dirs_)};
    c.setup.die_with_parent = true;
    process::capture_options limits{.input = request(std::move(plugin), list, version, target, previous), .time_limit = limit_};
    std::exception_ptr failed;
    process::output out;
    try {
        out = co_await apart(programs_->capture(std::move(c), std::move(limits)));
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) {
        auto e = describe(failed);
        if (e.kind() == errc::canceled) std::rethrow_exception(failed);
        if (e.kind() == errc::timed_out) throw error{errc::timed_out, cat(what, " took longer than ", format_duration(limit_), " and was killed")};
        throw std::move(e).with(what);
    }
    if (!out.status.ok()) throw failure(what, out);
    if (command == "DEL") co_return json::value{};  // an answer is allowed and means nothing
    if (out.truncated) throw error{errc::io, cat(what, " printed more than 1 MiB")};
    std::string complaint;
    try {
        auto answer = json::parse(out.out);
        if (command == "ADD")
            (void)addresses_of(answer);
        else
            (void)json::strings_at(answer.as_object(), "supportedVersions");
        co_return answer;
    } catch (const error& e) {
        complaint = e.what();
    }
    throw error{errc::io, cat(what, " ended well but its answer is no CNI result: ", complaint, said(out.out.empty() ? out.err : out.out))};
}

async::task<added> caller::add(plugin_list list, std::string version, call_target target) const {
    added out;
    try {
        for (const auto& p : list.plugins) {
            auto next = co_await call("ADD", p.as_object(), list, version, target, out.result);
            out.result = std::move(next);
        }
    } catch (...) {
        out.failed = std::current_exception();
    }
    if (!out.failed) co_return out;
    co_await async::no_cancel;
    // The last good result goes along: plugins such as firewall find what to take back in it alone.
    out.undone = !co_await del(std::move(list), std::move(version), std::move(target), out.result);
    co_return out;
}

async::task<std::optional<error>> caller::del(plugin_list list, std::string version, call_target target, json::value result) const {
    std::optional<error> first;
    for (std::size_t i = list.plugins.size(); i-- > 0;) {
        std::exception_ptr failed;
        try {
            (void)co_await call("DEL", list.plugins[i].as_object(), list, version, target, result);
        } catch (...) {
            failed = std::current_exception();
        }
        if (!failed) continue;
        auto e = describe(failed);
        log(log_level::warning, cat("taking back a step's network: ", e.what()));
        if (!first) first = std::move(e);
    }
    co_return first;
}

}  // namespace cobuild::cni
