// Blobs at a client, by containerd's Content service over its session.
module;
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

#include "content.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace wire = containerd::services::content::v1;

namespace {

constexpr std::string_view content_info = "/containerd.services.content.v1.Content/Info",
                           content_read = "/containerd.services.content.v1.Content/Read",
                           content_write = "/containerd.services.content.v1.Content/Write";

class remote_blobs final : public session::blob_store {
public:
    remote_blobs(std::shared_ptr<tunnel> t, std::string id) : tunnel_(std::move(t)), id_(std::move(id)) {}

    async::task<std::optional<std::uint64_t>> size(digest which) override {
        wire::InfoRequest q;
        q.set_digest(which.str());
        std::optional<std::string> bytes;
        try {
            bytes = co_await tunnel_->channel->unary(std::string(content_info), q.SerializeAsString(), header());
        } catch (const error& e) {
            if (e.kind() != errc::not_found) throw;
        }
        if (!bytes) co_return std::nullopt;
        wire::InfoResponse r;
        if (!r.ParseFromString(*bytes) || r.info().size() < 0) throw malformed();
        co_return static_cast<std::uint64_t>(r.info().size());
    }

    async::task<void> read(digest which, session::piece_sink to) override {
        const auto s = tunnel_->channel->open(std::string(content_read), header());
        wire::ReadContentRequest q;
        q.set_digest(which.str());
        (void)co_await s->write(q.SerializeAsString());
        co_await s->writes_done();
        while (const auto bytes = co_await s->read()) {
            wire::ReadContentResponse r;
            if (!r.ParseFromString(*bytes)) throw malformed();
            co_await to(std::move(*r.mutable_data()));
        }
        const auto end = co_await s->finish();
        if (!end.ok()) throw rpc::to_error(end).with(cat("reading the blob ", which.str(), " from the client"));
    }

    async::task<void> write(digest which, std::uint64_t size, std::function<async::task<std::string>()> next) override {
        const auto s = tunnel_->channel->open(std::string(content_write), header());
        wire::WriteContentRequest q;
        q.set_action(wire::STAT);
        q.set_ref(cat("cobuild-", which.str()));
        q.set_total(static_cast<std::int64_t>(size));
        q.set_expected(which.str());
        auto answer = co_await exchange(*s, q);
        // Of a transfer that was broken off the client may have a part; it is sent again from the start.
        std::int64_t offset = 0;
        q.clear_ref();
        q.clear_expected();
        while (answer) {
            q.set_action(wire::WRITE);
            *q.mutable_data() = co_await next();
            if (q.data().empty()) break;
            q.set_offset(offset);
            offset += static_cast<std::int64_t>(q.data().size());
            answer = co_await exchange(*s, q);
        }
        if (answer) {
            q.clear_data();
            q.set_action(wire::COMMIT);
            q.set_offset(offset);
            q.set_expected(which.str());
            answer = co_await exchange(*s, q);
        }
        co_await s->writes_done();
        while (co_await s->read()) {
        }
        const auto end = co_await s->finish();
        if (!end.ok() && end.code != rpc::code::already_exists)
            throw rpc::to_error(end).with(cat("sending the blob ", which.str(), " to the client"));
    }

private:
    [[nodiscard]] rpc::metadata header() const { return {{"buildkit-attachable-store-id", id_}}; }
    [[nodiscard]] error malformed() const { return error{errc::corrupt, cat("the client's answer about its store ", id_, " cannot be read")}; }

    /// False: the client ended the call.
    async::task<bool> exchange(rpc::stream& s, const wire::WriteContentRequest& q) const {
        if (!co_await s.write(q.SerializeAsString())) co_return false;
        const auto bytes = co_await s.read();
        if (!bytes) co_return false;
        wire::WriteContentResponse r;
        if (!r.ParseFromString(*bytes)) throw malformed();
        co_return true;
    }

    std::shared_ptr<tunnel> tunnel_;
    std::string id_;
};

}  // namespace

std::shared_ptr<session::blob_store> make_blobs(std::shared_ptr<tunnel> t, std::string id) {
    if (!t || !t->offers(content_info)) return nullptr;
    return std::make_shared<remote_blobs>(std::move(t), std::move(id));
}

}  // namespace cobuild::daemon
