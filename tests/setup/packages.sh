#!/bin/sh
# Installs the Debian packages that building, testing and running Towline need, if they are missing.
# As an ordinary user it uses sudo where that works, and otherwise says what to have installed.
#
#   tests/setup/packages.sh [test|bench]     more packages for the tests or the figures
set -eu

# command that proves it : package
needed="qemu-system-x86_64:qemu-system-x86 mksquashfs:squashfs-tools mke2fs:e2fsprogs depmod:kmod dpkg-deb:dpkg cc:gcc curl:curl"
case "${1:-}" in
  test) needed="$needed tmux:tmux unsquashfs:squashfs-tools git:git busybox:busybox-static cpio:cpio ip:iproute2 ssh-agent:openssh-client skopeo:skopeo umoci:umoci docker-registry:docker-registry mmdebstrap:mmdebstrap perl:perl" ;;
  bench) needed="$needed ssh:openssh-client sshd:openssh-server skopeo:skopeo umoci:umoci zstd:zstd docker-registry:docker-registry buildah:buildah" ;;
esac

missing=""
for pair in $needed; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
# The network's test downloads a package in a sandbox, with the system's own python.
[ "${1:-}" != test ] || [ -d /usr/lib/python3/dist-packages/pip ] || missing="$missing python3-pip"
# The static guest agent needs the static C library, which comes with its headers.
[ -e /usr/lib/x86_64-linux-gnu/libc.a ] || missing="$missing libc6-dev"
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
# The guest kernel is downloaded by apt-get as the package that this one names.
lists=no
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 && lists=yes
if [ -z "$missing" ] && [ "$lists" = yes ]; then exit 0; fi

if [ "$(id -u)" = 0 ]; then
  as_root=""
elif sudo -n true 2>/dev/null; then
  as_root="sudo"
else
  echo "error: these Debian packages are missing:$missing (or apt's lists: $lists)" >&2
  echo "hint: have an administrator run: apt-get update && apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
echo "installing:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq
[ -z "$missing" ] || $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
