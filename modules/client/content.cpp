module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "content.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

namespace api = containerd::services::content::v1;

constexpr std::size_t piece_size = std::size_t{1} << 20;

/// A blob of one of the lent layouts. The digest was parsed, so its hex digits are no way out of the directory.
unique_fd open_blob(const std::filesystem::path& layout, const digest& d) {
    const auto file = layout / "blobs" / "sha256" / d.hex();
    unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)};
    if (!fd && errno == ENOENT) throw error{errc::not_found, cat("content ", d.str(), ": not found in ", layout.string())};
    if (!fd) throw_errno(cat("opening ", file.string()));
    return fd;
}

std::filesystem::path layout_of(const session_options& what, const rpc::metadata& m) {
    const auto id = rpc::value(m, "buildkit-attachable-store-id");
    if (const auto written = what.stores.find(id); written != what.stores.end()) return written->second;
    const auto found = what.oci_layouts.find(id);
    if (found == what.oci_layouts.end()) throw error{errc::not_found, cat("this client has no OCI layout of the id ", quoted(id))};
    return found->second;
}

async::task<std::string> tell(std::filesystem::path layout, async::blocking_pool& pool, std::string request) {
    const auto which = digest::parse(decode<api::InfoRequest>(request).digest());
    const auto info = co_await pool.run([layout, which] { return *fs::stat_at(open_blob(layout, which).get(), ""); });
    api::InfoResponse answer;
    answer.mutable_info()->set_digest(which.str());
    answer.mutable_info()->set_size(static_cast<std::int64_t>(info.size));
    answer.mutable_info()->mutable_created_at()->set_seconds(info.mtime.seconds);
    answer.mutable_info()->mutable_updated_at()->set_seconds(info.mtime.seconds);
    co_return answer.SerializeAsString();
}

}  // namespace

async::task<rpc::status> serve_blob_info(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto layout = layout_of(*what, c->request());
    co_return co_await rpc::unary(c, [layout, &pool](std::string request) { return tell(layout, pool, std::move(request)); });
}

async::task<rpc::status> serve_blob(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto layout = layout_of(*what, c->request());
    const auto request = co_await c->read();
    if (!request) co_return rpc::status{rpc::code::invalid_argument, "the request is missing", {}};
    const auto q = decode<api::ReadContentRequest>(*request);
    const auto which = digest::parse(q.digest());
    if (q.offset() < 0 || q.size() < 0) throw error{errc::invalid, "a negative offset or size of a blob was asked for"};
    const auto fd = std::make_shared<unique_fd>(co_await pool.run([layout, which] { return open_blob(layout, which); }));
    std::int64_t at = q.offset();
    std::int64_t left = q.size() == 0 ? INT64_MAX : q.size();
    while (left > 0) {
        auto data = co_await pool.run([fd, at, left] {
            std::string out(std::min<std::uint64_t>(piece_size, static_cast<std::uint64_t>(left)), '\0');
            const auto n = ::pread(fd->get(), out.data(), out.size(), at);
            if (n < 0) throw_errno("reading a blob");
            out.resize(static_cast<std::size_t>(n));
            return out;
        });
        if (data.empty()) break;
        api::ReadContentResponse answer;
        answer.set_offset(at);
        at += static_cast<std::int64_t>(data.size());
        left -= static_cast<std::int64_t>(data.size());
        answer.set_data(std::move(data));
        co_await c->write(answer.SerializeAsString());
    }
    co_return rpc::status{};
}

}  // namespace cobuild::client
