#!/usr/bin/env bash
# Installs this build into a scratch prefix, builds examples/embed against it as a stranger would, and runs it.
# usage: run.sh SOURCE_DIR BUILD_DIR CXX_COMPILER
set -euo pipefail
source_dir=$1 build_dir=$2 compiler=$3
[ "$(id -u)" = 0 ] || { echo "skipped: needs root"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build_dir" --prefix "$work/prefix" >/dev/null
if find "$work/prefix" -name '*.pcm' | grep .; then
  echo "compiled module interfaces were installed; they only fit the compiler that made them" >&2
  exit 1
fi
# The package stands by itself: nothing of the build's own place or its tests in it.
if grep -rnF -e "$source_dir" -e "$build_dir" -e cobuild_warnings -e test_support "$work/prefix" --include='*.cmake' >&2; then
  echo "the installed package names what is not part of it" >&2
  exit 1
fi
cmake -S "$source_dir/examples/embed" -B "$work/build" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_PREFIX_PATH="$work/prefix" \
  -DCMAKE_EXE_LINKER_FLAGS=-fuse-ld=lld-19 >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
cmake --build "$work/build" >"$work/log" 2>&1 || { tail -50 "$work/log" >&2; exit 1; }
mkdir "$work/context"
printf 'FROM scratch\nCOPY hello /hello\n' >"$work/context/Dockerfile"
echo hello >"$work/context/hello"
digest=$("$work/build/embed" "$work/state" "$work/context")
echo "built $digest"
[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]]
# The same image again, from cache, by another process.
[ "$("$work/build/embed" "$work/state" "$work/context")" = "$digest" ]
# A mistake comes back as one sentence.
printf 'FROM scratch\nCOPY nothere /x\n' >"$work/context/Dockerfile"
if "$work/build/embed" "$work/state" "$work/context" 2>"$work/err"; then
  echo "a missing file was not an error" >&2
  exit 1
fi
grep -q '^embed: .*"/nothere": not found' "$work/err" || { cat "$work/err" >&2; exit 1; }
