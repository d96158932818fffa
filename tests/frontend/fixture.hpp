// A gateway with a few images, and short ways to say what a conversion gave. The last #include of a file: it ends in imports.
#pragma once

#include "support/support.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.json;
import cobuild.llb;
import cobuild.oci;
import cobuild.gateway;
import cobuild.frontend;

namespace frontend_test {

using namespace cobuild;

inline const std::string busybox = R"({"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","author":"them","docker_version":"1",
"config":{"Env":["PATH=/bin","LANG=C"],"Cmd":["sh"],"WorkingDir":""},
"rootfs":{"type":"layers","diff_ids":["sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]},
"history":[{"created":"2024-01-01T00:00:00Z","created_by":"ADD rootfs"}]})";

struct fake_gateway final : gateway::frontend_gateway {
    std::map<std::string, std::string> images{{"docker.io/library/busybox:latest", busybox}};
    std::vector<std::string> asked;
    std::vector<std::string> names;

    async::task<gateway::image_config> resolve_image_config(gateway::resolve_request r) override {
        asked.push_back(cat(r.reference, " ", oci::format(r.platform)));
        names.push_back(r.log_name);
        const auto found = images.find(r.reference);
        if (found == images.end()) throw error{errc::not_found, cat(r.reference, ": not found")};
        co_return gateway::image_config{r.reference, digest::of(r.reference), found->second};
    }
    std::map<std::string, std::string> files;  ///< "context/path"
    async::task<std::optional<std::string>> read_context_file(std::string context, std::string path) override {
        const auto found = files.find(cat(context, "/", path));
        if (found == files.end()) co_return std::nullopt;
        co_return found->second;
    }
};

using adjust = std::function<void(frontend::request&, fake_gateway&)>;

struct outcome {
    frontend::result r;
    llb::loaded graph;
    oci::image image;
    std::vector<std::string> asked;
    std::vector<std::string> names;

    [[nodiscard]] std::vector<std::string> steps() const {
        std::vector<std::string> out;
        for (const auto& v : graph.vertices) out.push_back(llb::display_name(v.what, v.meta));
        return out;
    }
    [[nodiscard]] const llb::vertex& step(std::string_view name) const {
        std::string all;
        for (const auto& v : graph.vertices) {
            const auto shown = llb::display_name(v.what, v.meta);
            if (shown == name) return v;
            all += cat("\n  ", shown);
        }
        BOOST_FAIL("no step called " << name << " but" << all);
        throw 0;
    }
    [[nodiscard]] const llb::exec_op& exec(std::string_view name) const { return std::get<llb::exec_op>(step(name).what.what); }
    [[nodiscard]] const llb::file_op& file(std::string_view name) const { return std::get<llb::file_op>(step(name).what.what); }
    [[nodiscard]] const llb::copy_action& copy(std::string_view name, std::size_t i = 0) const {
        return std::get<llb::copy_action>(file(name).actions.at(i).what);
    }
    [[nodiscard]] const llb::source_op& context() const { return std::get<llb::source_op>(step("[internal] load build context").what.what); }
    [[nodiscard]] std::vector<std::string> history() const {
        std::vector<std::string> out;
        for (const auto& h : image.history) out.push_back(cat(h.created_by, h.empty_layer ? " (empty)" : ""));
        return out;
    }
    [[nodiscard]] std::string warnings() const {
        std::string out;
        for (const auto& w : r.warnings) out += cat(w.rule, ":", w.where.line, " ");
        return out;
    }
};

inline outcome build(std::string dockerfile, const adjust& change = {}) {
    frontend::request r;
    r.dockerfile = std::move(dockerfile);
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    fake_gateway g;
    if (change) change(r, g);
    async::runtime rt;
    outcome o;
    o.r = rt.block_on(frontend::convert(std::move(r), g));
    o.graph = llb::load(o.r.graph);
    o.image = oci::parse_image(o.r.image_config);
    o.asked = g.asked;
    o.names = g.names;
    return o;
}

inline error failure(std::string dockerfile, const adjust& change = {}) {
    try {
        (void)build(std::move(dockerfile), change);
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        return e;
    }
    BOOST_FAIL("the build was accepted");
    throw 0;
}

inline bool says(const error& e, std::string_view part) { return std::string_view(e.what()).find(part) != std::string_view::npos; }

using strings = std::vector<std::string>;

}  // namespace frontend_test
