module;
#include <charconv>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "control.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1;

namespace {

using test = std::function<bool(const wire::BuildHistoryRecord&)>;

std::string status_of(const wire::BuildHistoryRecord& r) {
    if (!r.has_completed_at()) return "running";
    if (!r.has_error()) return "completed";
    return r.error().message().find("context canceled") != std::string::npos || r.error().code() == 1 ? "canceled" : "error";
}

std::string field_of(const wire::BuildHistoryRecord& r, std::string_view name) {
    if (name == "ref") return r.ref();
    if (name == "status") return status_of(r);
    for (const char* key : {"vcs:source", "context"})
        if (const auto at = r.frontend_attrs().find(key); at != r.frontend_attrs().end()) return at->second;
    return {};
}

std::int64_t now_seconds() { return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::optional<nanoseconds> span_of(std::string_view text) {
    try {
        return parse_duration(text);
    } catch (const error&) {
        return std::nullopt;  // a point in time, then
    }
}

/// "key>=value" about times: a duration says how long ago.
std::optional<test> time_test(std::string_view item) {
    for (const std::string_view op : {">=", "<=", ">", "<"}) {
        const auto at = item.find(op);
        if (at == std::string_view::npos) continue;
        const std::string key(item.substr(0, at));
        const auto value = item.substr(at + op.size());
        if (key != "startedAt" && key != "completedAt" && key != "duration") return std::nullopt;
        std::int64_t limit = 0;
        if (const auto span = span_of(value)) {
            limit = key == "duration" ? span->count() : now_seconds() - std::chrono::duration_cast<std::chrono::seconds>(*span).count();
        } else if (const auto point = key == "duration" ? std::nullopt : parse_time(value)) {
            limit = std::chrono::duration_cast<std::chrono::seconds>(point->time_since_epoch()).count();
        } else {
            throw error{errc::invalid, cat("invalid ", key == "duration" ? "duration " : "time ", value)};
        }
        return [key, op = std::string(op), limit](const wire::BuildHistoryRecord& r) {
            std::int64_t is = 0;
            if (key == "startedAt") is = r.created_at().seconds();
            if (key == "completedAt") is = r.completed_at().seconds();
            if (key == "duration" && r.has_completed_at())
                is = (r.completed_at().seconds() - r.created_at().seconds()) * 1'000'000'000 + r.completed_at().nanos() - r.created_at().nanos();
            return op == ">=" ? is >= limit : op == "<=" ? is <= limit : op == ">" ? is > limit : is < limit;
        };
    }
    return std::nullopt;
}

test text_test(std::string_view item) {
    for (const std::string_view op : {"==", "!=", "~="}) {
        const auto at = item.find(op);
        if (at == std::string_view::npos) continue;
        const std::string key(trim(item.substr(0, at)));
        std::string value(trim(item.substr(at + op.size())));
        if (value.size() > 1 && value.front() == '"' && value.back() == '"') value = value.substr(1, value.size() - 2);
        if (key != "ref" && key != "status" && key != "repository") break;
        return [key, op = std::string(op), value](const wire::BuildHistoryRecord& r) {
            const auto is = field_of(r, key);
            return op == "==" ? is == value : op == "!=" ? is != value : is.find(value) != std::string::npos;
        };
    }
    throw error{errc::invalid,
                cat("failed to parse history filters: ", quoted(item),
                    ": ref, status or repository with ==, != or ~=, or startedAt, completedAt or duration with <, <=, > or >= is expected")};
}

}  // namespace

std::function<bool(const std::string&)> parse_history_filters(const std::vector<std::string>& filters) {
    std::vector<std::vector<test>> any;
    for (const auto& f : filters) {
        std::vector<test> all;
        for (const auto item : split(f, ',')) {
            auto by_time = time_test(trim(item));
            all.push_back(by_time ? std::move(*by_time) : text_test(trim(item)));
        }
        any.push_back(std::move(all));
    }
    return [any](const std::string& bytes) {
        if (any.empty()) return true;
        wire::BuildHistoryRecord r;
        r.ParseFromString(bytes);
        for (const auto& all : any) {
            bool fits = true;
            for (const auto& t : all) fits = fits && t(r);
            if (fits) return true;
        }
        return false;
    };
}

}  // namespace cobuild::daemon
