#!/bin/sh
# Finds a QEMU whose emulated processor virtualises dependably, and prints the folder that it is in:
# under the one of Debian 12, 7.2, a guest of the guest stands still now and then. What Debian's
# backports have is downloaded as an ordinary user and unpacked there, never installed.
#
#   tests/nested/qemu.sh FOLDER
set -eu
. "$(dirname "$0")/../setup/own-apt.sh"
least=10
folder="$1"
major() {
  "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'
}
new_enough() {
  version=$(major "$1")
  [ -n "$version" ] && [ "$version" -ge "$least" ]
}
if here=$(command -v qemu-system-x86_64) && new_enough "$here"; then
  dirname "$here"
  exit 0
fi
if new_enough "$folder/usr/bin/qemu-system-x86_64"; then
  echo "$folder/usr/bin"
  exit 0
fi

echo "downloading a QEMU of version $least or newer (once; from Debian's backports)" >&2
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
own_apt "$apt"
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-none}")
# Those sources that have the release itself have its backports.
for file in /etc/apt/sources.list.d/*.sources; do
  [ ! -e "$file" ] || awk -v release="$release" '
    BEGIN { RS = ""; ORS = "\n\n" }
    $0 ~ "(^|\n)Suites:[^\n]* " release "( |\n|$)" {
      sub("(^|\n)Suites:[^\n]*", "&" " " release "-backports"); print
    }' "$file" >> "$apt/parts/all.sources"
done
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ ! -e "$file" ] || sed -nE "s,^(deb .*) $release ,\1 $release-backports ,p" "$file" \
    >> "$apt/parts/all.list"
done
export APT_CONFIG="$apt/apt.conf"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if (cd "$apt" && apt-get update -qq && apt-get download -qq -t "$release-backports" qemu-system-x86) >&2
then
  dpkg-deb --extract "$apt"/qemu-system-x86_*.deb "$apt/unpacked"
  mkdir -p "$folder/usr/bin"
  mv "$apt/unpacked/usr/bin/qemu-system-x86_64" "$folder/usr/bin/"
fi
if ! new_enough "$folder/usr/bin/qemu-system-x86_64"; then
  echo "error: no QEMU of version $least or newer is here, and Debian's backports have none" >&2
  echo "hint: put one on the PATH, as qemu-system-x86_64" >&2
  exit 1
fi
echo "$folder/usr/bin"
