# Sourced by demo.sh and test.sh: creates .venv in the checkout and installs syncnorm into it, unless that is up to date.
# PYTHON selects the interpreter (default: python3); pip's PIP_* variables select where packages come from.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin

install_syncnorm() { # install_syncnorm EXTRA
    local extra=$1 python=${PYTHON:-python3} stamp=$root/.venv/syncnorm-$1
    if [ ! -x "$bin/python" ]; then
        echo "syncnorm: creating $root/.venv with $("$python" --version)"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "syncnorm: Python 3.10 or newer is needed; set PYTHON=/path/to/it" >&2
            exit 2
        }
        "$python" -m venv "$root/.venv"
    fi
    if [ "$stamp" -nt "$root/pyproject.toml" ] && [ "$stamp" -nt "$root/constraints.txt" ]; then
        echo "syncnorm: .venv already has syncnorm[$extra]"
        return
    fi
    local pip=("$bin/python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
    # torch first, at the tested version; otherwise pip would download the newest CUDA build.
    echo "syncnorm: installing $(grep '^torch==' "$root/constraints.txt")"
    "${pip[@]}" torch
    echo "syncnorm: installing syncnorm[$extra]"
    "${pip[@]}" -e "$root[$extra]"
    touch "$stamp"
}
