#!/usr/bin/env bash
# What: runs tests of the layer with the oldest torch that pyproject.toml promises, in .venv-lowest (6 GB on Linux).
# When: .ci/run does; yourself before you use something of torch that may be new. Where torch cannot be had, it says so.
# How:  bash launch/test_lowest.sh [pytest arguments]; nox -s core-2.6 runs all core tests
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
torch=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\]$/\1/p' pyproject.toml)
venv=.venv-lowest
install() {
    "${PYTHON:-python3}" -m venv --clear "$venv" &&
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check "torch==$torch.*" "numpy<2" &&
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check -e ".[compare]" "torch==$torch.*" "numpy<2" \
            "pytest>=8" "pytest-xdist>=3.5" "pytest-timeout>=2.3" "hypothesis>=6.100" &&
        touch "$venv/syncnorm-$torch"
}
if [ ! "$venv/syncnorm-$torch" -nt pyproject.toml ]; then
    echo "syncnorm: installing torch $torch into $venv"
    export -f install && export torch venv
    timeout 600 bash -c install ||
        { echo "syncnorm: torch $torch could not be installed within ten minutes: its tests are skipped" && exit 0; }
fi
echo "syncnorm: running tests with torch $torch"
# What versions of torch change: numerics, checkpointing, torch.compile with breaks, conversion, Join, collectives.
exec "$venv/bin/python" -m pytest -n auto --dist worksteal -m "not slow" \
    tests/layer/test_{layer,masks,checkpointing,compile_breaks,double_backward,native,window}.py \
    tests/conversion/test_{conversion,forward_override,replacing}.py \
    tests/training/test_{join,whole_batch,run_in_step,offload}.py tests/comm/test_{native,disagreement}.py \
    tests/monitor/test_monitor.py "$@"
