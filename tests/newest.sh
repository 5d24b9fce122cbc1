#!/usr/bin/env bash
# Runs the tests of `make test` on what the registry has today, without
# constraints; then says what broke, and which versions are not those of the
# constraints file that is named. Exits 0 whatever broke: a new release of a
# dependency fails nobody's build.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
venv=.venv-newest-releases
log=$(mktemp)
trap 'rm -f "$log"' EXIT

rm -rf "$venv"
if ! make VENV="$venv" CONSTRAINTS= TORCH=torch "$venv/tested"; then
  echo "newest releases: cannot be installed together, see above"
  exit 0
fi
make VENV="$venv" CONSTRAINTS= TORCH=torch test 2>&1 | tee "$log"
broken=$?

if [ $# -gt 0 ]; then
  echo
  echo "newest releases: not the versions of $1 (there, here)"
  "$venv/bin/python" -m constraints.differences "$1"
fi
echo
if [ "$broken" = 0 ]; then
  echo "newest releases: nothing broke"
else
  echo "newest releases: these broke"
  grep -E '^(FAILED|ERROR) ' "$log" || tail -n 20 "$log"
fi
exit 0
