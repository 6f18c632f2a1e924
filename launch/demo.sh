#!/usr/bin/env bash
# What: sets up .venv and compares one process, DataParallel, DDP and DDP with SyncBN on real images.
# When: the first thing to run after cloning; may be run again. Arguments go to `syncnorm compare`.
# How:  bash launch/demo.sh [--seeds 8 --json out.json ...]; the page with plots is written to demo.html
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_syncnorm compare
set -- --seeds 4 --eval-batch 64 --html demo.html "$@"
echo "syncnorm: running syncnorm compare $*"
exec "$bin/syncnorm" compare "$@"
