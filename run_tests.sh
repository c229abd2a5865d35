#!/usr/bin/env bash
# Runs all tests: lint and format, unit tests, and every notebook in its smoke profile under nbval.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then
    cat <<'HELP'
usage: ./run_tests.sh [pytest options]

Runs ruff (lint and format), then pytest over tests/ and notebooks/ (nbval, smoke profile). Takes minutes on two
cores; needs no download and leaves data/ and figures/ as they are. Options go to pytest: -x stops at the first
failure, -k WORD selects tests, --durations=10 shows the slowest.
HELP
    exit
fi

# shellcheck source=setup.sh
source "$root/setup.sh" || exit 1
cd -- "$root"
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
export DEEPKNN_DATA="$scratch/data" DEEPKNN_FIGURES="$scratch/figures" DEEPKNN_PROFILE=smoke

status=0
"$DEEPKNN_PYTHON" -m ruff check --quiet . || status=$?
"$DEEPKNN_PYTHON" -m ruff format --check --quiet . || status=$?
# The notebooks side by side with the tests, which use one core; pytest ends with 5 where options select nothing.
"$DEEPKNN_PYTHON" -m pytest --nbval-lax --nbval-current-env notebooks "$@" > "$scratch/notebooks.log" 2>&1 &
notebooks=$!
OMP_NUM_THREADS=1 "$DEEPKNN_PYTHON" -m pytest tests "$@" || { of_tests=$?; [ "$of_tests" = 5 ] || status=$of_tests; }
wait "$notebooks" || { of_notebooks=$?; [ "$of_notebooks" = 5 ] || status=$of_notebooks; }
cat "$scratch/notebooks.log"
[ "${of_tests-}${of_notebooks-}" != 55 ] || status=5
exit "$status"
