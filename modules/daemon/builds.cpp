module;
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace {
constexpr auto remembered = std::chrono::seconds{10};
}

std::shared_ptr<build_state> builds::add(std::string ref) {
    sweep();
    if (ref.empty()) throw error{errc::invalid, "the build has no ref"};
    if (known_.contains(ref)) throw error{errc::exists, cat("there is a build ", ref, " already")};
    auto made = std::make_shared<build_state>();
    made->ref = made->prefix = ref;
    known_[ref] = made;
    ++begun_;
    if (const auto waiting = awaited_.extract(ref); !waiting.empty()) waiting.mapped()->set();
    return made;
}

async::task<std::shared_ptr<build_state>> builds::get(std::string ref, nanoseconds limit) {
    sweep();
    if (const auto at = known_.find(ref); at != known_.end()) co_return at->second;
    auto& event = awaited_[ref];
    if (!event) event = std::make_shared<async::event>();
    const auto appears = event;
    bool late = false;
    try {
        co_await async::with_deadline(limit, "waiting for the build", appears->wait());
    } catch (const error& e) {
        if (e.kind() != errc::timed_out) throw;
        late = true;
    }
    if (late) awaited_.erase(ref);
    const auto at = known_.find(ref);
    if (at == known_.end()) throw error{errc::not_found, cat("no such job ", ref)};
    co_return at->second;
}

void builds::end(const std::shared_ptr<build_state>& b) {
    b->ended = true;
    b->prepared.set();
    b->job.reset();
    b->refs.clear();
    b->returned.reset();
    b->events->finish();
    ended_.emplace_back(std::chrono::steady_clock::now(), b->ref);
    sweep();
}

void builds::sweep() {
    const auto now = std::chrono::steady_clock::now();
    while (!ended_.empty() && now - ended_.front().first > remembered) {
        known_.erase(ended_.front().second);
        ended_.pop_front();
    }
}

std::size_t builds::running() const {
    std::size_t n = 0;
    for (const auto& [ref, b] : known_) n += b->ended ? 0 : 1;
    return n;
}

}  // namespace cobuild::daemon
