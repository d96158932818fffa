/// Every message's fields once, in number order, with BuildKit's number and name: what the encoder, the decoder and the
/// JSON dump walk. A visitor has
///   (number, name, member)                        scalar, text, message, list or map by the member's type
///   wrapped(number, name, inner, member)          an integer or boolean that stands alone in a message, as field 1 `inner`
///   alternative<T>(number, name, variant)         one case of a oneof
///   group(name, f)                                f's fields under one JSON key; nothing on the wire
module;
#include <concepts>
#include <cstdint>
#include <type_traits>

module cobuild.llb:fields;

import :ops;

namespace cobuild::llb {

template<class M, class T>
concept of = std::same_as<std::remove_const_t<M>, T>;

template<class A, of<platform> M>
void fields(A& a, M& m) {
    a(1, "Architecture", m.architecture);
    a(2, "OS", m.os);
    a(3, "Variant", m.variant);
    a(4, "OSVersion", m.os_version);
    a(5, "OSFeatures", m.os_features);
}
template<class A, of<input> M>
void fields(A& a, M& m) {
    a(1, "digest", m.vertex);
    a(2, "index", m.index);
}
template<class A, of<host_ip> M>
void fields(A& a, M& m) {
    a(1, "Host", m.host);
    a(2, "IP", m.ip);
}
template<class A, of<ulimit> M>
void fields(A& a, M& m) {
    a(1, "Name", m.name);
    a(2, "Soft", m.soft);
    a(3, "Hard", m.hard);
}
template<class A, of<proxy_env> M>
void fields(A& a, M& m) {
    a(1, "http_proxy", m.http);
    a(2, "https_proxy", m.https);
    a(3, "ftp_proxy", m.ftp);
    a(4, "no_proxy", m.no);
    a(5, "all_proxy", m.all);
}
template<class A, of<exec_meta> M>
void fields(A& a, M& m) {
    a(1, "args", m.args);
    a(2, "env", m.env);
    a(3, "cwd", m.cwd);
    a(4, "user", m.user);
    a(5, "proxy_env", m.proxy);
    a(6, "extraHosts", m.extra_hosts);
    a(7, "hostname", m.hostname);
    a(9, "ulimit", m.ulimits);
    a(10, "cgroupParent", m.cgroup_parent);
    a(11, "removeMountStubsRecursive", m.remove_mount_stubs_recursive);
    a(12, "validExitCodes", m.valid_exit_codes);
}
template<class A, of<tmpfs_opt> M>
void fields(A& a, M& m) {
    a(1, "size", m.size);
}
template<class A, of<cache_opt> M>
void fields(A& a, M& m) {
    a(1, "ID", m.id);
    a(2, "sharing", m.sharing);
}
template<class A, of<secret_opt> M>
void fields(A& a, M& m) {
    a(1, "ID", m.id);
    a(2, "uid", m.uid);
    a(3, "gid", m.gid);
    a(4, "mode", m.mode);
    a(5, "optional", m.optional);
}
template<class A, of<mount> M>
void fields(A& a, M& m) {
    a(1, "input", m.input);
    a(2, "selector", m.selector);
    a(3, "dest", m.dest);
    a(4, "output", m.output);
    a(5, "readonly", m.readonly);
    a(6, "mountType", m.type);
    a(19, "TmpfsOpt", m.tmpfs);
    a(20, "cacheOpt", m.cache);
    a(21, "secretOpt", m.secret);
    a(22, "SSHOpt", m.ssh);
    a(23, "resultID", m.result_id);
    a(24, "contentCache", m.content);
}
template<class A, of<secret_env> M>
void fields(A& a, M& m) {
    a(1, "ID", m.id);
    a(2, "name", m.name);
    a(3, "optional", m.optional);
}
template<class A, of<cdi_device> M>
void fields(A& a, M& m) {
    a(1, "name", m.name);
    a(2, "optional", m.optional);
}
template<class A, of<exec_op> M>
void fields(A& a, M& m) {
    a(1, "meta", m.meta);
    a(2, "mounts", m.mounts);
    a(3, "network", m.network);
    a(4, "security", m.security);
    a(5, "secretenv", m.secret_envs);
    a(6, "cdiDevices", m.devices);
}
template<class A, of<source_op> M>
void fields(A& a, M& m) {
    a(1, "identifier", m.identifier);
    a(2, "attrs", m.attrs);
}
template<class A, of<named_user> M>
void fields(A& a, M& m) {
    a(1, "name", m.name);
    a(2, "input", m.input);
}
template<class A, of<user_opt> M>
void fields(A& a, M& m) {
    a.template alternative<named_user>(1, "byName", m);
    a.template alternative<std::uint32_t>(2, "byID", m);
}
template<class A, of<chown_opt> M>
void fields(A& a, M& m) {
    a(1, "user", m.user);
    a(2, "group", m.group);
}
template<class A, of<copy_action> M>
void fields(A& a, M& m) {
    a(1, "src", m.src);
    a(2, "dest", m.dest);
    a(3, "owner", m.owner);
    a(4, "mode", m.mode);
    a(5, "followSymlink", m.follow_symlink);
    a(6, "dirCopyContents", m.dir_copy_contents);
    a(7, "attemptUnpackDockerCompatibility", m.attempt_unpack);
    a(8, "createDestPath", m.create_dest_path);
    a(9, "allowWildcard", m.allow_wildcard);
    a(10, "allowEmptyWildcard", m.allow_empty_wildcard);
    a(11, "timestamp", m.timestamp);
    a(12, "include_patterns", m.include_patterns);
    a(13, "exclude_patterns", m.exclude_patterns);
    a(14, "alwaysReplaceExistingDestPaths", m.always_replace_existing);
    a(15, "modeStr", m.mode_str);
    a(16, "required_paths", m.required_paths);
}
template<class A, of<mkfile_action> M>
void fields(A& a, M& m) {
    a(1, "path", m.path);
    a(2, "mode", m.mode);
    a.binary(3, "data", m.data);
    a(4, "owner", m.owner);
    a(5, "timestamp", m.timestamp);
}
template<class A, of<mkdir_action> M>
void fields(A& a, M& m) {
    a(1, "path", m.path);
    a(2, "mode", m.mode);
    a(3, "makeParents", m.make_parents);
    a(4, "owner", m.owner);
    a(5, "timestamp", m.timestamp);
}
template<class A, of<rm_action> M>
void fields(A& a, M& m) {
    a(1, "path", m.path);
    a(2, "allowNotFound", m.allow_not_found);
    a(3, "allowWildcard", m.allow_wildcard);
}
template<class A, of<symlink_action> M>
void fields(A& a, M& m) {
    a(1, "oldpath", m.oldpath);
    a(2, "newpath", m.newpath);
    a(3, "owner", m.owner);
    a(4, "timestamp", m.timestamp);
}
template<class A, of<file_action> M>
void fields(A& a, M& m) {
    a(1, "input", m.input);
    a(2, "secondaryInput", m.secondary_input);
    a(3, "output", m.output);
    a.group("Action", [&] {
        a.template alternative<copy_action>(4, "copy", m.what);
        a.template alternative<mkfile_action>(5, "mkfile", m.what);
        a.template alternative<mkdir_action>(6, "mkdir", m.what);
        a.template alternative<rm_action>(7, "rm", m.what);
        a.template alternative<symlink_action>(8, "symlink", m.what);
    });
}
template<class A, of<file_op> M>
void fields(A& a, M& m) {
    a(2, "actions", m.actions);
}
template<class A, of<merge_op> M>
void fields(A& a, M& m) {
    a.wrapped(1, "inputs", "input", m.inputs);
}
template<class A, of<diff_op> M>
void fields(A& a, M& m) {
    a.wrapped(1, "lower", "input", m.lower);
    a.wrapped(2, "upper", "input", m.upper);
}
template<class A, of<passthrough_op> M>
void fields(A& a, M& m) {
    a(1, "id", m.id);
    a(2, "outputs", m.outputs);
}
template<class A, of<build_op> M>
void fields(A& a, M& m) {
    a(1, "builder", m.builder);
    a.wrapped(2, "inputs", "input", m.inputs);
    a(3, "def", m.def);
    a(4, "attrs", m.attrs);
}
template<class A, of<worker_constraints> M>
void fields(A& a, M& m) {
    a(1, "filter", m.filter);
}
template<class A, of<op> M>
void fields(A& a, M& m) {
    a(1, "inputs", m.inputs);
    a.group("Op", [&] {
        a.template alternative<exec_op>(2, "exec", m.what);
        a.template alternative<source_op>(3, "source", m.what);
        a.template alternative<file_op>(4, "file", m.what);
        a.template alternative<build_op>(5, "build", m.what);
        a.template alternative<merge_op>(6, "merge", m.what);
        a.template alternative<diff_op>(7, "diff", m.what);
        a.template alternative<passthrough_op>(8, "passthrough", m.what);
    });
    a(10, "platform", m.platform);
    a(11, "constraints", m.constraints);
}

template<class A, of<progress_group> M>
void fields(A& a, M& m) {
    a(1, "id", m.id);
    a(2, "name", m.name);
    a(3, "weak", m.weak);
}
template<class A, of<linux_resources> M>
void fields(A& a, M& m) {
    a(1, "memory", m.memory);
    a(2, "memorySwap", m.memory_swap);
    a(3, "cpuShares", m.cpu_shares);
    a(4, "cpuPeriod", m.cpu_period);
    a(5, "cpuQuota", m.cpu_quota);
    a(6, "cpusetCpus", m.cpuset_cpus);
    a(7, "cpusetMems", m.cpuset_mems);
}
template<class A, of<op_metadata> M>
void fields(A& a, M& m) {
    a(1, "ignore_cache", m.ignore_cache);
    a(2, "description", m.description);
    a.wrapped(4, "export_cache", "Value", m.export_cache);
    a(5, "caps", m.caps);
    a(6, "progress_group", m.progress_group);
    a(7, "linux_resources", m.linux_resources);
}
template<class A, of<position> M>
void fields(A& a, M& m) {
    a(1, "line", m.line);
    a(2, "character", m.character);
}
template<class A, of<range> M>
void fields(A& a, M& m) {
    a(1, "start", m.start);
    a(2, "end", m.end);
}
template<class A, of<location> M>
void fields(A& a, M& m) {
    a(1, "sourceIndex", m.source_index);
    a(2, "ranges", m.ranges);
}
template<class A, of<locations> M>
void fields(A& a, M& m) {
    a(1, "locations", m.list);
}
template<class A, of<source_info> M>
void fields(A& a, M& m) {
    a(1, "filename", m.filename);
    a.binary(2, "data", m.data);
    a(3, "definition", m.definition);
    a(4, "language", m.language);
}
template<class A, of<source_map> M>
void fields(A& a, M& m) {
    a(1, "locations", m.locations);
    a(2, "infos", m.infos);
}
template<class A, of<definition> M>
void fields(A& a, M& m) {
    a.binary(1, "def", m.ops);
    a(2, "metadata", m.metadata);
    a(3, "Source", m.source);
}

}  // namespace cobuild::llb
