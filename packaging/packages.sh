#!/usr/bin/env bash
# Downloads what the builder image installs, as files: the OCI runtime, CNI plugins, iptables, certificates, the packages named, and
# all they depend on. From this machine's own apt sources.
#
#   packaging/packages.sh DIRECTORY PACKAGE...
set -euo pipefail
into=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$into"
# What every Debian has already is left out.
apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
  runc containernetworking-plugins iptables ca-certificates "$@" |
  awk '/^[a-z0-9]/ {print $1}' | sed 's/:.*//' | sort -u > "$work/closure"
essential=$(dpkg-query -W -f='${Essential} ${Priority} ${Package}\n' | awk '$1 == "yes" || $2 == "required" {print $3}')
for package in $(grep -vxF -e "$essential" "$work/closure" || true); do
  # Of several that could stand for a virtual one, those that this machine has.
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ] || echo "$package"
done > "$work/list"
(cd "$into" && xargs -r apt-get -q -o APT::Sandbox::User=root download < "$work/list" > "$work/download.log" 2>&1) ||
  { tail -5 "$work/download.log" >&2; exit 1; }
