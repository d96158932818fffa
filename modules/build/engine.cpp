module;
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
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

// Bodies in build.cpp and usage.cpp.
async::task<build_result> run_build(parts& p, build_request request, std::shared_ptr<progress::sink> sink);
async::task<std::vector<usage_info>> measure_usage(parts& p);
async::task<std::vector<usage_info>> run_prune(parts& p, prune_options options);

namespace {

constexpr std::string_view default_root = "/var/lib/cobuild";

class engine_impl final : public engine, public std::enable_shared_from_this<engine_impl> {
public:
    explicit engine_impl(config::configuration settings) : parts_(std::make_unique<parts>(std::move(settings))) {}
    ~engine_impl() override {
        // close() was not called: cancel what runs and wait for it here, on the destroying thread.
        if (parts_) parts_->runtime.block_on(shut_down());
    }

    async::task<void> start(std::string root, std::string docker_config) {
        parts_->docker_config = std::move(docker_config);
        co_await async::on(parts_->runtime.get_executor(), parts_->open(std::move(root)));
    }

    async::task<build_result> build(build_request request, std::shared_ptr<progress::sink> sink, async::cancel_token token) override {
        if (!sink) sink = progress::null_sink();
        co_return co_await enter(async::linked(std::move(token), run_build(*parts_, std::move(request), std::move(sink))));
    }

    async::task<std::vector<image_info>> images() override { co_return co_await enter(list_images()); }
    async::task<bool> remove_image(std::string name) override { co_return co_await enter(remove_one(std::move(name))); }
    async::task<std::vector<usage_info>> usage() override { co_return co_await enter(measure_usage(*parts_)); }
    async::task<std::vector<usage_info>> prune(prune_options options) override { co_return co_await enter(run_prune(*parts_, std::move(options))); }

    async::task<void> close() override {
        auto self = shared_from_this();
        if (!parts_) co_return;
        co_await async::on(parts_->runtime.get_executor(), shut_down());
        auto dead = std::move(parts_);
    }

private:
    /// Runs `work` on the engine's thread, counted, so that close() can end and await it.
    template<class T>
    async::task<T> enter(async::task<T> work) {
        if (!parts_ || closing_.token().cancelled()) throw error{errc::canceled, "the engine was closed"};
        auto self = shared_from_this();
        co_return co_await async::on(parts_->runtime.get_executor(), counted<T>(async::linked(closing_.token(), std::move(work))));
    }

    template<class T>
    async::task<T> counted(async::task<T> work) {
        ++running_;
        std::exception_ptr failed;
        std::optional<T> out;
        try {
            out.emplace(co_await std::move(work));
        } catch (...) {
            failed = std::current_exception();
        }
        if (--running_ == 0 && idle_) idle_->set();
        if (failed) std::rethrow_exception(failed);
        co_return std::move(*out);
    }

    async::task<void> shut_down() {
        closing_.cancel(error{errc::canceled, "the engine was closed"});
        if (running_ > 0) {
            idle_.emplace();
            co_await idle_->wait();
        }
        co_await parts_->close();
    }

    async::task<std::vector<image_info>> list_images() {
        co_return co_await parts_->runtime.pool().run([this] {
            std::vector<image_info> out;
            for (const auto& i : parts_->content->list_images()) {
                const auto label = [&](const std::string& key) {
                    const auto at = i.labels.find(key);
                    return at == i.labels.end() ? std::string() : at->second;
                };
                out.push_back({.name = oci::reference::parse(i.name).familiar(), .digest = i.target.str(), .config_digest = label("config"),
                               .size = std::strtoull(label("size").c_str(), nullptr, 10), .created = i.created});
            }
            return out;
        });
    }

    async::task<bool> remove_one(std::string name) {
        const auto full = oci::reference::parse(name).with_default_tag().str();
        co_return co_await parts_->runtime.pool().run([this, &full] { return parts_->content->remove_image(full); });
    }

    std::unique_ptr<parts> parts_;
    async::cancel_source closing_;
    std::size_t running_ = 0;
    std::optional<async::event> idle_;
};

}  // namespace

async::task<std::shared_ptr<engine>> engine::open(engine_options options) {
    if (::geteuid() != 0)
        throw error{errc::permission, "cobuild needs root to mount layers and set owners, and this is another user (uid " + std::to_string(::geteuid()) + "); run it as root"};
    std::string root = options.root.string();
    // BuildKit's own default directory is never shared with BuildKit.
    if (root.empty()) root = options.settings.root == config::configuration{}.root ? std::string(default_root) : options.settings.root;
    auto out = std::make_shared<engine_impl>(std::move(options.settings));
    co_await out->start(std::move(root), std::move(options.docker_config));
    co_return out;
}

}  // namespace cobuild::build
