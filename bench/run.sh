#!/usr/bin/env bash
# Whole-program figures: cobuild against Debian's buildah on the same work, in one run. ./dev bench [WORKLOAD...], or
# ./dev bench registry: pulls against skopeo and buildah.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
[ "$(id -u)" = 0 ] || { echo "bench: needs root" >&2; exit 1; }
# A network of its own with nothing but loopback: no port clashes, nothing leaves the machine.
if [ -z "${COBUILD_BENCH_INSIDE:-}" ]; then
  COBUILD_BENCH_INSIDE=1 exec unshare --net --mount --propagation private "$0" "$@"
fi
ip link set lo up
if [ "${1:-}" = registry ]; then
  shift
  exec python3 bench/registry.py "$@"
fi
exec python3 bench/compare.py "$@"
