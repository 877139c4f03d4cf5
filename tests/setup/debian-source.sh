#!/bin/sh
# Downloads the original source of a Debian package into a folder, from the mirrors that this machine
# already uses, as an ordinary user.
#
#   tests/setup/debian-source.sh PACKAGE FOLDER      prints the tarball's path
set -eu
. "$(dirname "$0")/own-apt.sh"
package="$1" folder="$2"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
found() { ls "$folder/${package}"_*.orig.tar.* 2>/dev/null | head -n 1; }
[ -z "$(found)" ] || { found; exit 0; }

apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
own_apt "$apt"
for file in /etc/apt/sources.list.d/*.sources; do
  [ ! -e "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" > "$apt/parts/$(basename "$file")"
done
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ ! -e "$file" ] || sed -nE 's/^deb(-src)? /deb-src /p' "$file" >> "$apt/parts/all.list"
done
cd "$folder"
APT_CONFIG="$apt/apt.conf" apt-get update -qq >&2
APT_CONFIG="$apt/apt.conf" apt-get source --download-only -qq "$package" >&2
found
