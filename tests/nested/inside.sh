#!/bin/sh
# The part of run.sh that runs in the machine with an emulated processor, as root: a node whose node
# agent is an ordinary user, and whose VMMs are started by the helper, each as a user of its own.
set -eu
# A file system that can map users, which the rest here cannot.
place=/mnt/nested
user=1234
cd /opt/nested
modprobe kvm-amd
[ -e /dev/kvm ] || mknod /dev/kvm c 10 232
chmod 600 /dev/kvm
# With it a restored guest's memory comes as it is used.
minor=$(sed -n 's/^ *\([0-9]*\) userfaultfd$/\1/p' /proc/misc)
[ -z "$minor" ] || [ -e /dev/userfaultfd ] || mknod /dev/userfaultfd c 10 "$minor"
modprobe loop
[ -e /dev/loop0 ] || mknod /dev/loop0 b 7 0
truncate -s 7G /nested.img
mkfs.ext4 -q /nested.img
mkdir -p "$place"
mount -o loop /nested.img "$place"
install -m 755 cloud-hypervisor /usr/local/bin/cloud-hypervisor
mkdir -p "$place/xdg" "$place/tmp" "$place/home"
mv cache "$place/xdg/towline"
chown -R $user:$user "$place"
# A local image asks who its user is.
echo "nested:x:$user:$user::$place/home:/bin/sh" >> /etc/passwd
echo "nested:x:$user:" >> /etc/group
chmod -R go+rX /opt/nested
grep -q ' /sys/fs/cgroup' /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup

export HOME="$place/home" XDG_CACHE_HOME="$place/xdg" TMPDIR="$place/tmp"
export TOWLINE_GUEST_AGENT=/opt/nested/towline-guest-agent-static
export TOWLINE_HELPER=/run/towline/helper.sock
uname -r
cloud-hypervisor --version
as_user() {
  setpriv --reuid $user --regid $user --clear-groups "$@"
}
cat > helper.toml <<END
agent_uid = $user
agent_gid = $user
programs = ["/usr/local/bin/cloud-hypervisor"]
END
./towline-node-helper --config helper.toml > helper.log 2>&1 &
helper=$!
for _ in $(seq 100); do
  [ -S $TOWLINE_HELPER ] && break
  sleep 0.1
done
# The figures, of so many starts and forks.
figures() {
  # Without the helper: the memory of other users' processes cannot be read.
  unset TOWLINE_HELPER
  chown $user /dev/kvm
  [ ! -e /dev/userfaultfd ] || chown $user /dev/userfaultfd
  (cd /opt/nested && as_user ./towline-benches --bin-dir . --nested --write false \
    --cold-runs "$1" --warm-runs "$1" --fork-runs "$2")
}
if [ "$1" = bench ]; then
  figures 5 3
  exit
fi
# What it is as a node. Landlock that is demanded is there, or VMs are refused.
cat > required.toml <<END
name = "nested"
control_plane = ["127.0.0.1:1"]
data_dir = "$place/tmp/data"
landlock = "required"
END
as_user ./towline-node-agent --config required.toml doctor > doctor.log || true
cat doctor.log
grep -q '^ok *helper' doctor.log
if grep -q '^ok *landlock' doctor.log; then
  grep -Eq '^(ok|note) +driver: cloud-hypervisor' doctor.log
else
  grep -q '^MISSING driver: landlock = "required" is configured' doctor.log
fi
export TOWLINE_CLOUD_HYPERVISOR=/usr/local/bin/cloud-hypervisor
as_user ./conformance --test-threads=1 --nocapture cloud_hypervisor
# A whole `tow run`.
unset TOWLINE_CLOUD_HYPERVISOR
export TOWLINE_BIN_DIR=/opt/nested
as_user ./isolation --exact --nocapture a_vm_is_what_a_sandbox_is | tee isolation.log
grep -q 'driver: cloud-hypervisor' isolation.log
grep -q '^test result: ok' isolation.log
# A guest that waited becomes a sandbox.
as_user ./ready --exact --nocapture vm_that_waited_becomes_a_sandbox_like_any_other | tee ready.log
grep -q '^test result: ok' ready.log

# Two sandboxes: as the user of the VMM of one, nothing of the other's opens, in its own root or not.
export XDG_RUNTIME_DIR="$place/tmp/run" XDG_DATA_HOME="$place/tmp/data" TOWLINE_ACCEL=auto
export XDG_CONFIG_HOME="$place/tmp/config" XDG_STATE_HOME="$place/tmp/state"
for dir in run data config state project; do as_user mkdir -p -m 700 "$place/tmp/$dir"; done
cd "$place/tmp/project"
for name in one other; do
  as_user /opt/nested/tow create --quiet --no-sync --image local --name $name \
    --memory 512MiB --disk 2GiB
done
ps -eo uid,pid,comm | grep -E 'towline|cloud-hyp' || true
tried=0
for pid in $(pidof cloud-hypervisor); do
  own=$(awk '/^Uid:/ { print $2 }' "/proc/$pid/status")
  [ "$own" != 0 ] && [ "$own" != $user ] || { echo "error: VMM $pid runs as $own" >&2; exit 1; }
  as_vmm() {
    setpriv --reuid "$own" --regid "$own" --clear-groups "$@"
  }
  for dir in "$XDG_DATA_HOME"/towline/node/sandboxes/*/vm; do
    [ "$dir" != "$(readlink "/proc/$pid/cwd")" ] || continue
    disk=${dir%/vm}/upper.img
    [ -f "$disk" ] && [ -S "$dir/api.sock" ] || { echo "error: no VM in $dir" >&2; exit 1; }
    # shellcheck disable=SC2016
    connect='use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un(shift)) or exit 1'
    (cd "$dir" && perl -e "$connect" api.sock) || { echo "error: $dir/api.sock is deaf" >&2; exit 1; }
    for there in "" "nsenter --mount=/proc/$pid/ns/mnt"; do
      # shellcheck disable=SC2086
      if $there setpriv --reuid "$own" --regid "$own" --clear-groups head -c 1 "$disk" 2>/dev/null; then
        echo "error: user $own reads $disk" >&2; exit 1
      fi
    done
    # By a path that is short enough, were its folders open.
    mkdir -p /mnt/other && mount --bind "$dir" /mnt/other
    if as_vmm perl -e "$connect" /mnt/other/api.sock; then
      echo "error: user $own reaches $dir/api.sock" >&2; exit 1
    fi
    if as_vmm perl -e "$connect" $TOWLINE_HELPER; then
      echo "error: user $own reaches the helper" >&2; exit 1
    fi
    umount /mnt/other
    tried=$((tried + 1))
    echo "user $own (VMM $pid) opens nothing of $dir"
  done
done
[ "$tried" -ge 2 ] || { echo "error: only $tried were tried" >&2; exit 1; }
as_user /opt/nested/tow rm --force one other
as_user /opt/nested/tow down
kill $helper
echo "== figures, for a first look: make bench-nested takes more runs of a release build"
figures 1 1
