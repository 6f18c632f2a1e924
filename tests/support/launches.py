"""Starts the recipes in launch/ as their first lines say, and parses what they print."""

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
SHIMS = SUPPORT / "shims"  # for scripts that import torchvision, which PyPI has only for CUDA
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


def python(*command: str, cwd: Path, path: Path = ROOT, timeout: float = 140, **env: str) -> str:
    return run(sys.executable, *command, cwd=cwd, timeout=timeout, PYTHONPATH=f"{ROOT}:{path}", **env)


def torchrun(*command: str, cwd: Path, path: Path = ROOT, timeout: float = 140, **env: str) -> str:
    # --standalone: the launcher picks a free port for itself
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return python(*launcher, *command, cwd=cwd, path=path, timeout=timeout, **env)


def numbers(line: str) -> list[float]:
    """Numbers that stand alone or before a unit, not digits within a name."""
    return [float(word) for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w])", line)]


def needs(*packages: str, extra: str = "examples") -> None:
    """Skips the test if a package is missing; imports none of them."""
    if absent := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"no {', '.join(absent)}: pip install '.[{extra}]'")


def needs_torchvision_operators() -> None:
    """Skips the test if torchvision's compiled part does not fit this torch."""
    works = "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    if subprocess.run([sys.executable, "-c", works], capture_output=True).returncode:
        pytest.skip("torchvision does not work with this torch")


def epochs(output: str) -> list[tuple[int, int, float]]:
    """(epoch, ranks, test loss) of each line that examples/train_ddp.py printed."""
    found = re.findall(r"epoch (\d+), (\d+) ranks: test loss ([\d.]+)", output)
    return [(int(epoch), int(ranks), float(loss)) for epoch, ranks, loss in found]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])
