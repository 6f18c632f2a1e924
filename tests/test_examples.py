"""Examples run as users run them: started by torchrun on two ranks."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
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


def tracked(checkpoint: Path) -> set[int]:
    return {int(v) for k, v in torch.load(checkpoint)["model"].items() if "num_batches" in k}


def test_train_ddp_learns_and_resumes(tmp_path):
    script = str(ROOT / "examples" / "train_ddp.py")
    (line,) = torchrun(script, "--epochs", "1", cwd=tmp_path).splitlines()
    assert line.startswith("epoch 0: test accuracy ")
    assert tracked(tmp_path / "digits.pt") == {187}  # 1500 images, 2 ranks, 4 a step

    (line,) = torchrun(script, "--epochs", "2", cwd=tmp_path).splitlines()
    assert line.startswith("epoch 1: test accuracy ")
    assert float(line.split()[-1]) > 0.9
    assert tracked(tmp_path / "digits.pt") == {2 * 187}


def test_gradient_penalty_pulls_the_gradients_to_one(tmp_path):
    lines = torchrun(str(ROOT / "examples" / "gradient_penalty.py"), cwd=tmp_path).splitlines()
    norms = [float(line.split()[-1]) for line in lines]
    assert abs(norms[-1] - 1) < abs(norms[0] - 1) / 2


def test_the_compiled_layer_is_fused_with_its_neighbours(tmp_path):
    forward, backward, *kernel = torchrun(str(ROOT / "examples" / "compiled_kernels.py"), cwd=tmp_path).splitlines()
    before, after = forward.split("gather_moments, ")
    assert before.count("sum") == 1  # one kernel, for all the local moments
    assert re.search(r"sub\w*", after)
    assert re.search(r"relu", after)
    assert any("clamp_min" in line for line in kernel)
    assert sum("loadu(in_ptr" in line for line in kernel) > 4  # input, mean, invstd, weight, bias, shortcut
    before, after = backward.split("reduce_sums, ")
    assert re.search(r"sum_threshold_backward", before)
    assert re.search(r"threshold_backward", after.split(",")[0])


def test_readme_examples_run(tmp_path):
    """Its Python blocks, as written; a test in a block runs under pytest with the plugin's fixtures."""
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)):
        (tmp_path / f"test_readme_{number}.py").write_text(block)
    plugin = [] if entry_points(group="pytest11", name="syncnorm") else ["-p", "syncnorm.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert "1 passed" in done.stdout, done.stdout
