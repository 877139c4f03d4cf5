#!/bin/sh
# Makes an ordinary user with the Rust toolchain of the caller, for trying Towline as a newcomer.
# Run it as root; it prints how to become that user. Repeating it is harmless.
#
#   tests/setup/ordinary-user.sh [NAME]
set -eu
name="${1:-newcomer}"
[ "$(id -u)" = 0 ] || { echo "error: making a user needs root" >&2; exit 1; }
id "$name" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$name"
home=$(getent passwd "$name" | cut -d: -f6)
toolchain=$(rustc --print sysroot)
# A copy of one toolchain, so that nothing in the caller's home need be readable.
if [ ! -x "$home/.toolchain/bin/cargo" ]; then
  cp -a "$toolchain" "$home/.toolchain"
fi
for tool in cargo-nextest; do
  found=$(command -v "$tool" || true)
  [ -z "$found" ] || cp -L "$found" "$home/.toolchain/bin/"
done
chown -R "$name": "$home/.toolchain"
grep -q toolchain "$home/.profile" 2>/dev/null ||
  echo 'export PATH="$HOME/.toolchain/bin:$PATH"' >> "$home/.profile"
echo "try it: su - $name"
