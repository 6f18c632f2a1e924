#!/usr/bin/env bash
# What: sets up .venv with the development tools and runs the tests, on the CPU, with gloo.
# When: after cloning, and before every commit; arguments go to pytest.
# How:  bash launch/test.sh [-n auto -k conversion ...]; EXTRA=all in front installs whatever a test can use
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_syncnorm "${EXTRA:-dev}"
echo "syncnorm: running the tests"
cd "$root"
exec "$bin/python" -m pytest "$@"
