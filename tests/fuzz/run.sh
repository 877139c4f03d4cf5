#!/bin/sh
# Runs each fuzz target for so many seconds, starting from its kept corpus. A finding stops it and
# names the input. Uses the pinned stable toolchain: the compiler is asked for its coverage passes.
#
#   tests/fuzz/run.sh SECONDS [TARGET…]
set -eu
seconds="$1"; shift
cd "$(dirname "$0")"
command -v cargo-fuzz >/dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz
export RUSTC_BOOTSTRAP=1
targets="$*"
[ -n "$targets" ] || targets=$(ls fuzz_targets | sed 's/\.rs$//')
for target in $targets; do
  mkdir -p "corpus/$target"
  echo "== $target for $seconds s" >&2
  cargo fuzz run --fuzz-dir . --sanitizer none "$target" "corpus/$target" "../fuzz-targets/corpus/$target" -- \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 -verbosity=0
done
echo "no finding in $seconds s of each: $targets" >&2
