"""Starts the recipes in launch/ as their first lines say, and parses what they print."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
TRAIN = (str(ROOT / "examples" / "train_ddp.py"),)


def environment(**more: str) -> dict[str, str]:
    """Without the variables of a launcher around the tests; one thread per rank; this interpreter for ``python3``."""
    ours = {
        k: v
        for k, v in os.environ.items()
        if k not in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"}
    }
    path = f"{Path(sys.executable).parent}:{ours['PATH']}:/usr/sbin"
    return {**ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PATH": path, **more}


def run(*command: str, cwd: Path, timeout: float = 300, **env: str) -> str:
    """The stdout of a command, which must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**{"GLOO_SOCKET_IFNAME": "lo", **env}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def epochs(output: str) -> list[tuple[int, int, float]]:
    """(epoch, ranks, test loss) of each line that examples/train_ddp.py printed."""
    found = re.findall(r"epoch (\d+), (\d+) ranks: test loss ([\d.]+)", output)
    return [(int(epoch), int(ranks), float(loss)) for epoch, ranks, loss in found]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])
