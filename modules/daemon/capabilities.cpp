module;
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "worker.pb.h"

module cobuild.daemon;

import cobuild.oci;
import cobuild.frontend;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1::types;

// The ids are BuildKit's (solver/pb/caps.go, frontend/gateway/pb/caps.go), its misspelling included. Clients send nothing
// that needs one which is not here.

std::vector<std::string> frontend_capabilities() {
    return {"solve.base",
            "solve.inlinereturn",
            "resolveimage",
            "resolveimage.resolvemode",
            "readfile",
            "return",
            "returnmap",
            "readdir",
            "statfile",
            "importcaches",
            "proto.refarray",
            "reference.output",
            "frontend.inputs",
            "gateway.solve.metadata",
            "frontend.caps",
            "gateway.solve.evaluate",
            "gateway.evaluate",
            "gateway.warnings",
            "gateway.exec",
            "gateway.exec.extrahosts",
            "gateway.exec.secretenv",
            "gateway.exec.signals",
            "gateway.exec.filesystem",
            "source.metaresolver"};
}

std::vector<std::string> llb_capabilities() {
    return {"source.image",
            "source.image.resolvemode",
            "source.image.checksum",
            "source.local",
            "source.local.unique",
            "source.local.sessionid",
            "source.local.includepatterns",
            "source.local.followpaths",
            "source.local.excludepatterns",
            "source.local.sharedkeyhint",
            "source.local.differ",
            "source.git",
            "source.git.keepgitdir",
            "source.git.fullurl",
            "source.git.httpauth",
            "source.git.knownsshhosts",
            "source.git.mountsshsock",
            "source.git.subdir",
            "source.git.checksum",
            "source.git.skipsubmodules",
            "source.git.mtime",
            "source.git.fetchbycommit",
            "source.ocilayout",
            "source.http",
            "source.http.auth",
            "source.http.checksum",
            "source.http.perm",
            "soruce.http.uidgid",
            "source.http.header",
            "exec.meta.base",
            "exec.meta.cgroup.parent",
            "exec.meta.network",
            "exec.meta.proxyenv",
            "exec.meta.security",
            "exec.meta.setsdefaultpath",
            "exec.meta.ulimit",
            "exec.mount.bind",
            "exec.mount.bind.readwrite-nooutput",
            "exec.mount.cache",
            "exec.mount.cache.sharing",
            "exec.mount.selector",
            "exec.mount.tmpfs",
            "exec.mount.tmpfs.size",
            "exec.mount.secret",
            "exec.mount.ssh",
            "exec.mount.cache.content",
            "exec.cgroup",
            "exec.secretenv",
            "exec.validexitcode",
            "file.base",
            "file.rm.wildcard",
            "file.rm.nofollowsymlink",
            "file.copy.includeexcludepatterns",
            "file.copy.requiredpaths",
            "file.copy.alwaysreplaceexistingdestpaths",
            "file.symlink.create",
            "constraints",
            "platform",
            "meta.ignorecache",
            "meta.description",
            "meta.exportcache",
            "mergeop",
            "diffop",
            "exporter.image.annotations",
            "exporter.image.attestations",
            "exporter.sourcedateepoch",
            "exporter.multiple",
            "source.policy",
            "source.policy.session"};
}

std::string version_record() {
    wire::BuildkitVersion out;
    out.set_package("cobuild");
    // Clients compare this with BuildKit's versions: the API is that one's.
    out.set_version(cat("v0.32.0+cobuild.", version()));
    out.set_dockerfile_version(std::string(frontend::language_version));
    out.set_revision(std::string(version()));
    return out.SerializeAsString();
}

std::string worker_record(const world& w) {
    wire::WorkerRecord out;
    out.set_id(w.worker_id);
    const auto& oci = w.given.settings.oci;
    auto& labels = *out.mutable_labels();
    labels["org.mobyproject.buildkit.worker.executor"] = "oci";
    labels["org.mobyproject.buildkit.worker.snapshotter"] = oci.snapshotter == "auto" ? "overlayfs" : oci.snapshotter;
    labels["org.mobyproject.buildkit.worker.network"] = std::string(config::to_string(oci.network));
    labels["org.mobyproject.buildkit.worker.oci.process-mode"] = "sandbox";
    labels["org.mobyproject.buildkit.worker.selinux.enabled"] = "false";
    for (const auto& [key, value] : oci.labels) labels[key] = value;
    const auto add = [&out](const oci::platform& p) {
        auto* to = out.add_platforms();
        to->set_os(p.os);
        to->set_architecture(p.architecture);
        to->set_variant(p.variant);
    };
    if (oci.platforms.empty()) add(oci::host_platform());
    for (const auto& text : oci.platforms) add(oci::normalize(oci::parse_platform(text)));
    for (const auto& rule : config::gc_rules(oci.gc, w.disk)) {
        auto* to = out.add_gc_policy();
        to->set_all(rule.all);
        for (const auto& f : rule.filters) to->add_filters(f);
        to->set_keep_duration(rule.keep_duration.count());
        to->set_reserved_space(static_cast<std::int64_t>(rule.reserved_space));
        to->set_max_used_space(static_cast<std::int64_t>(rule.max_used_space));
        to->set_min_free_space(static_cast<std::int64_t>(rule.min_free_space));
    }
    out.mutable_buildkit_version()->ParseFromString(version_record());
    return out.SerializeAsString();
}

}  // namespace cobuild::daemon
