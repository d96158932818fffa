"""Times cobuild and buildah on the same workloads, interleaved, and prints ratios.

Called by bench/run.sh. Same OCI runtime (runc), network none. Each program has an ext4 of its own (a fresh image on a
loop device), for ext4 is slow at making files for minutes after many were deleted, and buildah deletes its containers;
stores are moved aside rather than deleted between runs. Environment: REPEATS (5), COBUILD (the program), SCRATCH (a
directory on the disk to measure).
"""
import hashlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

COBUILD = os.environ.get("COBUILD", "build/release/bin/cobuild")
REPEATS = int(os.environ.get("REPEATS", "5"))
SCRATCH = os.environ.get("SCRATCH", tempfile.gettempdir())
ALL = ["run1", "run20", "cached20", "ctx20k", "ctx20k-same", "pull", "export"]
GIB = int(os.environ.get("PULL_MIB", "1024")) << 20

work = port = None  # of this run; bench/registry.py sets its own


def disk(name):
    """A fresh ext4 for one program; it vanishes with this script's mount namespace."""
    image, at = os.path.join(work, name + ".ext4"), os.path.join(work, name)
    with open(image, "wb") as f:
        f.truncate(64 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
    os.mkdir(at)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    return at


def tree_rss(pid):
    """Resident bytes of a process and all below it, now."""
    total, todo = 0, [pid]
    while todo:
        p = todo.pop()
        try:
            with open(f"/proc/{p}/statm") as f:
                total += int(f.read().split()[1]) * 4096
            for t in os.listdir(f"/proc/{p}/task"):
                with open(f"/proc/{p}/task/{t}/children") as f:
                    todo += [int(c) for c in f.read().split()]
        except (OSError, ValueError):
            pass
    return total


def timed(argv, env=None):
    """Wall seconds and peak resident bytes of the whole process tree."""
    peak = [0]
    out = open(os.path.join(work, "last.log"), "wb")
    start = time.monotonic()
    child = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env)
    over = threading.Event()

    def watch():
        while not over.wait(0.02):
            peak[0] = max(peak[0], tree_rss(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    took = time.monotonic() - start
    over.set()
    watcher.join()
    if code != 0:
        sys.exit(f"bench: {' '.join(argv)} failed:\n" + open(os.path.join(work, "last.log"), errors="replace").read()[-3000:])
    return took, peak[0]


# ---------------------------------------------------------------- images


def put(path, data, kind="application/octet-stream", method="PUT"):
    request = urllib.request.Request(path, data=data, method=method, headers={"Content-Type": kind})
    return urllib.request.urlopen(request)


def push_blob(repo, data):
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    begin = put(f"http://127.0.0.1:{port}/v2/{repo}/blobs/uploads/", b"", method="POST")
    location = begin.headers["Location"]
    put(location + ("&" if "?" in location else "?") + "digest=" + digest, data)
    return digest, len(data)


def push_image(repo, layers):
    """layers: tar files on disk; each pushed as gzip."""
    diff_ids, blobs = [], []
    for tar in layers:
        with open(tar, "rb") as f:
            diff_ids.append("sha256:" + hashlib.file_digest(f, "sha256").hexdigest())
        packed = subprocess.run(["gzip", "-c", "-n", "-4", tar], check=True, stdout=subprocess.PIPE).stdout
        blobs.append(push_blob(repo, packed))
    config = json.dumps({"architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux",
                         "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
                         "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "bench"} for _ in diff_ids]}).encode()
    config_digest, config_size = push_blob(repo, config)
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind,
                "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config_size},
                "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": d, "size": s} for d, s in blobs]}
    put(f"http://127.0.0.1:{port}/v2/{repo}/manifests/latest", json.dumps(manifest).encode(), kind)


def busybox_tar():
    root = os.path.join(work, "busybox")
    os.makedirs(root + "/bin")
    for d in ("etc", "tmp", "root", "proc", "sys", "dev"):
        os.makedirs(f"{root}/{d}")
    program = shutil.which("busybox")
    shutil.copy(program, root + "/bin/busybox")
    for applet in subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split():
        if applet != "busybox":
            os.symlink("busybox", f"{root}/bin/{applet}")
    with open(root + "/etc/passwd", "w") as f:
        f.write("root:x:0:0:root:/root:/bin/sh\n")
    tar = os.path.join(work, "busybox.tar")
    subprocess.run(["tar", "--sort=name", "-C", root, "-cf", tar, "."], check=True)
    return tar


def big_tars(total, count):
    """Files of this machine's /usr until `total` bytes, spread over `count` layers."""
    lists, size, layer = [[] for _ in range(count)], 0, 0
    for base, dirs, files in os.walk("/usr"):
        dirs.sort()
        for name in sorted(files):
            path = os.path.join(base, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            lists[layer].append(path[1:])
            size += os.path.getsize(path)
            if size > total * (layer + 1) / count:
                layer += 1
            if layer == count:
                break
        if layer == count:
            break
    tars = []
    for i, names in enumerate(lists):
        listing = os.path.join(work, f"big{i}.list")
        with open(listing, "w") as f:
            f.write("\n".join(names))
        tars.append(os.path.join(work, f"big{i}.tar"))
        subprocess.run(["tar", "-C", "/", "-cf", tars[-1], "-T", listing], check=True)
    return tars


# ---------------------------------------------------------------- the two programs


class Cobuild:
    name = "cobuild"

    def __init__(self):
        self.disk = disk("cobuild")
        self.root = os.path.join(self.disk, "root")
        self.config = os.path.join(work, "buildkitd.toml")
        with open(self.config, "w") as f:
            f.write(f'[worker.oci]\nbinary = "runc"\n[registry."docker.io"]\nmirrors = ["127.0.0.1:{port}"]\n')

    def build(self, context, *flags):
        return [COBUILD, "build", "--root", self.root, "--config", self.config, "--oci-worker-net", "none", "--progress", "plain", "-t", "bench", *flags, context]

    def cached(self, context):
        return self.build(context)

    def fresh(self, context):
        return self.build(context, "--no-cache")

    def export(self, context, dest):
        return self.build(context, "-o", f"type=oci,dest={dest}")

    def forget_blobs(self):
        """So that an export compresses anew: a new store, the build repeated untimed."""
        self.aside()

    def aside(self):
        if os.path.exists(self.root):
            os.rename(self.root, f"{self.root}.{time.monotonic_ns()}")

    env = None


class Buildah:
    name = "buildah"

    def __init__(self):
        self.disk = disk("buildah")
        self.root = os.path.join(self.disk, "root")
        conf = os.path.join(work, "registries.conf")
        with open(conf, "w") as f:
            f.write(f'unqualified-search-registries = ["docker.io"]\n[[registry]]\nprefix = "docker.io"\nlocation = "127.0.0.1:{port}"\ninsecure = true\n')
        policy = os.path.join(work, "policy.json")
        with open(policy, "w") as f:
            f.write('{"default":[{"type":"insecureAcceptAnything"}]}')
        self.policy = policy
        os.makedirs(os.path.join(self.disk, "tmp"), exist_ok=True)
        self.env = dict(os.environ, CONTAINERS_REGISTRIES_CONF=conf, TMPDIR=os.path.join(self.disk, "tmp"))

    def base(self):
        return ["buildah", "--root", self.root, "--runroot", self.root + ".run", "--storage-driver", "overlay"]

    def build(self, context, *flags):
        return self.base() + ["bud", "--signature-policy", self.policy, "--layers", "--isolation", "oci", "--runtime", shutil.which("runc"), "--network", "none", "-t", "bench", *flags, context]

    def cached(self, context):
        return self.build(context)

    def fresh(self, context):
        return self.build(context, "--no-cache")

    def export(self, context, dest):
        return self.base() + ["push", "--signature-policy", self.policy, "bench", f"oci-archive:{dest}"]

    def forget_blobs(self):
        pass

    def aside(self):
        subprocess.run(["umount", "-R", os.path.join(self.root, "overlay")], stderr=subprocess.DEVNULL)
        for path in (self.root, self.root + ".run"):
            if os.path.exists(path):
                os.rename(path, f"{path}.{time.monotonic_ns()}")


# ---------------------------------------------------------------- workloads


def context(name, dockerfile, files=None):
    path = os.path.join(work, "ctx-" + name)
    os.makedirs(path, exist_ok=True)
    with open(path + "/Dockerfile", "w") as f:
        f.write(dockerfile)
    for n, text in (files or {}).items():
        os.makedirs(os.path.dirname(os.path.join(path, n)), exist_ok=True)
        with open(os.path.join(path, n), "wb") as f:
            f.write(text)
    return path


def run_workload(name, tool, again):
    """One timed run; `again` is false the first time (then what must be there is made, untimed)."""
    quiet = dict(env=tool.env)
    if name in ("run1", "run20", "cached20"):
        count = 1 if name == "run1" else 20
        path = context(f"run{count}", "FROM busybox\n" + "".join(f"RUN true {i}\n" for i in range(count)))
        if not again:
            timed(tool.build(path), **quiet)
        return timed(tool.cached(path) if name == "cached20" else tool.fresh(path), **quiet)
    if name.startswith("ctx20k"):
        path = context("20k", "FROM busybox\nCOPY files /files/\n")
        if not os.path.exists(path + "/files"):
            for i in range(20000):
                d = f"{path}/files/{i % 200:03}"
                os.makedirs(d, exist_ok=True)
                with open(f"{d}/{i}", "wb") as f:
                    f.write(hashlib.sha256(str(i).encode()).digest() * (1 + i % 64))
            time.sleep(2.1)  # so that their times are old enough to be believed; not part of a measurement
        if name == "ctx20k":
            tool.aside()
            timed(tool.build(context("hello", "FROM busybox\n")), **quiet)
        elif not again:
            timed(tool.build(path), **quiet)
        return timed(tool.cached(path), **quiet)
    if name == "pull":
        tool.aside()
        return timed(tool.build(context("pull", "FROM big\n")), **quiet)
    if name == "export":
        path = context("export", "FROM busybox\nCOPY data /data/\n")
        if not os.path.exists(path + "/data"):
            os.makedirs(path + "/data")
            subprocess.run(["tar", "-C", path + "/data", "-xf", os.path.join(work, "big0.tar")], check=True)
            subprocess.run(["tar", "-C", path + "/data", "-xf", os.path.join(work, "big1.tar")], check=True)
        tool.aside()
        timed(tool.build(path, *(["-o", "type=cacheonly"] if tool.name == "cobuild" else [])), **quiet)
        dest = os.path.join(tool.disk, f"out-{time.monotonic_ns()}.tar")
        return timed(tool.export(path, dest), **quiet)
    sys.exit(f"bench: unknown workload {name} (known: {' '.join(ALL)})")


def runtime_alone(tool):
    """Milliseconds of `runc run` with the bundle that a step of ours has (seccomp profile, mounts, cgroup): the floor under a RUN."""
    out = open(os.path.join(work, "last.log"), "wb")
    build = subprocess.Popen(tool.fresh(context("bundle", "FROM busybox\nRUN sleep 5\n")), stdout=out, stderr=subprocess.STDOUT, env=tool.env)
    spec = None
    while spec is None and build.poll() is None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline") as f:
                    argv = f.read().split("\0")
                if "runc" in argv[0] and "--bundle" in argv:
                    with open(f"/proc/{pid}/root{argv[argv.index('--bundle') + 1]}/config.json") as f:
                        spec = json.load(f)
            except (OSError, ValueError):
                pass
        time.sleep(0.01)
    build.wait()
    bundle = os.path.join(tool.disk, "bundle")
    os.makedirs(bundle)
    shutil.copytree(os.path.join(work, "busybox"), bundle + "/rootfs", symlinks=True)
    spec["process"]["args"] = ["/bin/true"]
    spec["root"]["path"] = "rootfs"
    spec["linux"]["cgroupsPath"] = f"/bench-{os.getpid()}/step"
    for namespace in spec["linux"]["namespaces"]:
        namespace.pop("path", None)
    for mount in spec["mounts"]:
        if mount["source"].endswith(("/hosts", "/resolv.conf")):
            mount["source"] = "/etc/hosts"
    with open(bundle + "/config.json", "w") as f:
        json.dump(spec, f)
    times = []
    for i in range(20):
        start = time.monotonic()
        subprocess.run(["runc", "run", "--bundle", bundle, f"bench-{os.getpid()}-{i}"], check=True, stdin=subprocess.DEVNULL)
        times.append((time.monotonic() - start) * 1000)
    for controller in os.listdir("/sys/fs/cgroup"):
        try:
            os.rmdir(f"/sys/fs/cgroup/{controller}/bench-{os.getpid()}")
        except OSError:
            pass
    return statistics.median(times)


def main():
    global work, port
    work = tempfile.mkdtemp(prefix="cobuild-bench-", dir=SCRATCH)
    names = sys.argv[1:] or ALL
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    config = os.path.join(work, "registry.yml")
    with open(config, "w") as f:
        f.write(f'version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {work}/registry}}}}\nhttp: {{addr: "127.0.0.1:{port}"}}\n')
    registry = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.02)
        push_image("library/busybox", [busybox_tar()])
        if "pull" in names or "export" in names:
            push_image("library/big", big_tars(GIB, 7))
        tools = [Cobuild(), Buildah()]
        floor = runtime_alone(tools[0])
        print(f"runc run of the same bundle: {floor:.1f} ms")
        print(f"{'workload':14}{'cobuild':>22}{'buildah':>22}{'ratio':>8}{'peak MiB':>16}")
        medians = {}
        for name in names:
            took = {t.name: [] for t in tools}
            peak = {t.name: 0 for t in tools}
            for i in range(REPEATS):
                for t in tools:
                    seconds, rss = run_workload(name, t, i > 0)
                    took[t.name].append(seconds)
                    peak[t.name] = max(peak[t.name], rss)
            cell = {n: f"{statistics.median(v):.3f} ({min(v):.3f}-{max(v):.3f})" for n, v in took.items()}
            medians[name] = statistics.median(took["cobuild"])
            ratio = statistics.median(took["buildah"]) / medians[name]
            print(f"{name:14}{cell['cobuild']:>22}{cell['buildah']:>22}{ratio:>8.1f}{peak['cobuild'] >> 20:>8}/{peak['buildah'] >> 20}", flush=True)
        if "run20" in medians and "run1" in medians:
            step = (medians["run20"] - medians["run1"]) / 19 * 1000
            print(f"each added RUN true: {step:.1f} ms, the runtime alone {floor:.1f} ms")
    finally:
        registry.send_signal(signal.SIGTERM)
        registry.wait()
        for name in ("cobuild", "buildah"):
            subprocess.run(["umount", "-R", os.path.join(work, name)], stderr=subprocess.DEVNULL)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
