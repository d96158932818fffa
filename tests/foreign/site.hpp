// What the walkthroughs share: an engine, and in it the builder image that cobuild has built of itself. Include before any import.
#pragma once

#include "foreign/engine.hpp"

#include <filesystem>
#include <memory>
#include <string>

namespace cobuild::test {

inline std::string beside(const std::string& name) { return (std::filesystem::path(program()).parent_path() / name).string(); }

/// Made once a test program, at the first use: making the image takes longest.
class site {
public:
    workshop place;
    static constexpr const char* image = "cobuild:local";

    /// Null (with a message) where something is missing that ./dev setup brings.
    static site* get() {
        static bool tried = false;
        if (!tried) {
            tried = true;
            const auto docker = docker_dir();
            const auto parts = std::filesystem::path(docker).parent_path() / "image";
            if (docker.empty() || !docker_registry::available()) return nullptr;
            if (!std::filesystem::exists(parts / "base.tar") || !std::filesystem::exists(parts / "packages")) {
                BOOST_TEST_MESSAGE("skipped: no Debian base and packages in " << parts << " (./dev setup)");
                return nullptr;
            }
            instance().reset(new site(docker, parts));
        }
        return instance().get();
    }
    /// At the end of the program, before its surroundings go.
    struct closer {
        ~closer() { instance().reset(); }
    };

    [[nodiscard]] docker_engine& engine() { return *engine_; }
    outcome must(strings args) { return engine_->must(args); }
    outcome buildx(strings args) {
        args.insert(args.begin(), "buildx");
        return engine_->must(args);
    }
    /// A shell line with docker on the PATH.
    outcome shell_line(const std::string& line) { return run({"sh", "-c", line}, place.options(engine_->environment, std::chrono::seconds(120))); }
    /// A docker-container builder, started; `config` is a text in buildkitd.toml's form.
    void create(const std::string& name, const std::string& config, strings more = {}) {
        const auto file = place.path(name + ".toml");
        write_file(file, config);
        strings args{"create",           "--use",        "--bootstrap",  "--name",   name, "--driver",
                     "docker-container", "--driver-opt", "network=host", "--config", file};
        if (more.empty()) more = {"--driver-opt", std::string("image=") + image};
        args.insert(args.end(), more.begin(), more.end());
        buildx(args);
    }
    /// The registry that stands in for Docker Hub.
    [[nodiscard]] std::string mirrored(const std::string& more = {}) const {
        return "debug = true\n" + more + "[registry.\"docker.io\"]\n  mirrors = [\"" + place.registry().host() + "\"]\n";
    }
    [[nodiscard]] std::string logs(const std::string& builder) { return must({"logs", "buildx_buildkit_" + builder + "0"}).str(); }

private:
    explicit site(const std::string& docker, const std::filesystem::path& parts) {
        place.make_base("busybox");
        write_file(place / "home/.docker/config.json", "{\"cliPluginsExtraDirs\": [\"" + place.path("plugins") + "\"]}");
        const char* other = std::getenv("COBUILD_BUILDX");
        std::filesystem::create_directories(place / "plugins");
        std::filesystem::create_symlink(other != nullptr ? other : docker + "/usr/libexec/docker/cli-plugins/docker-buildx",
                                        place / "plugins/docker-buildx");
        engine_ = std::make_unique<docker_engine>(place, docker, "127.0.0.1 myregistry.com\n");
        // The base comes out of a registry, as everywhere.
        const auto base = place.registry().host() + "/debian:slim";
        std::filesystem::create_directories(place / "base");
        write_file(place / "base/Dockerfile", "FROM scratch\nADD base.tar /\n");
        std::filesystem::create_hard_link(std::filesystem::canonical(parts / "base.tar"), place / "base/base.tar", linked_);
        if (linked_) std::filesystem::copy_file(parts / "base.tar", place / "base/base.tar");
        must_run(place.build("base", {"-t", base, "--push"}), place.options({}, std::chrono::seconds(120)));
        const auto script = (std::filesystem::path(docker).parent_path().parent_path().parent_path() / "packaging/image.sh").string();
        auto made =
            run({"bash", script, image, place.path("image.tar"), base},
                place.options(
                    {"COBUILD_BIN=" + std::filesystem::path(program()).parent_path().string(), "COBUILD_PACKAGES=" + (parts / "packages").string(),
                     "COBUILD_FLAGS=--root " + place.root + " --config " + place.config + " --oci-worker-net=none --progress=plain"},
                    std::chrono::seconds(300)));
        BOOST_REQUIRE_MESSAGE(made.code == 0, made.str());
        engine_->must({"load", "-i", place.path("image.tar")});
        std::filesystem::remove(place / "image.tar");
    }
    static std::unique_ptr<site>& instance() {
        static std::unique_ptr<site> one;
        return one;
    }
    std::error_code linked_;
    std::unique_ptr<docker_engine> engine_;
};

inline bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

}  // namespace cobuild::test
