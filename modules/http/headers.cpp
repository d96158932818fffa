module;
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>

module cobuild.http;

import :internal;

namespace cobuild::http {

namespace beast_http = boost::beast::http;

namespace {

bool same_name(std::string_view a, std::string_view b) { return a.size() == b.size() && to_lower(a) == to_lower(b); }

bool has_token(const headers& h, std::string_view name, std::string_view token) {
    for (const auto value : h.all(name))
        for (const auto part : split(value, ','))
            if (to_lower(trim(part)) == token) return true;
    return false;
}

// A field may repeat only with the same value (RFC 9112 6.3).
std::optional<std::uint64_t> content_length(const headers& h) {
    std::optional<std::uint64_t> out;
    for (const auto text : h.all("content-length")) {
        std::uint64_t n = 0;
        const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
        if (text.empty() || ec != std::errc{} || end != text.data() + text.size() || (out && *out != n))
            throw error{errc::corrupt, cat("the Content-Length ", quoted(text), " makes no sense")};
        out = n;
    }
    return out;
}

void check_field(std::string_view text, std::string_view what) {
    if (text.find_first_of(std::string_view("\r\n\0", 3)) != std::string_view::npos)
        throw error{errc::invalid, cat("a request's ", what, " must not have line breaks")};
}

}  // namespace

void headers::add(std::string_view name, std::string_view value) { all_.push_back({std::string(name), std::string(value)}); }

void headers::set(std::string_view name, std::string_view value) {
    remove(name);
    add(name, value);
}

void headers::remove(std::string_view name) {
    std::erase_if(all_, [&](const header& h) { return same_name(h.name, name); });
}

std::optional<std::string_view> headers::get(std::string_view name) const {
    for (const auto& h : all_)
        if (same_name(h.name, name)) return h.value;
    return std::nullopt;
}

std::vector<std::string_view> headers::all(std::string_view name) const {
    std::vector<std::string_view> out;
    for (const auto& h : all_)
        if (same_name(h.name, name)) out.push_back(h.value);
    return out;
}

std::string response::status_text() const {
    std::string text = reason;
    if (text.empty()) text = std::string(beast_http::obsolete_reason(beast_http::int_to_status(status)));
    return cat(status, ' ', text);
}

std::optional<head> parse_head(std::string_view bytes, std::size_t max_head, std::size_t& consumed) {
    beast_http::response_parser<beast_http::empty_body> parser;
    parser.header_limit(static_cast<std::uint32_t>(max_head));
    parser.body_limit(boost::none);
    parser.skip(true);
    boost::beast::error_code ec;
    consumed = parser.put(boost::asio::buffer(bytes.data(), bytes.size()), ec);
    if (ec == beast_http::error::need_more || (!ec && !parser.is_header_done())) {
        if (bytes.size() >= max_head) throw error{errc::corrupt, cat("the head of its answer is longer than ", max_head, " bytes")};
        return std::nullopt;
    }
    if (ec == beast_http::error::header_limit) throw error{errc::corrupt, cat("the head of its answer is longer than ", max_head, " bytes")};
    if (ec) throw error{errc::corrupt, cat("its answer is not HTTP (", ec.message(), ')')};
    head out;
    const auto& message = parser.get();
    out.answer.status = message.result_int();
    out.answer.reason = std::string(message.reason());
    for (const auto& field : message) out.answer.headers.add(std::string_view(field.name_string()), std::string_view(field.value()));
    const auto& h = out.answer.headers;
    out.keep_alive = message.version() >= 11 ? !has_token(h, "connection", "close") : has_token(h, "connection", "keep-alive");
    if (h.get("transfer-encoding")) {
        if (!has_token(h, "transfer-encoding", "chunked") || h.all("transfer-encoding").size() != 1 ||
            to_lower(trim(*h.get("transfer-encoding"))) != "chunked")
            throw error{errc::corrupt, cat("its Transfer-Encoding ", quoted(*h.get("transfer-encoding")), " is not supported")};
        out.chunked = true;
        if (h.get("content-length")) out.keep_alive = false;  // RFC 9112 6.1: do not trust such a connection further
    } else {
        out.answer.content_length = content_length(h);
    }
    return out;
}

std::string format_head(const request& r, const endpoint& server, bool absolute_target, const std::string& proxy_authorization) {
    check_field(r.method, "method");
    check_field(r.target, "path");
    std::string out = cat(r.method, ' ', absolute_target ? server.origin() : "", r.target, " HTTP/1.1\r\n");
    const auto field = [&](std::string_view name, std::string_view value) {
        check_field(name, "header name");
        check_field(value, "header");
        out.append(name).append(": ").append(value).append("\r\n");
    };
    field("Host", server.authority());
    if (!proxy_authorization.empty()) field("Proxy-Authorization", proxy_authorization);
    for (const auto& h : r.headers)
        if (!same_name(h.name, "host") && !same_name(h.name, "content-length") && !same_name(h.name, "connection")) field(h.name, h.value);
    if (r.body) {
        field("Content-Length", cat(r.body->length));
    } else if (r.method == "POST" || r.method == "PUT" || r.method == "PATCH") {
        field("Content-Length", "0");
    }
    return out.append("\r\n");
}

}  // namespace cobuild::http
