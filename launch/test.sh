#!/usr/bin/env bash
# What: sets up .venv with the development tools and runs the tests on the CPU with gloo, without those marked slow.
# When: after cloning, and before every commit; it takes five minutes on two cores. Arguments go to pytest.
# How:  bash launch/test.sh [-m "" to run all, -n 0 -k NAME ...]; EXTRA=all before it installs all packages that tests can use
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_syncnorm "${EXTRA:-dev}"
echo "syncnorm: running the tests"
cd "$root"
exec "$bin/python" -m pytest -n auto --dist worksteal -m "not slow" "$@" # the last -n and -m count
