# Finds or makes a Python that has everything this repository needs. Sourced by run_all.sh and run_tests.sh;
# by hand: source ./setup.sh
#
# An active environment (venv, conda, or python3 on the PATH) that has all the packages is used as it is.
# Otherwise the packages go into .venv beside this file, in the versions of constraints.txt, and .venv is activated.
# shellcheck shell=bash

_deepknn_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" && pwd -P)"

# Succeeds if the python "$1" is 3.10 or newer, has each package of pyproject.toml and imports this checkout's library.
_deepknn_suitable() {
    "$1" - "$_deepknn_root" 2>/dev/null <<'PYTHON'
import re
import sys
from importlib import metadata, util
from pathlib import Path

if sys.path and sys.path[0] == "":
    del sys.path[0]  # the current folder does not count as installed
root = Path(sys.argv[1])
lists = re.findall(r"^(?:dependencies|test|weights) = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S)
needed = re.findall(r'"([\w-]+)>=([\d.]+)"', "".join(lists))


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


sys.exit(
    sys.version_info < (3, 10)
    or not needed
    or any(numbers(metadata.version(name)) < numbers(least) for name, least in needed)
    or Path(util.find_spec("deepknn_lib").origin).resolve() != root / "deepknn_lib" / "__init__.py"
)
PYTHON
}

# Prints the first python that constraints.txt has versions for.
_deepknn_find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# What .venv was made from, and where: a copied or moved .venv does not work.
_deepknn_stamp() {
    (cd -- "$_deepknn_root" && cat pyproject.toml constraints.txt | cksum && pwd -P)
}

_deepknn_install() {
    local venv="$_deepknn_root/.venv" began=$SECONDS base
    local log="$venv/install.log" unfinished="$venv/.unfinished"
    # An install that was interrupted may have left half a package: start afresh.
    if [ -e "$unfinished" ] || { [ -e "$venv" ] && ! "$venv/bin/python" -c '' >/dev/null 2>&1; }; then
        echo "setup: removing an unfinished or broken .venv"
        rm -rf -- "$venv"
    fi
    if [ ! -e "$venv" ]; then
        if ! base="$(_deepknn_find_python)"; then
            echo "setup: no Python 3.10 to 3.13 on the PATH. Install one (python.org, your package manager, or" \
                "conda env create -f environment.yml) and run this again." >&2
            return 1
        fi
        echo "setup: making .venv with $("$base" --version 2>&1)"
        mkdir -p -- "$venv" && : >"$unfinished" || return 1
        if ! "$base" -m venv "$venv" >"$log" 2>&1; then
            tail -n 15 -- "$log" >&2
            echo "setup: could not make .venv. On Debian or Ubuntu: sudo apt install python3-venv" >&2
            return 1
        fi
    elif ! "$venv/bin/python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
        echo "setup: .venv has $("$venv/bin/python" --version), not 3.10 to 3.13. Remove .venv and run this again." >&2
        return 1
    fi
    rm -f -- "$venv/.deepknn-stamp"
    : >"$unfinished"
    echo "setup: installing PyTorch, the large part (minutes; follow it in .venv/install.log)"
    # Two steps only to show how far it is; the versions are the same.
    _deepknn_pip torch torchvision || return 1
    echo "setup: $((SECONDS - began)) s; installing the rest"
    _deepknn_pip -e ".[test,weights]" || return 1
    _deepknn_stamp >"$venv/.deepknn-stamp"
    rm -f -- "$unfinished"
    echo "setup: done in $((SECONDS - began)) s"
}

_deepknn_pip() {
    local log="$_deepknn_root/.venv/install.log"
    # from the root, so that no path has spaces in it
    if ! (cd -- "$_deepknn_root" && .venv/bin/python -m pip install --disable-pip-version-check --no-input \
        -c constraints.txt "$@") >>"$log" 2>&1; then
        tail -n 15 -- "$log" >&2
        echo "setup: pip could not install the packages (above: the end of .venv/install.log). If it speaks of" \
            "connections or finds no versions, check the network or proxy; if of space, 8 GB are needed." \
            "Then run this again." >&2
        return 1
    fi
}

_deepknn_setup() {
    for DEEPKNN_PYTHON in python python3; do
        if command -v "$DEEPKNN_PYTHON" >/dev/null 2>&1 && _deepknn_suitable "$DEEPKNN_PYTHON"; then
            return 0
        fi
    done
    DEEPKNN_PYTHON=python
    if [ "$(cat -- "$_deepknn_root/.venv/.deepknn-stamp" 2>/dev/null)" != "$(_deepknn_stamp)" ] ||
        [ ! -x "$_deepknn_root/.venv/bin/python" ]; then
        _deepknn_install || return 1
    fi
    # shellcheck disable=SC1091
    . "$_deepknn_root/.venv/bin/activate"
}

# The interpreter's name is left in DEEPKNN_PYTHON: `python`, or `python3` where there is no other.
_deepknn_setup
