#!/usr/bin/env bash
# Runs every notebook in order and fills figures/; ./run_all.sh --help says what can be chosen.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then # needs no packages
    if python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        exec python3 "$root/deepknn_lib/study/runner.py" --help
    fi
fi

# shellcheck source=setup.sh
source "$root/setup.sh" || exit 1
exec "$DEEPKNN_PYTHON" -m deepknn_lib notebooks "$@"
