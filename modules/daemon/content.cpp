module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "content.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace wire = containerd::services::content::v1;

namespace {

constexpr std::uint64_t chunk = std::uint64_t{1} << 20;

/// The history's blobs are apart from those of images and layers.
bool of_history(const rpc::call& c) { return rpc::value(c.request(), "containerd-namespace").ends_with("_history"); }

/// What a client sends, or the empty message.
template<class M>
async::task<M> request_of(std::shared_ptr<rpc::call> c) {
    const auto bytes = co_await c->read();
    M out;
    if (bytes && !out.ParseFromString(*bytes)) throw error{errc::invalid, "the request cannot be read"};
    co_return out;
}

async::task<rpc::status> list(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    (void)co_await request_of<wire::ListContentRequest>(c);
    std::vector<std::pair<std::string, std::uint64_t>> all;
    if (of_history(*c))
        all = co_await w->history.blobs();
    else
        for (const auto& b : co_await w->given.engine->blobs()) all.emplace_back(b.digest, b.size);
    wire::ListContentResponse out;
    for (const auto& [id, size] : all) {
        auto* info = out.add_info();
        info->set_digest(id);
        info->set_size(static_cast<std::int64_t>(size));
        if (out.info_size() < 1000) continue;
        co_await c->write(out.SerializeAsString());
        out.Clear();
    }
    if (out.info_size() > 0) co_await c->write(out.SerializeAsString());
    co_return rpc::status{};
}

/// The size of a blob; throws errc::not_found.
async::task<std::uint64_t> size_of(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c, std::string id) {
    if (of_history(*c)) {
        const auto parsed = digest::try_parse(id);
        const auto bytes = parsed ? co_await w->history.read_blob(*parsed) : std::nullopt;
        if (!bytes) throw error{errc::not_found, cat("there is no blob ", id)};
        co_return bytes->size();
    }
    for (const auto& b : co_await w->given.engine->blobs())
        if (b.digest == id) co_return b.size;
    // As BuildKit: who names no namespace finds those of records as well.
    if (const auto parsed = digest::try_parse(id))
        if (const auto bytes = co_await w->history.read_blob(*parsed)) co_return bytes->size();
    throw error{errc::not_found, cat("there is no blob ", id)};
}

async::task<rpc::status> info(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    const auto asked = co_await request_of<wire::InfoRequest>(c);
    wire::InfoResponse out;
    out.mutable_info()->set_digest(asked.digest());
    out.mutable_info()->set_size(static_cast<std::int64_t>(co_await size_of(w, c, asked.digest())));
    co_await c->write(out.SerializeAsString());
    co_return rpc::status{};
}

async::task<std::string> part(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c, std::string id, std::uint64_t offset, std::uint64_t size) {
    const auto parsed = digest::try_parse(id);
    const auto bytes = parsed ? co_await w->history.read_blob(*parsed) : std::nullopt;
    if (!bytes && !of_history(*c)) co_return co_await w->given.engine->read_blob(std::move(id), offset, size);
    if (!bytes) throw error{errc::not_found, cat("there is no blob ", id)};
    co_return offset < bytes->size() ? bytes->substr(offset, size) : std::string();
}

async::task<rpc::status> read(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    const auto asked = co_await request_of<wire::ReadContentRequest>(c);
    if (asked.offset() < 0 || asked.size() < 0) throw error{errc::invalid, "offset and size of a blob's part are not negative"};
    auto offset = static_cast<std::uint64_t>(asked.offset());
    auto left = asked.size() == 0 ? UINT64_MAX : static_cast<std::uint64_t>(asked.size());
    while (left > 0) {
        auto data = co_await part(w, c, asked.digest(), offset, std::min(left, chunk));
        if (data.empty()) break;
        wire::ReadContentResponse out;
        out.set_offset(static_cast<std::int64_t>(offset));
        offset += data.size();
        left -= std::min<std::uint64_t>(left, data.size());
        out.set_data(std::move(data));
        co_await c->write(out.SerializeAsString());
    }
    co_return rpc::status{};
}

}  // namespace

method content_method(std::string_view name) {
    static const std::map<std::string, method, std::less<>> known{{"Info", info}, {"List", list}, {"Read", read}};
    const auto at = known.find(name);
    return at == known.end() ? method{} : at->second;
}

}  // namespace cobuild::daemon
