#!/bin/sh
# Tests with a real Cloud Hypervisor on a machine without hardware virtualisation: in a sandbox of
# Towline's own, whose emulated processor can virtualise (AMD SVM), KVM works, and Cloud Hypervisor
# boots real guests in it. Brings no Cloud Hypervisor along:
#
#   TOWLINE_CLOUD_HYPERVISOR=/path/to/cloud-hypervisor tests/nested/run.sh BIN_DIR [bench]
#
# With `bench` it measures instead; BIN_DIR holds release binaries then.
set -eu
bin=$(cd "$1" && pwd)
what="${2:-test}"
vmm="${TOWLINE_CLOUD_HYPERVISOR:-}"
if [ -z "$vmm" ]; then
  echo "SKIPPED: no Cloud Hypervisor binary (TOWLINE_CLOUD_HYPERVISOR names none)"
  exit 0
fi
[ -x "$vmm" ] || { echo "error: TOWLINE_CLOUD_HYPERVISOR is $vmm, which is no program" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/towline"
qemu=$("$here/qemu.sh" "$cache/qemu-nested")
export PATH="$qemu:$PATH"
echo "== nesting in $(qemu-system-x86_64 --version | head -n 1)" >&2

echo "== building what runs in there" >&2
cd "$here/../.."
built() {
  found=$(cargo test --workspace --no-run --test "$1" 2>&1 | sed -n "s/.*(\(.*$1-[0-9a-f]*\)).*/\1/p")
  [ -n "$found" ] || { echo "error: the test $1 was not built" >&2; exit 1; }
  case "$found" in /*) echo "$found" ;; *) echo "$PWD/$found" ;; esac
}
case "$what" in
  test)
    conformance=$(built conformance)
    isolation=$(built isolation)
    ready=$(built ready)
    cargo build --quiet -p towline-benches
    set -- "$conformance" "$isolation" "$ready" "$bin/towline-benches"
    ;;
  bench)
    cargo build --quiet --release -p towline-benches
    set -- "$bin/towline-benches"
    ;;
  *) echo "error: $what is neither test nor bench" >&2; exit 1 ;;
esac

work=$(mktemp -d)
for name in run data config state project; do mkdir "$work/$name"; done
export XDG_RUNTIME_DIR="$work/run" XDG_DATA_HOME="$work/data" XDG_CONFIG_HOME="$work/config"
export XDG_STATE_HOME="$work/state" TOWLINE_CACHE="$cache" TOWLINE_ACCEL=tcg
tow="$bin/tow"
cd "$work/project"
finish() {
  "$tow" down >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap finish EXIT

echo "== starting a machine to nest in" >&2
# One CPU: it is nearly as fast as two, under which a guest of the guest crashed once.
"$tow" create --quiet --no-sync --name nested --image local --cpus 1 --memory 6GiB --disk 10GiB
mkdir "$work/bring" "$work/bring/cache"
for program; do
  name=$(basename "$program")
  # Tests are called NAME-HASH.
  strip -o "$work/bring/${name%-????????????????}" "$program"
done
for name in tow towline-control-plane towline-node-agent towline-node-helper; do
  strip -o "$work/bring/$name" "$bin/$name"
done
cp "$vmm" "$work/bring/cloud-hypervisor"
cp "$bin/towline-guest-agent-static" "$here/inside.sh" "$work/bring/"
# The guest kernel of here is that of the guests in there, too.
cp -a "$cache/kernels" "$work/bring/cache/"
"$tow" cp "$work/bring" nested:/opt/nested
"$tow" exec --no-sync -u root nested -- sh /opt/nested/inside.sh "$what"
