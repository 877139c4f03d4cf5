#!/bin/sh
# Prints what the tests said they skipped, and how many, from nextest's JUnit report.
set -eu
report="$1"
[ -f "$report" ] || { echo "error: no test report at $report" >&2; exit 1; }
grep -o 'SKIPPED: [^<]*' "$report" | sort | uniq -c || true
echo "tests: $(grep -c '<testcase' "$report"), skipped inside: $(grep -c 'SKIPPED: ' "$report" || true)"
