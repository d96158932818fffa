module;
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.fs;
import cobuild.json;
import :parts;

namespace cobuild::build {

// Bodies in build.cpp, job.cpp and usage.cpp.
async::task<build_result> run_build(parts& p, build_request request, std::shared_ptr<progress::sink> sink);
async::task<answer> run_ask(parts& p, build_request request, question what, std::shared_ptr<progress::sink> sink);
std::shared_ptr<job> make_job(parts& p, job_options options);
async::task<std::vector<usage_info>> measure_usage(parts& p, std::vector<std::string> filters);
async::task<std::vector<usage_info>> run_prune(parts& p, prune_options options);

namespace {

constexpr std::string_view default_root = "/var/lib/cobuild";

async::task<std::vector<image_info>> list_images(parts& p) {
    co_return co_await p.runtime.pool().run([&p] {
        std::vector<image_info> out;
        for (const auto& i : p.content->list_images()) {
            const auto label = [&](const std::string& key) {
                const auto at = i.labels.find(key);
                return at == i.labels.end() ? std::string() : at->second;
            };
            out.push_back({.name = oci::reference::parse(i.name).familiar(),
                           .digest = i.target.str(),
                           .config_digest = label("config"),
                           .size = std::strtoull(label("size").c_str(), nullptr, 10),
                           .created = i.created});
        }
        return out;
    });
}

async::task<bool> remove_one(parts& p, std::string name) {
    const auto full = oci::reference::parse(name).with_default_tag().str();
    co_return co_await p.runtime.pool().run([&p, &full] { return p.content->remove_image(full); });
}

async::task<std::vector<blob_info>> list_blobs(parts& p) {
    co_return co_await p.runtime.pool().run([&p] {
        std::vector<blob_info> out;
        for (const auto& b : p.content->list()) out.push_back({b.digest.str(), b.size});
        return out;
    });
}

async::task<std::string> read_part(parts& p, std::string id, std::uint64_t offset, std::uint64_t size) {
    constexpr std::uint64_t most = std::uint64_t{4} << 20;
    co_return co_await p.runtime.pool().run([&] {
        const auto held = p.content->hold(digest::parse(id));
        if (!held) throw error{errc::not_found, cat("there is no blob ", id)};
        const auto file = p.content->open(digest::parse(id));
        std::string out(std::min(most, size == 0 ? most : size), '\0');
        std::size_t got = 0;
        while (got < out.size()) {
            const auto n = ::pread(file.get(), out.data() + got, out.size() - got, static_cast<off_t>(offset + got));
            if (n < 0) throw_errno(cat("reading the blob ", id));
            if (n == 0) break;
            got += static_cast<std::size_t>(n);
        }
        out.resize(got);
        return out;
    });
}

async::task<void> reload_registries(parts& p, config::configuration settings) {
    // The rest of the settings stays as it was opened with: only what a registry's strand asks for is replaced.
    co_await p.registry->reload(registry::configured_hosts(settings));
    p.settings.registries = std::move(settings.registries);
}

class engine_impl final : public engine, public std::enable_shared_from_this<engine_impl> {
public:
    explicit engine_impl(config::configuration settings) : parts_(std::make_unique<parts>(std::move(settings))) {}
    ~engine_impl() override {
        // close() was not called, or could not finish. No call is under way: each holds the engine.
        if (!parts_) return;
        try {
            parts_->runtime.block_on(shut_down());
        } catch (const std::exception& e) {
            log(log_level::warning, "the engine did not close cleanly", {{"error", e.what()}});
        }
    }

    async::task<void> start(std::string root, std::string docker_config) {
        parts_->docker_config = std::move(docker_config);
        co_await async::on(parts_->runtime.get_executor(), parts_->open(std::move(root)));
    }

    // None of the calls is a coroutine itself: what they return holds the engine from the beginning.
    async::task<build_result> build(build_request request, std::shared_ptr<progress::sink> sink, async::cancel_token token) override {
        if (!sink) sink = progress::null_sink();
        return enter<build_result>(shared_from_this(),
                                   [request = std::move(request), sink = std::move(sink), token = std::move(token)](parts& p) mutable {
                                       return async::linked(std::move(token), run_build(p, std::move(request), std::move(sink)));
                                   });
    }
    async::task<answer> ask(build_request request, question what, std::shared_ptr<progress::sink> sink, async::cancel_token token) override {
        if (!sink) sink = progress::null_sink();
        return enter<answer>(shared_from_this(),
                             [request = std::move(request), what, sink = std::move(sink), token = std::move(token)](parts& p) mutable {
                                 return async::linked(std::move(token), run_ask(p, std::move(request), what, std::move(sink)));
                             });
    }
    async::task<std::vector<image_info>> images() override { return enter<std::vector<image_info>>(shared_from_this(), list_images); }
    async::task<bool> remove_image(std::string name) override {
        return enter<bool>(shared_from_this(), [name = std::move(name)](parts& p) mutable { return remove_one(p, std::move(name)); });
    }
    async::task<std::vector<usage_info>> usage(std::vector<std::string> filters) override {
        return enter<std::vector<usage_info>>(shared_from_this(),
                                              [filters = std::move(filters)](parts& p) mutable { return measure_usage(p, std::move(filters)); });
    }
    async::task<std::vector<usage_info>> prune(prune_options options) override {
        return enter<std::vector<usage_info>>(shared_from_this(),
                                              [options = std::move(options)](parts& p) mutable { return run_prune(p, std::move(options)); });
    }
    async::task<std::vector<blob_info>> blobs() override { return enter<std::vector<blob_info>>(shared_from_this(), list_blobs); }
    async::task<std::string> read_blob(std::string id, std::uint64_t offset, std::uint64_t size) override {
        return enter<std::string>(shared_from_this(),
                                  [id = std::move(id), offset, size](parts& p) mutable { return read_part(p, std::move(id), offset, size); });
    }
    std::shared_ptr<job> start(job_options options) override { return make_job(*parts_, std::move(options)); }
    async::task<void> reload(config::configuration settings) override {
        return enter<void>(shared_from_this(),
                           [settings = std::move(settings)](parts& p) mutable { return reload_registries(p, std::move(settings)); });
    }
    [[nodiscard]] activity current() const override {
        activity out;
        for (const auto& [domain, use] : parts_->registry->sockets()) out.registries.push_back({domain, use.open, use.peak, use.waiting});
        out.waits = parts_->solver->debug_dump();
        return out;
    }
    void run_frontends_with(frontend_runner runner) override { parts_->frontends = std::move(runner); }
    async::runtime& runtime() override { return parts_->runtime; }
    async::task<void> close() override { return close_once(shared_from_this()); }

private:
    /// One call on the engine, from before it crosses to the engine's thread until its last frame is gone there (or until it
    /// was cancelled on the way): the parts live as long.
    class admission {
    public:
        explicit admission(engine_impl& e) : engine_(&e) {
            const std::lock_guard lock(e.guard_);
            if (e.closed_) throw error{errc::canceled, "the engine was closed"};
            ++e.running_;
        }
        admission(admission&& other) noexcept : engine_(std::exchange(other.engine_, nullptr)) {}
        admission& operator=(admission&&) = delete;
        ~admission() {
            if (engine_ == nullptr) return;
            const std::lock_guard lock(engine_->guard_);
            if (--engine_->running_ == 0 && engine_->closed_) engine_->idle_.set();
        }

    private:
        engine_impl* engine_;
    };

    /// Runs what `make` gives on the engine's thread, so that close() can end and await it.
    template<class T, class Make>
    static async::task<T> enter(std::shared_ptr<engine_impl> self, Make make) {
        admission admitted(*self);
        auto work = async::linked(self->closing_.token(), make(*self->parts_));
        co_return co_await async::on(self->parts_->runtime.get_executor(), counted<T>(std::move(admitted), std::move(work)));
    }

    // The frame's parameters die last to first: the admission after the work.
    template<class T>
    static async::task<T> counted(admission, async::task<T> work) {
        co_return co_await std::move(work);
    }

    static async::task<void> close_once(std::shared_ptr<engine_impl> self) {
        bool first = false;
        {
            const std::lock_guard lock(self->guard_);
            first = !std::exchange(self->closed_, true);
        }
        if (!first) co_return co_await self->over_.wait();
        std::exception_ptr failed;
        try {
            co_await async::on(self->parts_->runtime.get_executor(), self->shut_down());
            self->parts_.reset();
        } catch (...) {
            failed = std::current_exception();
        }
        self->over_.set();
        if (failed) std::rethrow_exception(failed);
    }

    async::task<void> shut_down() {
        co_await async::no_cancel;
        closing_.cancel(error{errc::canceled, "the engine was closed"});
        bool busy = false;
        {
            const std::lock_guard lock(guard_);
            busy = running_ > 0;
        }
        if (busy) co_await idle_.wait();
        co_await parts_->close();
    }

    std::unique_ptr<parts> parts_;
    async::cancel_source closing_;
    std::mutex guard_;  // of what calls and close() settle between threads
    bool closed_ = false;
    std::size_t running_ = 0;
    async::event idle_, over_;
};

}  // namespace

std::filesystem::path state_directory(const engine_options& options) {
    if (!options.root.empty()) return options.root;
    return options.settings.root == config::configuration{}.root ? std::string(default_root) : options.settings.root;
}

async::task<std::shared_ptr<engine>> engine::open(engine_options options) {
    if (::geteuid() != 0)
        throw error{errc::permission, "cobuild needs root to mount layers and set owners, and this is another user (uid " +
                                          std::to_string(::geteuid()) + "); run it as root"};
    std::string root = state_directory(options).string();
    auto out = std::make_shared<engine_impl>(std::move(options.settings));
    co_await out->start(std::move(root), std::move(options.docker_config));
    co_return out;
}

}  // namespace cobuild::build
