#!/bin/sh
# Offloads a real build into a real microVM: zlib's source from Debian is configured, built and
# tested with this machine's own tools, on another kernel, and its artefacts come back.
#
#   tests/demo/demo.sh FOLDER_OF_THE_BINARIES
#
# Everything it makes lies under target/demo; the guest kernel is kept in the user's cache.
set -eu
bin=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
demo="${TOWLINE_DEMO_DIR:-$root/target/demo}"
say() { printf '\n== %s\n' "$*"; }

rm -rf "$demo/zlib"
mkdir -p "$demo/zlib" "$demo/data" "$demo/config" "$demo/state" "$demo/run"
chmod 700 "$demo/run"
export XDG_DATA_HOME="$demo/data" XDG_CONFIG_HOME="$demo/config" XDG_STATE_HOME="$demo/state"
# Sockets want short paths: the runtime folder is the only thing outside.
runtime=$(mktemp -d "${TMPDIR:-/tmp}/tow-demo.XXXXXX")
export XDG_RUNTIME_DIR="$runtime"
PATH="$bin:$PATH"

finish() {
  status=$?
  tow rm zlib-demo >/dev/null 2>&1 || true
  tow down >/dev/null 2>&1 || true
  rm -rf "$runtime"
  [ "$status" = 0 ] || echo "the demo failed (exit $status); logs are under $demo/data/towline" >&2
}
trap finish EXIT

say "zlib's source, from Debian"
tarball=$("$root/tests/setup/debian-source.sh" zlib "$demo/source")
tar -xf "$tarball" -C "$demo/zlib" --strip-components=1
# This makes it a project folder of its own, and says which image it wants.
echo 'image = "local"' > "$demo/zlib/towline.toml"
ls "$demo/zlib" | head -n 5

say "tow up --detach: a whole cluster on this machine"
tow up --detach
tow status

cd "$demo/zlib"
say "tow run -- uname -r: another kernel, the same folder, the same user"
guest=$(tow run --name zlib-demo --image local -- sh -c 'uname -r; pwd >&2; id -un >&2')
echo "here: $(uname -r)    in the sandbox: $guest"
[ "$(uname -r)" != "$guest" ] || { echo "error: that is the same kernel" >&2; exit 1; }

say "tow run -- configure, build and test"
tow run -- sh -c './configure && make -j2 && make test'

say "the artefacts are back in the folder"
ls -l libz.a libz.so.1.* example minigzip
# What was built there runs here.
printf 'towed\n' | ./minigzip | ./minigzip -d

tow ls
say "done: try it in a folder of yours with"
echo "    $bin/tow run -- make"
