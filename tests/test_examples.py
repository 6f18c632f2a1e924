"""Examples run as users run them: started by torchrun on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def torchrun(*command: str, cwd: Path) -> str:
    # --standalone: the launcher picks a free port for itself
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_ddp_learns_and_resumes(tmp_path):
    script = str(ROOT / "examples" / "train_ddp.py")
    (line,) = torchrun(script, "--epochs", "1", cwd=tmp_path).splitlines()
    assert line.startswith("epoch 0: test accuracy ")
    saved = torch.load(tmp_path / "digits.pt")
    tracked = [v for k, v in saved["model"].items() if "num_batches" in k]
    assert tracked == [187, 187, 187]  # 1500 images, 2 ranks, 4 a step

    (resumed,) = torchrun(script, "--epochs", "2", cwd=tmp_path).splitlines()
    assert resumed.startswith("epoch 1: ")
    assert float(resumed.split()[-1]) > 0.9
    lines = torchrun(script, "--epochs", "2", "--checkpoint", "straight.pt", cwd=tmp_path).splitlines()
    assert lines == [line, resumed]
