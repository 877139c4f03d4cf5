#!/bin/sh
# Installs the cargo tools that `make test` needs, at pinned versions, if they are missing.
set -eu
nextest=0.9.143
if ! cargo nextest --version >/dev/null 2>&1; then
  echo "installing cargo-nextest $nextest (once; some minutes)" >&2
  cargo install --quiet --locked cargo-nextest --version "$nextest"
fi
