"""`syncnorm bench layer --device cuda` in each of its worlds; without a GPU everything here is skipped."""

import csv
import json
import sys

import pytest
import torch

from syncnorm.__main__ import main
from syncnorm.tools.bench.contenders import SYNCNORM, TORCH
from syncnorm.tools.bench.layers import (
    CACHE_MULTIPLE,
    MAX_SETS,
    LayerStep,
    cache_size,
    cache_to_outgrow,
    make_inputs,
)
from syncnorm.tools.bench.measure import interleaved
from syncnorm.tools.bench.shapes import CUDA_SHAPES
from syncnorm.tools.bench.single_process import fake_world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONTENDERS = ["local", "floor", "E[x^2]", "syncnorm", "torch"]
# Larger than the cache, and smaller.
SHAPES = "64,256,56,56;8,64,7,7"


@pytest.mark.parametrize("world", [["fake", "--world", "8"], ["nccl"], ["gloo"]], ids=lambda world: world[0])
def test_a_small_run_has_all_columns(world, monkeypatch, capsys, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv")}
    arguments = ["layer", "--device", "cuda", "--backend", *world, "--quick", "--shapes", SHAPES]
    arguments += ["--json", str(files["json"]), "--csv", str(files["csv"])]
    monkeypatch.setattr(sys, "argv", ["syncnorm", "bench", *arguments])
    assert main() == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "…" not in out
    assert "not run" not in out.lower()
    assert "not measured" not in " ".join(out.split()).replace("not measured, no row is so fast", "")
    found = json.loads(files["json"].read_text())
    assert (found["hardware"]["device"], found["hardware"]["backend"]) == ("cuda", world[0])
    assert found["memory"]["copy_bandwidth"] > 1e10
    assert len(found["rows"]) == 2 * 2 * 2  # shapes, memory formats, dtypes
    for row in found["rows"]:
        assert [peer["name"] for peer in row["peers"]] == CONTENDERS
        assert all(min(peer["seconds"]) > 0 for peer in row["peers"])
        assert row["peers"][3]["ratio_to"]["torch"] > 0
        assert sorted(row["bandwidth_shares"]) == sorted(CONTENDERS)
        assert 0 < row["bandwidth_shares"]["syncnorm"] < 1.5
        outgrown = 2 * row["num_bytes"] * row["input_sets"] >= CACHE_MULTIPLE * found["memory"]["cache_bytes"]
        assert outgrown or row["input_sets"] == MAX_SETS
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [line["peer"] for line in lines] == CONTENDERS * 8
    empty = {"not_run", "blocks_median_us", "blocks_ratio_to_local"}  # on a GPU all times are those of blocks
    empty |= {f"ratio_to_{name}" for name in ("local", "floor", "mean_of_squares", "torch")}
    assert all(value for line in lines for name, value in line.items() if name not in empty)


def test_torch_reports_the_size_of_the_cache():
    assert cache_size(torch.device("cuda")) == cache_to_outgrow(torch.device("cuda")) >= 2**20


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
def test_nothing_waits_for_the_device_inside_a_block():
    """The steps of the synchronized layer, and what the benchmark does between them, in a block of four."""
    device = torch.device("cuda", torch.cuda.current_device())
    with fake_world(8, device) as ranks:
        inputs = make_inputs((4, 8, 5, 5), "channels_last", "bf16", device, seed=0)[:3]
        step = LayerStep(SYNCNORM.build(4, 8).to(device), inputs)
        step()

        def block():
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(4):
                    step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        (seconds,) = interleaved({"syncnorm": block}, ranks, 1, 1)["syncnorm"]
    assert 0 < seconds < 1


def test_a_group_of_one_reaches_the_synchronized_kernels_of_torch():
    device = torch.device("cuda", torch.cuda.current_device())
    with fake_world(1, device):
        layer = TORCH.build(4, 3).to(device)
        x = torch.randn(4, 3, 5, 5, device=device)
        y = layer(x)
        assert "SyncBatchNorm" in type(y.grad_fn).__name__
        torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def test_the_largest_row_fits():
    """Of the default table: the largest tensors of all contenders, with one set of inputs."""
    largest = max(CUDA_SHAPES, key=lambda shape: torch.Size(shape).numel())
    if torch.cuda.get_device_properties(0).total_memory < 12 * 4 * torch.Size(largest).numel():
        pytest.skip("not enough GPU memory")
    device = torch.device("cuda", torch.cuda.current_device())
    with fake_world(8, device):
        inputs = make_inputs(largest, "channels_last", "fp32", device, seed=0)
        for contender in (SYNCNORM, TORCH):
            LayerStep(contender.build(4, largest[1]).to(device), inputs)()
    assert len(inputs) == 1
