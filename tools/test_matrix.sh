#!/usr/bin/env bash
# Tries Pythons and torches and notes the results in tests/MATRIX.md: bash tools/test_matrix.sh [PYTHON:TORCH ...]
# By default every row of the table; tools/build_wheels.sh does the work and says what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

table=tests/MATRIX.md
[ $# -gt 0 ] || mapfile -t cells < <(sed -nE 's/^\| (3\.[0-9]+) \| ([^ ]+) \|.*/\1:\2/p' "$table")
[ $# -gt 0 ] || set -- "${cells[@]}"

failed=0
for cell in "$@"; do
  row="| ${cell/:/ | } |"
  noted=dist/${cell/:/-}.txt
  rm -f "$noted"
  if ! bash tools/build_wheels.sh --tests "$cell"; then
    result=failed failed=1
  elif [ -f "$noted" ]; then
    result=$(sed -E 's/=//g; s/ in [0-9.]+s.*//' "$noted")
  else
    result='torch not to be had' failed=1
  fi
  line="$row $(date +%F) | $result |"
  if grep -qF "$row" "$table"; then
    sed -i "s~^$(sed 's/[.]/\\&/g' <<<"$row").*~$line~" "$table"
  else
    echo "$line" >>"$table"
  fi
  echo "$line"
done
exit $failed
