#!/usr/bin/env bash
# Builds the builder image with cobuild itself, from packaging/Dockerfile, as an archive for `docker load`.
#
#   packaging/image.sh NAME ARCHIVE [BASE]
#
# NAME is the image's name; BASE a Debian image in reach (default debian:<this machine's suite>-slim). The packages come from this machine's
# apt sources, so BASE must be of the same suite. COBUILD_BIN names the directory of the programs
# (default build/release/bin). Extra flags for cobuild build: COBUILD_FLAGS.
set -euo pipefail
name=$1 archive=$2
here=$(dirname "$(readlink -f "$0")")
bin=$(readlink -f "${COBUILD_BIN:-$here/../build/release/bin}")
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
base=${3:-debian:$suite-slim}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/packages" "$work/programs"
cp "$bin"/{cobuild,cobuildd,buildctl} "$work/programs/"
strip "$work/programs"/* 2>/dev/null || true

# What the programs are linked with, and what they run.
libraries=$(ldd "$bin/cobuildd" "$bin/buildctl" | awk '$3 ~ /^\// {print $3}' | sort -u | xargs -r -n1 readlink -f | sort -u |
  { xargs -r dpkg-query -S 2>/dev/null || true; } | cut -d: -f1 | sort -u)
wanted="runc containernetworking-plugins iptables ca-certificates $libraries"
# With all they depend on; what every Debian has already is left out.
apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances $wanted |
  awk '/^[a-z0-9]/ {print $1}' | sed 's/:.*//' | sort -u > "$work/closure"
essential=$(dpkg-query -W -f='${Essential} ${Priority} ${Package}\n' | awk '$1 == "yes" || $2 == "required" {print $3}')
for package in $(grep -vxF -e "$essential" "$work/closure" || true); do
  # Of several that could stand for a virtual one, those that this machine has.
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ] || echo "$package"
done > "$work/list"
(cd "$work/packages" && xargs -r apt-get -q -o APT::Sandbox::User=root download < "$work/list" > "$work/download.log" 2>&1) ||
  { tail -5 "$work/download.log" >&2; exit 1; }
"$bin/cobuild" build ${COBUILD_FLAGS:-} --network none --build-arg "BASE=$base" --build-context "packages=$work/packages" --build-context "programs=$work/programs" \
  -t "$name" -o "type=docker,dest=$archive" "$here"
