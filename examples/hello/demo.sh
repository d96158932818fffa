#!/usr/bin/env bash
# A first image from nothing: a registry, a base image and a network of its own, one build, the image run, the build again.
# Needs root and what `./dev setup` installs; asks nothing of the outside world and leaves nothing behind.
#
#     COBUILD=build/dev/bin/cobuild examples/hello/demo.sh    with another program than the release build's
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
cobuild=$(readlink -m "${COBUILD:-$here/../../build/release/bin/cobuild}")
export PATH="$PATH:/usr/sbin:/sbin"
unset BUILDKIT_PROGRESS SOURCE_DATE_EPOCH DOCKER_DEFAULT_PLATFORM  # all of them change what a build does

bold='' plain=''
if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi
say() { printf '\n%s==> %s%s\n' "$bold" "$*" "$plain"; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

# ---------------------------------------------------------------- what is needed

[ "$(id -u)" = 0 ] || die "this needs root, for it mounts file systems and makes network links: sudo $0"
[ -x "$cobuild" ] || die "there is no program $cobuild: run './dev build release' first, or set COBUILD"
plugins=/usr/lib/cni
for program in docker-registry runc umoci jq ip busybox; do
  command -v $program > /dev/null || die "$program is missing: run './dev setup'"
done
for plugin in bridge host-local; do
  [ -x $plugins/$plugin ] || die "the CNI plugin $plugins/$plugin is missing: run './dev setup'"
done
busybox=$(command -v busybox)
case $(ldd "$busybox" 2>&1 || true) in
  *"=>"*) die "$busybox is not the static one: run './dev setup' (Debian's busybox-static)" ;;
esac

# ---------------------------------------------------------------- leaving nothing

work='' registry='' child='' copier='' link='' forwarding='' stopped=''

# Ends one of our own processes: TERM, and KILL after five seconds.
end() {
  local try
  [ -n "$1" ] || return 0
  kill -TERM "$1" 2> /dev/null || true
  for ((try = 0; try < 50; ++try)); do
    kill -0 "$1" 2> /dev/null || break
    sleep 0.1
  done
  kill -KILL "$1" 2> /dev/null || true
  wait "$1" 2> /dev/null || true
}

clean_up() {
  local code=$? try
  trap '' INT TERM HUP
  trap - EXIT
  set +e
  # A Ctrl-C reached the child as well; a second signal would cut its own cleaning short.
  if [ -n "$child" ] && [ "$stopped" = INT ]; then
    for ((try = 0; try < 100; ++try)); do
      kill -0 "$child" 2> /dev/null || break
      sleep 0.1
    done
  fi
  end "$child"
  if [ -n "$copier" ]; then wait "$copier" 2> /dev/null; fi
  if [ -n "$work" ]; then runc --root "$work/runc" delete --force cobuild-demo-$$ > /dev/null 2>&1; fi
  end "$registry"
  if [ -n "$link" ]; then ip link delete "$link" 2> /dev/null; fi
  # The bridge plugin lets the machine forward packets, for a gateway's sake.
  if [ "$forwarding" = 0 ]; then echo 0 > /proc/sys/net/ipv4/ip_forward; fi
  if [ -n "$work" ]; then rm -rf "$work"; fi
  if [ -n "$stopped" ]; then echo "demo: stopped, and everything removed" >&2; fi
  exit $code
}
trap clean_up EXIT
trap 'stopped=INT; exit 130' INT
trap 'stopped=TERM; exit 143' TERM
trap 'stopped=HUP; exit 129' HUP

# Runs a program so that a signal is acted on while it runs; its error output is shown and kept in $work/log.
run() {
  local code=0
  rm -f "$work/pipe"
  mkfifo "$work/pipe"
  tee -i "$work/log" < "$work/pipe" >&2 &
  copier=$!
  "$@" 2> "$work/pipe" &
  child=$!
  wait $child || code=$?
  child=''
  wait $copier
  copier=''
  return $code
}

# The same, with every command shown as one could type it.
show() {
  printf '$ cobuild'
  printf ' %s' "$@"
  printf '\n'
  run "$cobuild" "$@" --config "$work/buildkitd.toml" --root "$work/root"
}

work=$(mktemp -d "${TMPDIR:-/tmp}/cobuild-demo.XXXXXX")
cd "$here/../.."

# ---------------------------------------------------------------- a registry

say "a registry on loopback"
cat > "$work/registry.yml" <<YAML
version: 0.1
log: {level: info, formatter: text, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $work/registry}}
http: {addr: "127.0.0.1:0"}
YAML
docker-registry serve "$work/registry.yml" > "$work/registry.log" 2>&1 &
registry=$!
address=''
for ((try = 0; try < 200; ++try)); do
  address=$(sed -n 's/.*listening on \(127\.0\.0\.1:[0-9]*\).*/\1/p' "$work/registry.log" | head -1)
  [ -z "$address" ] || break
  kill -0 $registry 2> /dev/null || break
  sleep 0.1
done
[ -n "$address" ] || die "the registry did not start: $(tail -3 "$work/registry.log")"
echo "$address, process $registry"

# ---------------------------------------------------------------- a network

say "a network for the steps and a buildkitd.toml"
why=''
for n in 0 1 2 3 4 5 6 7 8 9; do
  subnet=10.88.$((99 + n))
  if [ -n "$(ip -4 -o addr show to $subnet.0/24)$(ip -4 route show root $subnet.0/24)" ]; then
    why="$subnet.0/24 is in use"
  # Made here, so that two demos at once never share one; the plugin takes a bridge that is there.
  elif why=$(ip link add cobuild-demo$n type bridge 2>&1); then
    link=cobuild-demo$n
    break
  fi
done
[ -n "$link" ] || die "no bridge could be made: $why; 'ip link delete cobuild-demo0' removes what a killed demo left"
forwarding=$(cat /proc/sys/net/ipv4/ip_forward)
cat > "$work/network.conflist" <<JSON
{
  "cniVersion": "1.0.0",
  "name": "$link",
  "plugins": [
    {
      "type": "bridge", "bridge": "$link", "isGateway": true, "ipMasq": false,
      "ipam": {
        "type": "host-local", "dataDir": "$work/addresses",
        "ranges": [[{"subnet": "$subnet.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]
      }
    }
  ]
}
JSON
cat > "$work/buildkitd.toml" <<TOML
[registry."docker.io"]
mirrors = ["$address"]

[worker.oci]
networkMode = "cni"
cniConfigPath = "$work/network.conflist"
cniBinaryPath = "$plugins"
TOML
cat "$work/buildkitd.toml"

# ---------------------------------------------------------------- a base image

say "a base image from $busybox, pushed to the registry"
mkdir -p "$work"/base/rootfs/{bin,etc,proc,root,sys,tmp,usr/bin}
chmod 1777 "$work/base/rootfs/tmp"
cp "$busybox" "$work/base/rootfs/bin/busybox"
for applet in $("$busybox" --list); do
  [ -e "$work/base/rootfs/bin/$applet" ] || ln -s busybox "$work/base/rootfs/bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh' > "$work/base/rootfs/etc/passwd"
echo 'root:x:0:' > "$work/base/rootfs/etc/group"
printf '%s\n' 'FROM scratch' 'COPY rootfs /' 'ENV PATH=/usr/bin:/bin' 'CMD ["sh"]' > "$work/base/Dockerfile"
# In a state directory of its own, so that the build below really pulls it.
run "$cobuild" build -t "$address/library/busybox:latest" --push --progress=plain "$work/base" --config "$work/buildkitd.toml" --root "$work/base-root"

# ---------------------------------------------------------------- the build

say "the build; its base comes through the mirror, its steps run on the bridge $link"
show build -t hello --progress=plain examples/hello
grep -q "inet $subnet\.[0-9]*/24" "$work/log" || die "no step had an address of $subnet.0/24"
gateway=$(ip -4 -o addr show dev "$link" | awk '{ print $4 }')
summary=$(tail -1 "$work/log")
say "what came of it"
echo "step   eth0 had $(grep -o "inet $subnet\.[0-9]*/24" "$work/log" | head -1 | cut -d' ' -f2), the bridge $link has $gateway"
echo "image  $summary"
show images

# ---------------------------------------------------------------- the image, run

say "the image, unpacked and run by runc"
show build -q -o "type=oci,dest=$work/hello.tar" examples/hello
mkdir "$work/layout"
tar -xf "$work/hello.tar" -C "$work/layout"
# An image is found in a layout by its ref.name; ours went without a name.
jq '.manifests[0].annotations["org.opencontainers.image.ref.name"] = "hello"' "$work/layout/index.json" > "$work/index.json"
mv "$work/index.json" "$work/layout/index.json"
umoci unpack --image "$work/layout:hello" "$work/bundle" > /dev/null
jq '.process.terminal = false' "$work/bundle/config.json" > "$work/config.json"
mv "$work/config.json" "$work/bundle/config.json"
echo '$ runc run hello'
runc --root "$work/runc" run --bundle "$work/bundle" cobuild-demo-$$ < /dev/null | tee "$work/greeting"
grep -q '^Hello' "$work/greeting" || die "the image did not greet"

# ---------------------------------------------------------------- again

say "the same build again"
show build -t hello --progress=plain examples/hello
again=$(tail -1 "$work/log")
# "#7 [make 4/5] RUN ..." names a step, "#7 CACHED" says that it did not run.
counts=$(awk '/^#[0-9]+ \[[^]]*[0-9]+\/[0-9]+\] / { step[$1] = 1 }
              $2 == "CACHED" { cached[$1] = 1 }
              END { for (s in step) { ++all; if (s in cached) ++hits }; print hits + 0, all + 0 }' "$work/log")
[ "$counts" = "${counts#* } ${counts#* }" ] || die "only ${counts% *} of ${counts#* } steps came from the cache"
say "done"
echo "first   $summary"
echo "again   $again"
echo "all ${counts#* } steps of the second build came from the cache; now everything is removed again"
