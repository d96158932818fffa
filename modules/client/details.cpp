module;
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "status.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.json;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

int line_of(const json::value& range, std::string_view end) {
    const auto* position = range.find(end);
    const auto* line = position != nullptr ? position->find("line") : nullptr;
    return line != nullptr && line->is_number() ? static_cast<int>(line->as_int()) : 0;
}

std::optional<source_excerpt> to_excerpt(const std::string& text) {
    const auto whole = json::parse(text);
    const auto* info = whole.find("info");
    const auto* ranges = whole.find("ranges");
    if (info == nullptr || !info->is_object() || ranges == nullptr || !ranges->is_array()) return std::nullopt;
    source_excerpt out;
    out.file = json::optional_string(info->as_object(), "filename").value_or("");
    out.text = base64_decode(json::optional_string(info->as_object(), "data").value_or("")).value_or("");
    for (const auto& r : ranges->as_array()) out.lines.emplace_back(line_of(r, "start"), std::max(line_of(r, "start"), line_of(r, "end")));
    return out;
}

}  // namespace

failure_details details_of(const rpc::status& s) {
    failure_details out;
    google::rpc::Status whole;
    if (!whole.ParseFromString(s.details)) return out;
    for (const auto& any : whole.details()) {
        if (any.type_url().find("errdefs.Source+json") == std::string::npos) continue;
        try {
            if (auto e = to_excerpt(any.value())) out.sources.push_back(std::move(*e));
        } catch (const error&) {
            // What explains an error must not become another one.
        }
    }
    return out;
}

std::string render(const source_excerpt& e) {
    const auto lines = split(e.text, '\n');
    const int count = static_cast<int>(lines.size());
    int start = 0, end = 0;
    for (const auto& [first, last] : e.lines) {
        start = start == 0 ? first : std::min(start, first);
        end = std::max(end, last);
    }
    if (start < 1 || start > count) return {};
    end = std::min(end, count);
    const int place = start;
    // Two lines around a passage, four around a single line, as long as the file has them.
    for (int left = end == start ? 4 : 2; left > 0; --left) {
        if (start > 1) --start, --left;
        if (end < count) ++end, --left;
    }
    std::string out = cat(e.file, ":", place, "\n--------------------\n");
    for (int i = start; i <= end; ++i) {
        const bool marked = std::any_of(e.lines.begin(), e.lines.end(), [i](const auto& l) { return l.first <= i && i <= l.second; });
        char number[16];
        std::snprintf(number, sizeof number, " %3d | ", i);
        out += cat(number, marked ? ">>> " : "    ", lines[static_cast<std::size_t>(i - 1)], "\n");
    }
    return out + "--------------------\n";
}

}  // namespace cobuild::client
