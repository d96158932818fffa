module;
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

module cobuild.async;

namespace cobuild::async {

namespace asio = boost::asio;

struct cancel_token::registration::entry {
    std::recursive_mutex guard;  // held during the call, which may destroy its own registration
    std::function<void()> call;
    void fire() {
        const std::lock_guard lock(guard);
        if (const auto f = std::exchange(call, nullptr)) f();
    }
    void drop() {
        const std::lock_guard lock(guard);
        call = nullptr;
    }
};

struct cancel_token::state {
    std::mutex guard;
    std::optional<error> cause;
    std::vector<std::weak_ptr<registration::entry>> entries;

    std::vector<std::weak_ptr<registration::entry>> take(error why) {
        const std::lock_guard lock(guard);
        if (cause) return {};
        cause = std::move(why);
        return std::exchange(entries, {});
    }
    static void fire(const std::vector<std::weak_ptr<registration::entry>>& all) {
        for (const auto& e : all)
            if (const auto live = e.lock()) live->fire();
    }
};

cancel_token::registration::~registration() {
    if (entry_) entry_->drop();
}

cancel_token::registration& cancel_token::registration::operator=(registration&& other) noexcept {
    if (entry_) entry_->drop();
    entry_ = std::move(other.entry_);
    return *this;
}

bool cancel_token::cancelled() const noexcept {
    if (!state_) return false;
    const std::lock_guard lock(state_->guard);
    return state_->cause.has_value();
}

std::optional<error> cancel_token::cause() const {
    if (!state_) return std::nullopt;
    const std::lock_guard lock(state_->guard);
    return state_->cause;
}

void cancel_token::throw_if_cancelled() const {
    if (auto why = cause()) throw std::move(*why);
}

cancel_token::registration cancel_token::on_cancel(std::function<void()> f) const {
    registration out;
    if (!state_) return out;
    out.entry_ = std::make_shared<registration::entry>();
    out.entry_->call = std::move(f);
    {
        const std::lock_guard lock(state_->guard);
        if (!state_->cause) {
            std::erase_if(state_->entries, [](const auto& e) { return e.expired(); });
            state_->entries.push_back(out.entry_);
            return out;
        }
    }
    out.entry_->fire();
    return out;
}

cancel_source::cancel_source() : state_(std::make_shared<cancel_token::state>()) {}

cancel_token cancel_source::token() const {
    cancel_token out;
    out.state_ = state_;
    return out;
}

void cancel_source::cancel(error cause) { cancel_token::state::fire(state_->take(std::move(cause))); }

namespace detail {

namespace {
/// Runs `t` on `ex`; cancellation of the caller and of the token both reach it, always emitted on `ex`.
task<void> run_apart(executor ex, cancel_token token, task<void> t) {
    auto here = co_await current_executor;
    auto signal = std::make_shared<asio::cancellation_signal>();
    const auto emit = [ex, signal] { asio::post(ex, [signal] { signal->emit(asio::cancellation_type::terminal); }); };
    const auto registration = token.on_cancel(emit);
    co_await asio::async_initiate<const asio::use_awaitable_t<>, void(std::exception_ptr)>(
        [&](auto handler) {
            auto slot = asio::get_associated_cancellation_slot(handler);
            if (slot.is_connected()) slot.assign([emit](asio::cancellation_type) { emit(); });
            auto shared = std::make_shared<decltype(handler)>(std::move(handler));
            asio::co_spawn(ex, std::move(t),
                           asio::bind_cancellation_slot(signal->slot(), [shared, signal, here, slot](std::exception_ptr failed) mutable {
                               asio::dispatch(here, [shared = std::move(shared), failed, slot]() mutable {
                                   if (slot.is_connected()) slot.clear();
                                   auto h = std::move(*shared);
                                   h(failed);
                               });
                           }));
        },
        use_task);
}
}  // namespace

task<void> linked_void(cancel_token token, task<void> t) {
    std::exception_ptr failed;
    try {
        co_await run_apart(co_await current_executor, token, std::move(t));
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return;
    if (auto cause = token.cause(); cause && describe(failed).kind() == errc::canceled) throw std::move(*cause);
    std::rethrow_exception(failed);
}

task<void> deadline_void(nanoseconds limit, std::string what, task<void> t) {
    auto source = std::make_shared<cancel_source>();
    asio::steady_timer timer(co_await current_executor, limit);
    timer.async_wait([source, what = std::move(what), limit](boost::system::error_code ec) {
        if (!ec) source->cancel(error{errc::timed_out, cat(what, " took longer than ", format_duration(limit))});
    });
    co_await linked_void(source->token(), std::move(t));
}

task<void> on_void(executor ex, task<void> t) { co_await run_apart(std::move(ex), cancel_token{}, std::move(t)); }

}  // namespace detail

task<void> sleep_for(nanoseconds d) {
    asio::steady_timer timer(co_await current_executor, d);
    co_await timer.async_wait(use_task);
}

}  // namespace cobuild::async
