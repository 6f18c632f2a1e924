#!/usr/bin/env bash
# What: runs a training script on several machines with torchrun; elastic: machines may join late or be lost.
# When: machines without a scheduler; the same command on each. The first one hosts the rendezvous and must not be lost.
# How:  FIRST=10.0.0.1 NODES=1:2 RANKS=8 bash launch/torchrun_nodes.sh examples/train_ddp.py --checkpoint /shared/digits.pt
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
: "${1:?give a training script: $(sed -n 's/^# How:  //p' "$0")}"
: "${FIRST:?give the address of the first machine: FIRST=10.0.0.1}"

# A machine has several addresses. torchrun would use the one that its name resolves to, and gloo and NCCL that of the first
# interface. The right one is that from which the first machine is reached; ip (of iproute2) knows it.
command -v ip > /dev/null || { echo "needs ip: apt-get install iproute2" >&2; exit 2; }
first=$(getent ahostsv4 "$FIRST" | awk 'NR == 1 { print $1 }') || true
: "${first:?FIRST=$FIRST has no IPv4 address here}"
address=${ADDRESS:-$(ip route get "$first" | sed -n 's/.* src \([^ ]*\).*/\1/p')}
interface=$(ip -oneline address show to "$address" | awk 'NR == 1 { print $2 }')
: "${interface:?no interface of this machine has the address ${address:-that reaches $first}}"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
is_host=$([ "$address" = "$first" ] && echo true || echo false)

# A machine that is silent for 3 x 2 s is lost; one that is 15 s late waits for the next restart.
waits=keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=15
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes "${NODES:-1:2}" --nproc-per-node "${RANKS:-auto}" \
    --max-restarts "${RESTARTS:-3}" --local-addr "$address" --rdzv-backend c10d --rdzv-id "${JOB:-syncnorm}" \
    --rdzv-endpoint "$first:${PORT:-29400}" --rdzv-conf "is_host=$is_host,${WAITS:-$waits}" "$@"
