"""Times pulls of 12 layers of 100 MiB by cobuild, skopeo and buildah: over loopback, through TLS, and over a bad link.

./dev bench registry. Two kinds of work. "get" brings the layers as they are into files (ours: bench_fetch, on import
cobuild.registry; skopeo copy to dir:). "pull" unpacks them too (cobuild build of FROM alone; buildah pull). The bad link is
the relay of tests/support, the same for everybody: 50 ms for the first bytes of an answer and for each MiB, as a long way
with a window of 1 MiB is felt; a stall of half a second after each 20 MiB; a cut after each 60 MiB of a connection.
Everything lies in SCRATCH (/dev/shm if it has room, for the network and not the disk is measured). Environment: REPEATS
(3), BIN (build/release/bin), LAYERS, LAYER_MIB.
"""
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import compare

BIN = os.environ.get("BIN", "build/release/bin")
REPEATS = int(os.environ.get("REPEATS", "3"))
LAYERS = int(os.environ.get("LAYERS", "12"))
MIB = int(os.environ.get("LAYER_MIB", "100"))
LINK = ["50", str(1 << 20), "500", str(20 << 20), str(60 << 20)]


def free_port():
    import socket
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
    s.close()
    return port


def certificate(at):
    """An authority and a certificate of 127.0.0.1."""
    def openssl(*args):
        subprocess.run(["openssl", *args], check=True, capture_output=True)
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=bench", "-keyout", at + "/ca.key", "-out", at + "/ca.crt")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=server", "-keyout", at + "/server.key", "-out", at + "/server.csr")
    with open(at + "/ext", "w") as f:
        f.write("subjectAltName=IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", at + "/server.csr", "-CA", at + "/ca.crt", "-CAkey", at + "/ca.key", "-CAcreateserial", "-extfile", at + "/ext", "-out", at + "/server.crt")


def registry(work, port, tls):
    config = f"{work}/registry-{port}.yml"
    with open(config, "w") as f:
        f.write(f'version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {work}/registry}}}}\nhttp:\n  addr: "127.0.0.1:{port}"\n')
        if tls:
            f.write(f"  tls: {{certificate: {work}/server.crt, key: {work}/server.key}}\n")
    child = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import socket
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return child
        except OSError:
            time.sleep(0.02)
    sys.exit("bench: docker-registry does not start")


def layers(work):
    """Tar files of which gzip saves about half."""
    tars = []
    for i in range(LAYERS):
        data = f"{work}/data"
        os.makedirs(data)
        for j in range(8):
            with open(f"{data}/{i}-{j}", "wb") as f:
                for _ in range(MIB * 2 // 16):
                    f.write(os.urandom(1 << 20) + bytes(1 << 20))
        tars.append(f"{work}/layer{i}.tar")
        subprocess.run(["tar", "-C", data, "-cf", tars[-1], "."], check=True)
        shutil.rmtree(data)
    return tars


class Runs:
    def __init__(self, work):
        self.work, self.count = work, 0

    def place(self, name):
        self.count += 1
        path = f"{self.work}/{name}{self.count}"
        os.makedirs(path)
        return path

    def cobuild_get(self, host, tls):
        return [f"{BIN}/bench_fetch", "get", host, "big", self.place("get")] + ([f"{self.work}/ca.crt"] if tls else []), None

    def skopeo_get(self, host, tls):
        certs = self.place("certs")
        shutil.copy(f"{self.work}/ca.crt", certs)
        trust = ["--src-cert-dir", certs] if tls else ["--src-tls-verify=false"]
        return ["skopeo", "--policy", f"{self.work}/policy.json", "copy", "-q", "--retry-times", "10", *trust, f"docker://{host}/big:latest", "dir:" + self.place("skopeo")], None

    def cobuild_pull(self, host, tls):
        root, context = self.place("root"), self.place("context")
        with open(context + "/Dockerfile", "w") as f:
            f.write(f"FROM {host}/big\n")
        with open(context + "/c.toml", "w") as f:
            f.write(f'[registry."{host}"]\n' + (f'ca = ["{self.work}/ca.crt"]\n' if tls else "http = true\n"))
        return [f"{BIN}/cobuild", "build", "--root", root, "--config", context + "/c.toml", "--oci-worker-net", "none", "--oci-worker-snapshotter", "overlayfs", "--progress", "plain", context], None

    def buildah_pull(self, host, tls):
        root, certs = self.place("buildah"), self.place("certs")
        shutil.copy(f"{self.work}/ca.crt", certs)
        trust = ["--cert-dir", certs] if tls else ["--tls-verify=false"]
        env = dict(os.environ, TMPDIR=self.place("tmp"))
        return ["buildah", "--root", root, "--runroot", root + "/run", "--storage-driver", "overlay", "pull", "-q", "--retry", "10", "--signature-policy", f"{self.work}/policy.json", *trust, f"docker://{host}/big:latest"], env

    def clear(self):
        for name in os.listdir(self.work):
            path = f"{self.work}/{name}"
            if os.path.isdir(path) and name != "registry":
                subprocess.run(["umount", "-R", path + "/overlay"], stderr=subprocess.DEVNULL)
                shutil.rmtree(path, ignore_errors=True)


def main():
    room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    base = os.environ.get("SCRATCH") or ("/dev/shm" if room > LAYERS * MIB * 6 << 20 else tempfile.gettempdir())
    work = compare.work = tempfile.mkdtemp(prefix="cobuild-bench-", dir=base)
    children = []
    try:
        certificate(work)
        with open(f"{work}/policy.json", "w") as f:
            f.write('{"default":[{"type":"insecureAcceptAnything"}]}')
        plain, secure = free_port(), free_port()
        children += [registry(work, plain, False), registry(work, secure, True)]
        compare.port = plain
        tars = layers(work)
        compare.push_image("big", tars)
        for t in tars:
            os.remove(t)
        link = subprocess.Popen([f"{BIN}/bench_relay", str(plain), *LINK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(link)
        bad = int(link.stdout.readline())
        runs = Runs(work)
        ways = [("loopback", f"127.0.0.1:{plain}", False), ("tls", f"127.0.0.1:{secure}", True), ("bad link", f"127.0.0.1:{bad}", False)]
        if len(sys.argv) > 1:
            ways = [w for w in ways if w[0] in sys.argv[1:]]
        blobs = []
        for base, _, files in os.walk(f"{work}/registry/docker/registry/v2/blobs"):
            blobs += [f"{base}/{f}" for f in files if f == "data" and os.path.getsize(f"{base}/{f}") > 1 << 20]
        floor = statistics.median(compare.timed([f"{BIN}/bench_fetch", "floor", *blobs])[0] for _ in range(REPEATS))
        print(f"{len(blobs)} layers, {sum(map(os.path.getsize, blobs)) >> 20} MiB as they travel; hash and inflate alone: {floor:.2f} s")
        print(f"{'':10}{'get: cobuild':>20}{'skopeo':>20}{'ratio':>7}{'pull: cobuild':>20}{'buildah':>20}{'ratio':>7}{'of floor':>9}  peak MiB of the four")
        kinds = [runs.cobuild_get, runs.skopeo_get, runs.cobuild_pull, runs.buildah_pull]
        for name, host, tls in ways:
            took, peak = [[] for _ in kinds], [0] * len(kinds)
            for _ in range(REPEATS):
                for i, kind in enumerate(kinds):
                    argv, env = kind(host, tls)
                    seconds, rss = compare.timed(argv, env)
                    took[i].append(seconds)
                    peak[i] = max(peak[i], rss)
                    runs.clear()
            m = [statistics.median(t) for t in took]
            cell = [f"{statistics.median(t):.2f} ({min(t):.2f}-{max(t):.2f})" for t in took]
            print(f"{name:10}{cell[0]:>20}{cell[1]:>20}{m[1] / m[0]:>7.2f}{cell[2]:>20}{cell[3]:>20}{m[3] / m[2]:>7.2f}{m[2] / floor:>9.2f}  {' '.join(str(p >> 20) for p in peak)}", flush=True)
    finally:
        for c in children:
            c.send_signal(signal.SIGTERM)
            c.wait()
        subprocess.run(f"umount -R {work}/*/overlay", shell=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
