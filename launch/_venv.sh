# Sourced by demo.sh and test.sh: makes .venv in the checkout and installs syncnorm into it, once.
# PYTHON chooses the interpreter (default: python3); pip's own PIP_* variables choose where packages come from.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin

install_syncnorm() { # install_syncnorm EXTRA
    local extra=$1 python=${PYTHON:-python3} stamp=$root/.venv/syncnorm-$1
    if [ ! -x "$bin/python" ]; then
        echo "syncnorm: making $root/.venv with $("$python" --version)"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "syncnorm: Python 3.10 or newer is needed; set PYTHON=/path/to/it" >&2
            exit 2
        }
        "$python" -m venv "$root/.venv"
    fi
    if [ "$stamp" -nt "$root/pyproject.toml" ] && [ "$stamp" -nt "$root/constraints.txt" ]; then
        echo "syncnorm: .venv holds syncnorm[$extra] already"
        return
    fi
    local pip=("$bin/python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
    # torch first, at the tested version: left to the resolver, pip would fetch the newest CUDA build.
    echo "syncnorm: installing $(grep '^torch==' "$root/constraints.txt")"
    "${pip[@]}" torch
    echo "syncnorm: installing syncnorm[$extra]"
    "${pip[@]}" -e "$root[$extra]"
    touch "$stamp"
}
