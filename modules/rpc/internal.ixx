/// Internal to cobuild.rpc: what both roles share. (gRPC's own types stand in grpc.hpp, for the bodies alone.)
module;
#include <memory>

#include <boost/asio/awaitable.hpp>

module cobuild.rpc:internal;

import cobuild.base;
import cobuild.async;

namespace cobuild::rpc {

/// One operation that was given to gRPC and has not come back: at most one of a kind at a time. On the io thread.
class operation {
public:
    /// False while one is under way.
    [[nodiscard]] bool idle() const noexcept { return !done_ || done_->is_set(); }
    void begin() { done_ = std::make_shared<async::event>(); }
    void end(bool ok) {
        ok_ = ok;
        if (done_) done_->set();
    }
    /// How the one that was begun last ended; a caller that was cancelled while it waited leaves it under way.
    async::task<bool> ended() {
        const auto done = done_;
        if (done) co_await done->wait();
        co_return ok_;
    }

private:
    std::shared_ptr<async::event> done_;
    bool ok_ = true;
};

/// gRPC's own log lines go where ours go; called before the first use.
void set_up_grpc();

}  // namespace cobuild::rpc
