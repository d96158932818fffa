// The writing half of what a client lends as content: blobs that a daemon puts into a directory named for it.
module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

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
namespace stdfs = std::filesystem;

/// A blob on its way: it gets its name when it is whole and what its digest says.
class incoming {
public:
    incoming(const stdfs::path& layout, const digest& expected) : directory_(layout / "blobs" / "sha256"), expected_(expected) {
        std::error_code failed;
        stdfs::create_directories(directory_, failed);
        if (failed) throw os_error(failed.value(), cat("making ", directory_.string()));
        temporary_ = directory_ / cat(".", random_id());
        file_ = unique_fd{::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644)};
        if (!file_) throw_errno(cat("writing ", temporary_.string()));
    }
    ~incoming() {
        if (file_) ::unlink(temporary_.c_str());
    }
    incoming(const incoming&) = delete;
    incoming& operator=(const incoming&) = delete;

    void write(std::string_view data) {
        fs::write_all(file_.get(), bytes_of(data));
        sum_.update(bytes_of(data));
        size_ += data.size();
    }
    void commit(std::uint64_t size) {
        const auto is = sum_.finish();
        if (size_ != size || is != expected_)
            throw error{errc::invalid, cat("the blob ", expected_.str(), " came as ", is.str(), " with ", size_, " of ", size, " bytes")};
        if (::fsync(file_.get()) != 0 || ::rename(temporary_.c_str(), (directory_ / expected_.hex()).c_str()) != 0)
            throw_errno(cat("writing the blob ", expected_.str()));
        file_.reset();
    }
    [[nodiscard]] std::uint64_t size() const noexcept { return size_; }

private:
    stdfs::path directory_, temporary_;
    digest expected_;
    unique_fd file_;
    hasher sum_;
    std::uint64_t size_ = 0;
};

bool is_there(const stdfs::path& layout, const digest& d) {
    std::error_code ignored;
    return stdfs::is_regular_file(layout / "blobs" / "sha256" / d.hex(), ignored);
}

}  // namespace

async::task<rpc::status> serve_blob_write(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto id = rpc::value(c->request(), "buildkit-attachable-store-id");
    const auto place = what->stores.find(id);
    if (place == what->stores.end()) throw error{errc::not_found, cat("this client has no store of the id ", quoted(id), " to write to")};
    const auto layout = place->second;
    std::shared_ptr<incoming> blob;
    std::uint64_t total = 0;
    std::optional<digest> expected;
    for (bool first = true;; first = false) {
        const auto bytes = co_await c->read();
        if (!bytes) co_return rpc::status{};  // given up: what came of it goes
        const auto q = decode<api::WriteContentRequest>(*bytes);
        if (first && q.ref().empty()) throw error{errc::invalid, "the first message of a blob must have a reference"};
        if (!q.expected().empty()) expected = digest::parse(q.expected());
        if (!expected) throw error{errc::invalid, "a blob without a digest is not taken"};
        if (q.total() > 0) total = static_cast<std::uint64_t>(q.total());
        if (first && co_await pool.run([&] { return is_there(layout, *expected); }))
            co_return rpc::status{rpc::code::already_exists, cat("blob with expected digest ", expected->str(), " exists"), {}};
        if (!blob) blob = co_await pool.run([&] { return std::make_shared<incoming>(layout, *expected); });
        if (q.action() != api::STAT) {
            if (q.offset() != 0 && static_cast<std::uint64_t>(q.offset()) != blob->size())
                throw error{errc::invalid, cat("write @", q.offset(), " must occur at current offset ", blob->size())};
            co_await pool.run([&] { blob->write(q.data()); });
        }
        if (q.action() == api::COMMIT) co_await pool.run([&] { blob->commit(total); });
        api::WriteContentResponse answer;
        answer.set_action(q.action());
        answer.set_offset(static_cast<std::int64_t>(blob->size()));
        answer.set_total(static_cast<std::int64_t>(total));
        if (q.action() == api::COMMIT) answer.set_digest(expected->str());
        co_await c->write(answer.SerializeAsString());
        if (q.action() == api::COMMIT) co_return rpc::status{};
    }
}

}  // namespace cobuild::client
