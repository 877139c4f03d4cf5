#!/bin/sh
# The part of run.sh that runs in the machine with an emulated processor, as root.
set -eu
cd /opt/nested
modprobe kvm-amd
[ -e /dev/kvm ] || mknod /dev/kvm c 10 232
# With it a restored guest's memory comes as it is used.
minor=$(sed -n 's/^ *\([0-9]*\) userfaultfd$/\1/p' /proc/misc)
[ -z "$minor" ] || [ -e /dev/userfaultfd ] || mknod /dev/userfaultfd c 10 "$minor"
mkdir -p /var/tmp/nested
export HOME=/root XDG_CACHE_HOME=/opt/nested/xdg TMPDIR=/var/tmp/nested
mkdir -p xdg && ln -sfn /opt/nested/cache xdg/towline
export TOWLINE_CLOUD_HYPERVISOR=/opt/nested/cloud-hypervisor
export TOWLINE_GUEST_AGENT=/opt/nested/towline-guest-agent-static
uname -r
./cloud-hypervisor --version
# A cluster finds its VMM on the PATH.
mkdir -p bin && ln -sf ../cloud-hypervisor bin/cloud-hypervisor
export PATH="/opt/nested/bin:$PATH"
if [ "$1" = bench ]; then
  exec ./towline-benches --bin-dir /opt/nested --nested --write false \
    --cold-runs 5 --warm-runs 5 --fork-runs 3
fi
# What it is as a node. Landlock that is demanded is there, or VMs are refused.
cat > required.toml <<END
name = "nested"
control_plane = ["127.0.0.1:1"]
data_dir = "/var/tmp/nested/data"
landlock = "required"
END
./towline-node-agent --config required.toml doctor > doctor.log || true
cat doctor.log
if grep -q '^ok *landlock' doctor.log; then
  grep -Eq '^(ok|note) +driver: cloud-hypervisor' doctor.log
else
  grep -q '^MISSING driver: landlock = "required" is configured' doctor.log
fi
./conformance --test-threads=1 --nocapture cloud_hypervisor
# A whole `tow run`.
TOWLINE_BIN_DIR=/opt/nested \
  ./isolation --exact --nocapture a_vm_is_what_a_sandbox_is | tee isolation.log
grep -q '^driver: cloud-hypervisor' isolation.log
grep -q '^test result: ok' isolation.log
