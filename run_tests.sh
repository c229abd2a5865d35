#!/usr/bin/env bash
# Runs all tests: lint and format, unit tests, and every notebook in its smoke profile under nbval.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then
    cat <<'HELP'
usage: ./run_tests.sh [--browser | --faults] [pytest options]

Runs ruff (lint and format), then pytest over tests/ and notebooks/ (nbval, smoke profile). Takes minutes on two
cores; needs no download and leaves data/ and figures/ as they are. Options go to pytest: -x stops at the first
failure, -k WORD selects tests, --durations=10 shows the slowest. --browser instead opens every notebook in JupyterLab
in a headless Chromium (which has to be installed), runs it there, and looks at the pages. --faults instead kills runs,
workers and notebooks at random moments (50 times, DEEPKNN_KILLS) and looks whether all ends as it should: 15 minutes.
HELP
    exit
fi

# shellcheck source=setup.sh
source "$root/setup.sh" || exit 1
cd -- "$root"
scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
export DEEPKNN_DATA="$scratch/data" DEEPKNN_FIGURES="$scratch/figures" DEEPKNN_PROFILE=smoke

if [ "${1-}" = --browser ] || [ "${1-}" = --faults ]; then
    kind="${1#--}"
    shift
    "$DEEPKNN_PYTHON" -m pytest "tests/$kind.py" "$@"
    exit
fi

status=0
"$DEEPKNN_PYTHON" -m ruff check --quiet . || status=$?
"$DEEPKNN_PYTHON" -m ruff format --check --quiet . || status=$?
# Files side by side, one more than there are cores, as kernels make a file wait, in the order of tests/conftest.py.
# Solutions run inside tests/test_repository.py. pytest ends with 5 where options select nothing.
export OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1  # no processes for runs that last a second
files="$("$DEEPKNN_PYTHON" -c "import os; print(min(os.cpu_count() + 1, 5))")"
options=(-n "$files" --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env)
"$DEEPKNN_PYTHON" -m pytest "${options[@]}" notebooks tests --ignore=notebooks/solutions "$@" || status=$?
exit "$status"
