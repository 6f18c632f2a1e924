"""The examples, run as users run them, on two ranks; the tests check the figures that they print."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from launches import ROOT, SHIMS, needs, needs_torchvision_operators, numbers, python, torchrun

pytestmark = pytest.mark.timeout(300)  # three processes a test, which import torch: slow on a machine that does more


def example(name: str) -> str:
    return str(ROOT / "examples" / name)


def tracked(checkpoint: Path) -> set[int]:
    return {int(v) for k, v in torch.load(checkpoint)["model"].items() if "num_batches" in k}


@pytest.mark.slow
def test_train_ddp_learns_and_resumes(tmp_path):
    script = str(ROOT / "examples" / "train_ddp.py")
    (line,) = torchrun(script, "--epochs", "1", cwd=tmp_path).splitlines()
    assert line.startswith("epoch 0, 2 ranks: test loss ")
    assert tracked(tmp_path / "digits.pt") == {31}  # 1500 images, 48 a step

    resumed, *_, line = torchrun(script, "--epochs", "4", cwd=tmp_path).splitlines()
    assert resumed == "digits.pt has 1 of 4 epochs"
    assert line.startswith("epoch 3, 2 ranks: test loss ")
    assert float(line.split()[-1]) > 0.9
    assert tracked(tmp_path / "digits.pt") == {4 * 31}


@pytest.mark.slow
def test_gradient_penalty_pulls_the_gradients_to_one(tmp_path):
    lines = torchrun(str(ROOT / "examples" / "gradient_penalty.py"), cwd=tmp_path).splitlines()
    norms = [float(line.split()[-1]) for line in lines]
    assert abs(norms[-1] - 1) < abs(norms[0] - 1) / 2


@pytest.mark.slow
def test_micro_batches_in_step_take_the_step_of_the_whole_batch(tmp_path):
    lines = python(example("accumulate.py"), cwd=tmp_path).splitlines()
    distances = [float(re.search(r"first step (\S+) from", line)[1]) for line in lines]
    accuracies = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert distances[0] == 0
    assert min(distances[1:3]) > 1e-4  # the ways that are not exact
    assert distances[3] < 1e-6
    assert accuracies[3] > 80


@pytest.mark.slow
def test_gan_trains_like_one_process(tmp_path):
    first, last, difference = numbers(torchrun(example("wgan_gp.py"), cwd=tmp_path))
    assert abs(last - 1) < abs(first - 1) / 2
    assert difference < 1e-10


@pytest.mark.slow
def test_the_compiled_layer_is_fused_with_its_neighbors(tmp_path):
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


@pytest.mark.slow
def test_accelerate_gives_the_losses_of_one_process(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    *two, norms = python(*launch, example("train_accelerate.py"), cwd=tmp_path).splitlines()
    *one, _ = python(example("train_accelerate.py"), cwd=tmp_path).splitlines()
    assert norms == "saved with BatchNorm2d"
    assert (tmp_path / "model.pt").exists()
    steps, losses = zip(*map(numbers, two), strict=True)
    assert steps == (10, 20, 30, 40, 50)
    assert losses == pytest.approx([numbers(line)[1] for line in one], abs=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_masked_speech_equals_one_process(tmp_path):
    first, last, masked, unmasked = map(numbers, torchrun(example("speech_block.py"), cwd=tmp_path).splitlines())
    assert last[1] < first[1] / 2
    assert masked[0] < 1e-5
    assert unmasked[0] > 1e-2


@pytest.mark.slow
def test_fsdp2_trains_like_one_process_and_reverts(tmp_path):
    head, *before, weights, _, a, b = torchrun(example("fsdp2.py"), cwd=tmp_path).splitlines()
    assert head.startswith("layer")
    *layers, group = before
    assert all("SyncBatchNorm2d  yes     ranks [0, 1]" in line for line in layers)
    assert "ranks [0, 1]: transport auto" in group
    assert numbers(weights)[0] < 1e-4
    assert a.split()[1:3] == b.split()[1:3] == ["BatchNorm2d", "no"]


@pytest.mark.slow
def test_lightning_converts_and_reverts(tmp_path):
    needs("lightning")
    *epochs, after = [
        line
        for line in python(example("lightning_layer_sync.py"), cwd=tmp_path, path=SHIMS).splitlines()
        if line.startswith(("epoch", "after"))
    ]
    _, losses, difference = zip(*map(numbers, epochs), strict=True)
    assert losses[-1] < 0.8 * losses[0]
    assert difference == (0, 0, 0)
    assert after == "after fit: BatchNorm2d BatchNorm2d"


@pytest.mark.slow
def test_hugging_face_converts_and_reverts(tmp_path):
    needs("transformers")
    lines = torchrun(example("hf_trainer.py"), cwd=tmp_path, path=SHIMS).splitlines()
    lines = [line for line in lines if ": loss" in line]
    assert [line.split(":")[0] for line in lines] == [
        "ResNetForImageClassification",
        "SegformerForSemanticSegmentation",
    ]
    for line in lines:
        first, last, difference = numbers(line)
        assert last < 0.9 * first
        assert difference == 0
        assert "BatchNorm2d" in line
        assert "SyncBatchNorm" not in line


@pytest.mark.slow
def test_detection_finds_digits(tmp_path):
    small, large, _, difference = numbers(torchrun(example("detection.py"), cwd=tmp_path))
    assert min(small, large) > 35
    assert difference == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("segmentation", ()),
        ("detection", ()),
        ("torchvision_detection", ("torchvision", "torchmetrics", "faster_coco_eval")),
        ("gan", ()),
        ("hugging_face", ("transformers",)),
        ("speech", ()),
    ],
)
def test_jobs_are_compared_from_file_to_page(tmp_path, name, packages):
    needs(*packages)
    if name == "torchvision_detection":
        needs_torchvision_operators()
    short = ("--steps", "4", "--parity-steps", "1", "--seeds", "1", "--json", "out.json", "--html", "page.html")
    printed = python("-m", "syncnorm", "compare", f"{example('jobs')}/{name}.toml", *short, cwd=tmp_path, path=SHIMS)
    assert "SyncBN is correct here: in step 1" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["task"]["model"].partition(":")[0] == name
    for arm in found["arms"]:
        assert arm["not_run"] is None
        assert arm["seeds"][0]["test_metric"] is not None
        assert len(arm["seeds"][0]["units"]) >= 10
    assert "<table" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_onnx_file_has_plain_batch_norm(tmp_path):
    needs("onnx", "onnxscript")
    file = tmp_path / "digits.onnx"
    *_, line = torchrun(example("export_onnx.py"), "--file", str(file), cwd=tmp_path).splitlines()
    assert line.startswith("BatchNormalization;")
    assert numbers(line)[0] < 1e-5
    assert file.exists()


@pytest.mark.slow
def test_the_tests_to_copy_run(tmp_path):
    """examples/test_my_ddp.py, under pytest with the plugin's fixtures."""
    shutil.copy(example("test_my_ddp.py"), tmp_path)
    plugin = [] if entry_points(group="pytest11", name="syncnorm") else ["-p", "syncnorm.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert "6 passed" in done.stdout, done.stdout
