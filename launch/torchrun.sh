#!/usr/bin/env bash
# What: runs a training script on one machine with torchrun: a rank for each GPU, or for each core where there is none.
# When: one machine; RANKS=2 in front of it chooses the number of ranks, PYTHON the interpreter.
# How:  RANKS=2 bash launch/torchrun.sh examples/train_ddp.py [--epochs 3 ...]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
: "${1:?give a training script: $(sed -n 's/^# How:  //p' "$0")}"
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-auto}" "$@"
