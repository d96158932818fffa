module;
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.progress;

namespace cobuild::progress {

namespace {

time_point now() { return std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now()); }

class function_sink final : public sink {
public:
    explicit function_sink(std::function<void(const event&)> f) : f_(std::move(f)) {}
    void on_event(const event& what) override { f_(what); }

private:
    std::function<void(const event&)> f_;
};

class forgetting_sink final : public sink {
public:
    void on_event(const event&) override {}
};

}  // namespace

std::shared_ptr<sink> make_sink(std::function<void(const event&)> f) { return std::make_shared<function_sink>(std::move(f)); }
std::shared_ptr<sink> null_sink() { return std::make_shared<forgetting_sink>(); }
digest internal_id(std::string_view scope, std::string_view name) { return digest::of(cat(scope, '\n', name)); }

void line::update(std::int64_t current) { update(current, now_.total); }

void line::update(std::int64_t current, std::int64_t total) {
    if (!sink_) return;
    now_.current = current;
    now_.total = total;
    now_.timestamp = now();
    sink_->on_event(now_);
}

void line::done() {
    if (!sink_) return;
    if (now_.total > 0) now_.current = now_.total;
    now_.timestamp = now();
    now_.completed = now_.timestamp;
    sink_->on_event(now_);
}

writer::writer(std::shared_ptr<sink> out, vertex about) : out_(std::move(out)), about_(std::move(about)) {}

void writer::send() const {
    if (out_) out_->on_event(about_);
}

void writer::announce() { send(); }

void writer::started() {
    about_.started = now();
    about_.completed.reset();
    about_.cached = false;
    about_.canceled = false;
    about_.error.clear();
    send();
}

void writer::completed() {
    about_.completed = now();
    if (!about_.started) about_.started = about_.completed;
    send();
}

void writer::cached() {
    about_.started = now();
    about_.completed = about_.started;
    about_.cached = true;
    send();
}

void writer::failed(const error& why) {
    about_.completed = now();
    if (!about_.started) about_.started = about_.completed;
    about_.canceled = why.kind() == errc::canceled;
    about_.error = why.what();
    send();
}

void writer::rename(std::string name) {
    about_.name = std::move(name);
    send();
}

line writer::begin(std::string id, std::int64_t total) const {
    line out;
    out.sink_ = out_;
    out.now_.id = std::move(id);
    out.now_.vertex = about_.id;
    out.now_.total = total;
    out.now_.timestamp = now();
    out.now_.started = out.now_.timestamp;
    if (out_) out_->on_event(out.now_);
    return out;
}

void writer::output(progress::stream stream, std::string data) const {
    if (out_) out_->on_event(log{.vertex = about_.id, .stream = stream, .data = std::move(data), .timestamp = now()});
}

void writer::warn(warning what) const {
    what.vertex = about_.id;
    if (out_) out_->on_event(what);
}

}  // namespace cobuild::progress
