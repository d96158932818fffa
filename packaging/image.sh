#!/usr/bin/env bash
# Builds the builder image with cobuild itself, from packaging/Dockerfile, as an archive for `docker load`.
#
#   packaging/image.sh NAME ARCHIVE [BASE]
#
# NAME is the image's name; BASE a Debian image in reach (default debian:<this machine's suite>-slim), of this machine's suite, as the
# packages are. COBUILD_PACKAGES names a directory that holds them already (packaging/packages.sh makes one); without it they
# come from this machine's apt sources. COBUILD_BIN is the directory of the programs (default build/release/bin), COBUILD_FLAGS extra
# flags for cobuild build.
set -euo pipefail
name=$1 archive=$2
here=$(dirname "$(readlink -f "$0")")
bin=$(readlink -f "${COBUILD_BIN:-$here/../build/release/bin}")
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
base=${3:-debian:$suite-slim}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/programs"
for program in cobuild cobuildd buildctl; do strip -o "$work/programs/$program" "$bin/$program"; done

packages=${COBUILD_PACKAGES:-}
if [ -z "$packages" ]; then
  packages=$work/packages
  # What the programs are linked with.
  libraries=$(ldd "$bin/cobuild" "$bin/cobuildd" "$bin/buildctl" | awk '$3 ~ /^\// {print $3}' | sort -u | xargs -r -n1 readlink -f | sort -u |
    { xargs -r dpkg-query -S 2>/dev/null || true; } | cut -d: -f1 | sort -u)
  "$here/packages.sh" "$packages" $libraries
fi
"$bin/cobuild" build ${COBUILD_FLAGS:-} --network none --build-arg "BASE=$base" --build-context "packages=$packages" --build-context "programs=$work/programs" \
  -t "$name" -o "type=docker,dest=$archive" "$here"
