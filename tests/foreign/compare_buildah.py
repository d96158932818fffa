#!/usr/bin/env python3
"""Builds the same Dockerfiles with cobuild and with buildah and compares trees and configs, entry by entry.

usage: compare_buildah.py COBUILD [CASE...]

Offline, as root; steps run in buildah's chroot isolation and without a network in cobuild. Everything happens in a temporary
directory. A case may list the differences that are known (docs/differences.md says who is right and why): any other
difference, or a known one that is gone, ends the script with code 1.
"""
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile

BUSYBOX = next((p for p in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(p)), None)
ENV = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}


def write(path, content=b"", mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    os.chmod(path, mode)


def make_context(ctx):
    """One context for all cases: odd modes, names, links, attributes."""
    write(f"{ctx}/f", "f\n")
    write(f"{ctx}/g.txt", "g\n", 0o600)
    write(f"{ctx}/h.txt", "h\n", 0o755)
    write(f"{ctx}/odd/arr[0].txt", "bracket\n")
    write(f"{ctx}/tree/a", "a\n", 0o640)
    write(f"{ctx}/tree/run.sh", "#!/bin/sh\n", 0o4755)
    write(f"{ctx}/tree/sub/deep/b.md", "b\n")
    write(f"{ctx}/tree/sub/deep/c.txt", "c\n")
    write(f"{ctx}/tree/.hidden", "h\n")
    os.makedirs(f"{ctx}/tree/empty")
    os.chmod(f"{ctx}/tree/empty", 0o1777)
    os.chmod(f"{ctx}/tree/sub", 0o711)
    os.symlink("sub/deep", f"{ctx}/tree/dirlink")
    os.symlink("/nowhere", f"{ctx}/tree/dangling")
    os.symlink("f", f"{ctx}/flink")
    os.link(f"{ctx}/tree/a", f"{ctx}/tree/a2")
    os.mkfifo(f"{ctx}/tree/pipe", 0o620)
    write(os.fsencode(ctx).decode() + "/names/gr\u00f6\u00dfe \u65e5\u672c", "utf8\n")
    write(os.fsdecode(os.fsencode(ctx) + b"/names/caf\xe9"), "latin1\n")
    write(f"{ctx}/names/" + "n" * 200, "long\n")
    write(f"{ctx}/attr/x", "x\n")
    os.setxattr(f"{ctx}/attr/x", "user.note", b"n")
    write(f"{ctx}/pack/in/z", "z\n", 0o640)
    os.chown(f"{ctx}/pack/in/z", 11, 12)
    for kind, suffix in (("gz", "tar.gz"), ("xz", "tar.xz"), ("bz2", "tar.bz2")):
        with tarfile.open(f"{ctx}/pack.{suffix}", f"w:{kind}") as t:
            t.add(f"{ctx}/pack/in", "in")
    shutil.rmtree(f"{ctx}/pack")
    for root, dirs, files in os.walk(ctx):
        for name in dirs + files:
            os.utime(os.path.join(root, name), (1000000000, 1000000000), follow_symlinks=False)


BASE = """FROM scratch
COPY rootfs /
ENV PATH=/bin
CMD ["sh"]
"""

# What buildah leaves of a chroot step, and its label; every case.
NOISE = {f"{p}: only buildah" for p in ("/dev", "/proc", "/run", "/sys", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf")}
NOISE |= {"config WorkingDir"}  # "/" where the base names none

FAILS = "buildah cannot build it"

# name, Dockerfile, the known differences
CASES = [
    ("files", "FROM scratch\nCOPY f /one\nCOPY f g.txt /two/\nCOPY flink /three\nCOPY flink /four/\n", ()),
    ("tree", "FROM scratch\nCOPY tree /t\n", ("/t: mtime", "/t/run.sh: mode")),
    ("tree-into", "FROM base\nRUN mkdir -m 700 /t && chown 3:4 /t\nCOPY tree /t/\n", ("/t: mtime", "/t/run.sh: mode")),
    ("wildcards", "FROM scratch\nCOPY *.txt /w/\nCOPY tr?e/[ab] /y/\nCOPY *.none f /z/\n", ()),
    ("brackets", "FROM scratch\nCOPY odd/arr[[]0].txt /x/\n", (FAILS,)),
    ("owners", "FROM base\nCOPY --chown=12:34 tree/a /a\nCOPY --chown=guest tree/a /b\nCOPY --chown=guest:users f /new/dir/\nCOPY --chown=7 f /c\n", ()),
    ("modes", "FROM base\nCOPY --chmod=4711 f /a\nCOPY --chmod=750 tree /t\n", ("/t: mode", "/t: mtime")),
    ("names", "FROM scratch\nCOPY names /n\n", ("/n: mtime",)),
    ("attributes", "FROM scratch\nCOPY attr /x\n", ("/x: mtime", "/x/x: xattrs")),
    ("archives", "FROM scratch\nADD pack.tar.gz /gz/\nADD pack.tar.xz /xz\nADD pack.tar.bz2 /bz/\nCOPY pack.tar.gz /kept/\nADD f /plain\n", ()),
    ("stages", "FROM base AS one\nRUN mkdir /d && echo x > /d/x && ln /d/x /d/y && chmod 4755 /d/x && chown 5:6 /d && ln -s /d /l\n"
     "FROM scratch\nCOPY --from=one /d /d\nCOPY --from=one /l/x /through\nCOPY --from=one --chown=8:9 /d /owned\n", ()),
    ("links-in-destination", "FROM base\nRUN mkdir -p /opt/real && ln -s /opt/real /opt/link && echo o > /target && ln -s /target /alias\n"
     "COPY f /opt/link/in/\nCOPY f /opt/link\nCOPY f /alias\n",
     tuple(f"/alias: {x}" for x in ("type", "mode", "link", "mtime", "content")) + ("/target: mtime", "/target: content")),
    ("dangling-destination", "FROM base\nRUN ln -s /not/yet /dangling\nCOPY f /dangling/\n", ()),
    ("deleted", "FROM base\nRUN mkdir -p /d/e && echo 1 > /d/e/f && echo 2 > /d/g\nRUN rm -r /d/e && mkdir /d/e && rm /d/g && rm /bin/vi\n", ()),
    ("workdir", "FROM base\nWORKDIR /a/b\nWORKDIR c\nUSER 5:6\nWORKDIR /u/v\nCOPY f .\n",
     tuple(f"/{p}: only cobuild" for p in ("a", "a/b", "a/b/c")) + tuple(f"/{p}: {x}" for p in ("u", "u/v") for x in ("uid", "gid"))),
    ("ignored", "FROM scratch\nCOPY . /c\n", tuple(f"/c/tree{p}: only cobuild" for p in ("", "/sub", "/sub/deep", "/sub/deep/c.txt"))),
    ("exclusion-order", "FROM scratch\nCOPY tree/sub /s\nCOPY tree/sub/deep/*.txt /s2/\n", ("/s: mtime",)),
    ("inline", "FROM base\nENV A=b\nCOPY <<EOF /in\nA is $A\nEOF\nCOPY <<\"EOF\" /raw\nA is $A\nEOF\nRUN <<EOF\necho run > /ran\nEOF\n", (FAILS,)),
    ("config", "FROM base\nLABEL a=b\nENV X=1 Y=2\nEXPOSE 80/tcp 53/udp\nVOLUME /v\nUSER 1:2\nWORKDIR /w\nSTOPSIGNAL SIGINT\n"
     "HEALTHCHECK --interval=5s CMD true\nENTRYPOINT [\"e\"]\nCMD c d\nSHELL [\"/bin/sh\",\"-ec\"]\nONBUILD RUN x\n", ("/w: only cobuild",)),
]
IGNORE = {"ignored": "*\n!tree/**/*.txt\n!*.txt\ng.txt\n", "exclusion-order": "tree/sub\n!tree/sub/deep\n**/*.md\n"}
CONFIG = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal", "Healthcheck", "Shell", "OnBuild")


def run(args, **more):
    done = subprocess.run(args, capture_output=True, env=ENV, **more)
    if done.returncode != 0:
        text = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{args[0]} failed with {done.returncode}: {text[-1500:]}")


def apply_layer(tree, blob):
    with tarfile.open(fileobj=io.BytesIO(blob), errors="surrogateescape") as tar:
        for m in tar:
            path = "/" + m.name.strip("/").removeprefix("./")
            directory, name = os.path.split(path)
            if name == ".wh..wh..opq":
                for p in [p for p in tree if p.startswith(directory.rstrip("/") + "/")]:
                    del tree[p]
                continue
            if name.startswith(".wh."):
                gone = os.path.join(directory, name[4:])
                for p in [p for p in tree if p == gone or p.startswith(gone + "/")]:
                    del tree[p]
                continue
            if path in ("/", "/."):
                continue
            if m.islnk():
                target = "/" + m.linkname.strip("/").removeprefix("./")
                tree[path] = dict(tree[target], link=target)
                continue
            kind = "dir" if m.isdir() else "file" if m.isreg() else "symlink" if m.issym() else "fifo" if m.isfifo() else "device"
            e = {"type": kind, "mode": oct(m.mode & 0o7777) if kind != "symlink" else "", "uid": m.uid, "gid": m.gid, "link": m.linkname if m.issym() else ""}
            e["xattrs"] = {k: v for k, v in m.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            e["mtime"] = int(m.mtime) == 1000000000  # whether it is the context's time; any other is that of the build
            e["content"] = hashlib.sha256(tar.extractfile(m).read()).hexdigest() if m.isreg() else ""
            if kind != "dir":
                for p in [p for p in tree if p.startswith(path + "/")]:
                    del tree[p]
            tree[path] = e


def read_image(path):
    """An OCI layout in a tar, or a directory as `push dir:` makes it (which keeps what only docker's config knows)."""
    def in_directory(digest):
        with open(os.path.join(path, digest.split(":")[1]), "rb") as f:
            return f.read()

    def assemble(manifest, blob):
        tree = {}
        for layer in manifest["layers"]:
            apply_layer(tree, blob(layer["digest"]))
        config = json.loads(blob(manifest["config"]["digest"])).get("config", {})
        if config.get("Labels"):
            config["Labels"].pop("io.buildah.version", None)
        return tree, {k: config.get(k) for k in CONFIG}

    if os.path.isdir(path):
        with open(os.path.join(path, "manifest.json"), "rb") as f:
            return assemble(json.load(f), in_directory)
    with tarfile.open(path) as tar:
        def in_tar(digest):
            return tar.extractfile("blobs/sha256/" + digest.split(":")[1]).read()
        return assemble(json.loads(in_tar(json.load(tar.extractfile("index.json"))["manifests"][0]["digest"])), in_tar)


def compare(ours, theirs):
    out = {}
    (tree_a, config_a), (tree_b, config_b) = ours, theirs
    for path in sorted(tree_a.keys() | tree_b.keys()):
        a, b = tree_a.get(path), tree_b.get(path)
        if a is None or b is None:
            out[f"{path}: " + ("only buildah" if a is None else "only cobuild")] = ""
            continue
        for field in a:
            if a[field] != b[field]:
                out[f"{path}: {field}"] = f"cobuild {a[field]!r}, buildah {b[field]!r}"
    for key in CONFIG:
        if (config_a[key] or None) != (config_b[key] or None):
            out[f"config {key}"] = f"cobuild {config_a[key]!r}, buildah {config_b[key]!r}"
    return out


class Bench:
    def __init__(self, work, program):
        self.work, self.program = work, program
        write(f"{work}/policy.json", '{"default":[{"type":"insecureAcceptAnything"}]}')
        write(f"{work}/registries.conf", 'unqualified-search-registries = ["docker.io"]\n')
        write(f"{work}/buildkitd.toml")
        ENV["CONTAINERS_REGISTRIES_CONF"] = f"{work}/registries.conf"
        ENV["TMPDIR"] = work
        ENV["BUILDAH_ISOLATION"] = "chroot"
        # Newer buildah raises the number of processes, which a host without CAP_SYS_RESOURCE refuses; old ones leave limits alone.
        version = subprocess.run(["buildah", "--version"], capture_output=True, text=True).stdout.split()[2]
        if tuple(int(n) for n in version.split(".")[:2]) >= (1, 30):
            limits = ", ".join('"%s=%d:%d"' % (n, *resource.getrlimit(r)) for n, r in (("nproc", resource.RLIMIT_NPROC), ("nofile", resource.RLIMIT_NOFILE)))
            write(f"{work}/containers.conf", f"[containers]\ndefault_ulimits = [{limits}]\n")
            ENV["CONTAINERS_CONF"] = f"{work}/containers.conf"
        self.buildah = ["buildah", "--root", f"{work}/b", "--runroot", f"{work}/b.run", "--storage-driver", "vfs"]
        self.ctx = f"{work}/ctx"
        make_context(self.ctx)
        base = f"{work}/base"
        for d in ("bin", "etc", "tmp", "root"):
            os.makedirs(f"{base}/rootfs/{d}")
        shutil.copy(BUSYBOX, f"{base}/rootfs/bin/busybox")
        for applet in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True).stdout.split():
            if applet != "busybox":
                os.symlink("busybox", f"{base}/rootfs/bin/{applet}")
        write(f"{base}/rootfs/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nguest:x:405:100:guest:/tmp:/bin/sh\n")
        write(f"{base}/rootfs/etc/group", "root:x:0:\nusers:x:100:\n")
        os.chmod(f"{base}/rootfs/tmp", 0o1777)
        write(f"{work}/base.Dockerfile", BASE)
        self.build_ours(f"{work}/base.Dockerfile", base, "-t", "base")
        self.build_theirs(f"{work}/base.Dockerfile", base, "docker.io/library/base")

    def build_ours(self, dockerfile, context, *more):
        run([self.program, "build", "--root", f"{self.work}/c", "--config", f"{self.work}/buildkitd.toml", "--oci-worker-net=none",
             "-f", dockerfile, *more, context])

    def build_theirs(self, dockerfile, context, name, *more):
        run([*self.buildah, "bud", "--signature-policy", f"{self.work}/policy.json", "--isolation", "chroot",
             "--pull=never", "--layers", "--format", "docker", "-f", dockerfile, "-t", name, *more, context])

    def case(self, name, text):
        dockerfile = f"{self.work}/{name}.Dockerfile"
        write(dockerfile, text)
        ignore = f"{self.ctx}/.dockerignore"
        if name in IGNORE:
            write(ignore, IGNORE[name])
            os.utime(ignore, (1000000000, 1000000000))
        elif os.path.exists(ignore):
            os.remove(ignore)
        ours, theirs = f"{self.work}/{name}.ours", f"{self.work}/{name}.theirs"
        self.build_ours(dockerfile, self.ctx, "-o", f"type=oci,dest={ours}")
        try:
            self.build_theirs(dockerfile, self.ctx, f"case-{name}")
        except RuntimeError as e:
            return {FAILS: str(e).strip().splitlines()[-1][-200:]}
        run([*self.buildah, "push", "--signature-policy", f"{self.work}/policy.json", "--format", "v2s2", f"case-{name}", f"dir:{theirs}"])
        return compare(read_image(ours), read_image(theirs))


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if BUSYBOX is None or shutil.which("buildah") is None:
        print("skipped: buildah and a static busybox are needed (Debian's buildah and busybox-static)")
        sys.exit(77)
    chosen = sys.argv[2:]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="cobuild-compare-") as work:
        bench = Bench(work, os.path.abspath(sys.argv[1]))
        for name, text, known in CASES:
            if chosen and name not in chosen:
                continue
            found = {k: v for k, v in bench.case(name, text).items() if k not in NOISE}
            new = {k: v for k, v in found.items() if k not in known}
            # What this buildah cannot build, a newer one may.
            gone = [k for k in known if k not in found and k != FAILS]
            wrong += len(new) + len(gone)
            print(f"{name}: " + ("equal" if not found else f"{len(found)} known differences" if not new else f"{len(found)} differ, not known:"))
            for k, v in new.items():
                print(f"    {k}  {v}")
            for k in gone:
                print(f"    known, but gone: {k}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
