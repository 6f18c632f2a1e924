"""What makes `syncnorm bench` fair on one GPU, as far as a CPU can test it."""

import csv
import importlib
import json
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncnorm.__main__ import main
from syncnorm.comm import peers_of, process_groups
from syncnorm.testing import assert_close, batch_norm_oracle
from syncnorm.tools.bench import LayerRow, MemorySpeed
from syncnorm.tools.bench.contenders import BASELINES, SYNCNORM, TORCH, TorchSyncedInWorldOfOne
from syncnorm.tools.bench.layers import (
    COPIED_BYTES,
    LayerStep,
    cache_size,
    cache_to_outgrow,
    make_inputs,
    measure_memory,
    num_input_sets,
)
from syncnorm.tools.bench.measure import timings
from syncnorm.tools.bench.single_process import fake_world, world_of_one
from syncnorm.tools.bench.summary import gpu_summary

CPU = torch.device("cpu")

# --- inputs in rotation, bandwidth


def test_input_sets_outgrow_the_cache():
    cache = 50 * 2**20
    for set_bytes in (2**20, 2 * 10**7, 10**9):
        sets = num_input_sets(set_bytes, cache)
        assert sets * set_bytes >= 4 * cache
        assert sets == 1 or (sets - 1) * set_bytes < 4 * cache  # no more than needed
    assert num_input_sets(8, cache) == 1024
    assert num_input_sets(8, cache_to_outgrow(CPU)) == 1


def test_steps_cycle_through_the_sets_and_keep_one_gradient(monkeypatch):
    monkeypatch.setattr("syncnorm.tools.bench.layers.cache_to_outgrow", lambda device: 600)
    inputs = make_inputs((2, 3, 4, 5), "channels_last", "fp32", CPU, seed=0)
    assert len(inputs) == 3  # of 960 bytes each
    assert len({x.data_ptr() for pair in inputs for x in pair}) == 6
    step = LayerStep(nn.BatchNorm2d(3), inputs)
    other = LayerStep(nn.BatchNorm2d(3), inputs)  # contenders share the inputs
    for turn in range(7):
        step()
        has_gradient = [x.grad is not None for x, _ in inputs]
        assert has_gradient == [n == turn % 3 for n in range(3)]
    want = inputs[0][0].grad.clone()
    other()
    assert torch.equal(inputs[0][0].grad, want)  # of this step, not the sum of both


def test_bandwidth_of_a_copy(monkeypatch):
    monkeypatch.setitem(COPIED_BYTES, "cpu", 2**24)
    with world_of_one("gloo", CPU) as ranks:
        memory = measure_memory(ranks)
    assert 1e8 < memory.copy_bandwidth < 1e13
    assert memory.cache_bytes == cache_size(CPU)
    assert memory.cache_bytes is None or 2**15 <= memory.cache_bytes < 2**31


# --- worlds of one process


def step_once(layer):
    x, dy = make_inputs((3, 4, 5, 6), "contiguous", "fp32", CPU, seed=1)[0]
    LayerStep(layer, [(x, dy)])()
    return x, dy


def test_a_group_of_one_synchronizes_with_itself_only_on_request():
    layer = SYNCNORM.build(4, 4)
    with world_of_one("gloo", CPU):
        step_once(layer)
        assert peers_of(dist.group.WORLD).exchange is None
        with process_groups.sync_in_world_of_one():
            layer = SYNCNORM.build(4, 4)
            x, dy = step_once(layer)
        assert peers_of(dist.group.WORLD).exchange.calls == 2  # forward and backward
        assert process_groups.synced_group(None) is None
    zeros, ones = torch.zeros(4), torch.ones(4)
    want = batch_norm_oracle([x.detach()], [dy], ones, zeros, zeros, ones)
    assert_close(x.grad, want.grad_inputs[0], torch.float32)
    assert_close(layer.weight.grad, want.grad_weight[0], torch.float32)
    assert_close(layer.running_var, want.running_var, torch.float32)


@pytest.mark.parametrize(("world_size", "kind"), [(1, TorchSyncedInWorldOfOne), (8, nn.SyncBatchNorm)])
def test_torchs_layer_syncs_in_a_world_of_one_too(world_size, kind):
    with fake_world(world_size, CPU):
        layer = TORCH.build(4, 3)
        assert type(layer) is kind
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            layer(torch.randn(2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor")  # torch 2.13 renamed it
@pytest.mark.parametrize("shape", [(8 * 3,), (8, 3), (1, 8 * 3), (2, 4 * 3)])
@pytest.mark.parametrize("name", ["all_gather_single", "all_gather_into_tensor"])
def test_a_fake_world_gathers_into_any_shape(name, shape):
    gather = getattr(dist, name, None)
    if gather is None:
        pytest.skip(f"this torch has no {name}")
    row, rows = torch.arange(3.0), torch.empty(shape)
    with fake_world(8, CPU):
        getattr(dist, name)(rows, row)  # torch's layer uses (1, W n)
        getattr(dist, name)(output_tensor=rows, input_tensor=row, group=dist.group.WORLD)
    assert torch.equal(rows.view(8, 3), row.expand(8, 3))
    assert getattr(dist, name) is gather


# --- targets


def made_up_row(ours, torchs, num_bytes=2**20, share=0.5):
    seconds = {"syncnorm": [ours] * 2} | ({} if torchs is None else {"torch": [torchs] * 2})
    timed = timings(seconds, BASELINES, {} if torchs else {"torch": "no GPU"})
    return LayerRow((2, 3), "contiguous", "fp32", num_bytes, 9, timed, 1, {"syncnorm": share})


def judged(rows, device="cuda", cache_bytes=50 * 2**20):
    return [(f.value, f.met, f.where) for f in gpu_summary(rows, MemorySpeed(1e12, cache_bytes), device)]


def test_targets_of_one_gpu():
    launches = [made_up_row(100e-6, 200e-6), made_up_row(180e-6, 180e-6), made_up_row(300e-6, 150e-6)]
    large = [made_up_row(1e-3, 1e-3, 2**28, 0.8), made_up_row(2e-3, 1.5e-3, 2**28, 0.9)]
    under, ratio, slower, bandwidth = judged([*launches, *large])
    assert under == (pytest.approx(0.6), None, "3 of 5")
    assert ratio == (pytest.approx(1.0), False, "lowest 0.50")
    assert slower == (pytest.approx(0.4), False, "2 of 5")
    assert bandwidth == (pytest.approx(0.8485, abs=1e-4), False, "2 rows, lowest 0.80")
    assert [met for _, met, _ in judged([made_up_row(1e-4, 2e-4), made_up_row(1, 2, 2**30, 0.9)])] == [
        None, True, True, True,
    ]  # fmt: skip


def test_what_was_not_measured_is_not_judged():
    assert judged([made_up_row(1e-4, None)]) == [
        *[(None, None, "torch's layer did not run")] * 3,
        (None, None, "all rows fit the cache"),
    ]
    _, ratio, _, bandwidth = judged([made_up_row(1.0, 2.0)], cache_bytes=None)
    assert ratio == (None, None, "no row is so fast")
    assert bandwidth == (None, None, "cache size not known")
    assert judged([made_up_row(1e-4, 2e-4, 2**28, 0.5)], "cpu")[3][:2] == (0.5, None)  # no target there
    assert judged([]) == []


# --- the command


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_fake_world_in_one_process(world_size, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")  # notes on one line
    monkeypatch.setitem(COPIED_BYTES, "cpu", 2**22)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv")}
    arguments = ["layer", "--backend", "fake", "--world", str(world_size), "--device", "cpu", "--quick"]
    arguments += ["--dtypes", "fp32", "--shapes", "4,8,5,5", "--json", str(files["json"]), "--csv", str(files["csv"])]
    monkeypatch.setattr(sys, "argv", ["syncnorm", "bench", *arguments])
    gathered = []
    native = importlib.import_module("syncnorm.comm.native")
    gather = native.NativeCall.gather
    monkeypatch.setattr(native.NativeCall, "gather", lambda *args: gathered.append(gather(*args)) or gathered[-1])
    threads = torch.get_num_threads()
    assert main() == 0
    assert {rows.size(0) for rows in gathered} == {world_size}
    assert torch.get_num_threads() == threads
    assert not dist.is_initialized()
    out, err = capsys.readouterr()
    assert err == "" or err.startswith("1/2 ")
    assert f"Rank 0 of {world_size}, without the other ranks" in out
    assert out.count("not measured, torch's layer did not run") == 3
    assert "met" not in out.split()  # the CPU targets are for ranks that wait for each other
    found = json.loads(files["json"].read_text())
    assert (found["hardware"]["backend"], found["settings"]["world_size"]) == ("fake", world_size)
    assert len(found["rows"]) == 2
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert float(lines[3]["copy_bandwidth_gb"]) == pytest.approx(found["memory"]["copy_bandwidth"] / 1e9, abs=0.01)
    share = found["rows"][0]["bandwidth_shares"]["syncnorm"]
    assert float(lines[3]["bandwidth_share"]) == pytest.approx(share, abs=1e-4)


def test_a_single_process_world_needs_a_process_without_a_group(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["syncnorm", "bench", "layer", "--backend", "fake", "--device", "cpu"])
    with fake_world(2, CPU):
        assert main() == 2
    assert "fake needs a process group of its own, and this process has one" in capsys.readouterr().err
