"""The monitor finds deliberate differences, does not change the training, and leaves nothing behind."""

import copy
import importlib
import pickle
import re
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.__main__ import main
from syncnorm._torch_versions import DDP_BUFFERS
from syncnorm.comm.call import observers
from syncnorm.errors import InputError, SyncNormError
from syncnorm.monitor import monitor
from syncnorm.monitor.findings import Findings, find_straggler
from syncnorm.testing import run_ranks
from syncnorm.tools.diagnose import Overhead, TrainingRun, diagnose


def build(synced: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    return syncnorm.convert(model) if synced else model


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def _rank_train(
    every: int, synced: bool = True, shift: float = 0.0, sleep_s: float = 0.0, broadcast: bool = True, steps: int = 6
) -> dict[str, Any]:
    """A few steps with the monitor; on rank 1 ``shift`` is added to the data and each step sleeps for ``sleep_s``."""
    rank, lines = dist.get_rank(), []
    model = build(synced)
    ddp = DistributedDataParallel(model, **{DDP_BUFFERS: broadcast})
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    generator = torch.Generator().manual_seed(5 if shift else 5 + rank)
    with monitor(ddp, every=every, log=lines.append) as watch:
        for _ in range(steps):
            if rank == 1:
                time.sleep(sleep_s)
            optimizer.zero_grad()
            x = torch.randn(16, 4, generator=generator) + shift * rank
            y = ddp(x)
            y.backward(torch.randn(y.shape, generator=generator))
            optimizer.step()
            ddp.eval()(x)  # a step is a forward in training
            ddp.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"found": watch.findings(), "lines": lines, "state": state, "left": (hooks_of(ddp), len(observers))}


def test_training_computes_the_same_bits_and_nothing_is_left_behind():
    on, off = run_ranks(_rank_train, 2, (2,)), run_ranks(_rank_train, 2, (0,))
    for with_, without in zip(on, off, strict=True):
        assert all(torch.equal(value, without["state"][name]) for name, value in with_["state"].items())
        assert with_["left"] == without["left"] == (0, 0)
        assert with_["found"] == on[0]["found"]  # the same on every rank
    assert (off[0]["lines"], off[0]["found"].samples) == ([], 0)
    assert [line.split(":")[0] for line in on[0]["lines"][:-1]] == ["step 2", "step 4", "step 6"]
    assert on[1]["lines"] == []
    assert (on[0]["found"].steps, on[0]["found"].samples) == (6, 3)


def test_a_sleeping_rank_is_the_straggler():
    # The others wait in DDP's broadcast, or without it in the first layer.
    for broadcast in (True, False):
        found: Findings = run_ranks(_rank_train, 2, (2, True, 0.0, 0.6, broadcast, 2))[0]["found"]
        assert (found.ddp_wait_ms is not None) == broadcast
        assert found.wait_ms[0] > 500
        assert found.straggler == 1
        assert "rank 1 is a straggler" in str(found)


def test_divergence_follows_the_data():
    near, far = (run_ranks(_rank_train, 2, (1, True, shift))[0]["found"] for shift in (1e-9, 5.0))
    assert near.layers[0].spread_mean < 1e-6
    assert far.layers[0].spread_mean > 0.5
    assert "so similar" in str(near)
    assert "That is large" in str(far).replace("\n", " ")


@pytest.mark.parametrize(
    ("broadcast", "consequence"), [(True, "DDP overwrites them"), (False, "Nothing makes them equal")]
)
def test_plain_batch_norms_differ_and_the_consequence_is_named(broadcast, consequence):
    found = run_ranks(_rank_train, 2, (3, False, 0.0, 0.0, broadcast))[0]["found"]
    assert [layer.differing for layer in found.layers] == [("running_mean", "running_var")] * 2
    assert (found.wait_ms is not None, found.ddp_broadcasts) == (broadcast, broadcast)
    assert consequence in str(found).replace("\n", " ")
    assert ("Waiting: unknown" in str(found)) == (not broadcast)


def _rank_change_one_buffer(which: str) -> Findings:
    model = build()
    with monitor(model, every=1, log=None) as watch:
        model(torch.randn(8, 4))
        if dist.get_rank() == 1:
            model.get_buffer(which).view(-1)[0] += 1
        watch.step()
    return watch.findings()


@pytest.mark.parametrize("which", ["4.running_var", "4.num_batches_tracked"])
def test_a_changed_buffer_is_found(which):
    found = run_ranks(_rank_change_one_buffer, 2, (which,))[0]
    buffer = which.partition(".")[2]
    assert [layer.differing for layer in found.layers] == [(), (buffer,)]
    assert f"Buffers of 4 differ: {buffer}, although the layers are synced" in str(found).replace("\n", " ")
    assert (found.steps, found.samples) == (1, 1)


def _rank_monitor_masked() -> Findings:
    layer = syncnorm.SyncBatchNorm1d(3)
    x = torch.ones(4, 3, 5).cumsum(2)
    mask = torch.arange(5) < 3
    with monitor(layer, every=1, log=None) as watch:  # the model is the layer
        layer(x.masked_fill(~mask, 1e6 * dist.get_rank()), mask=mask)
    return watch.findings()


def test_masked_positions_are_ignored():
    assert run_ranks(_rank_monitor_masked, 2)[0].layers[0].spread_mean == 0


def _rank_exception_and_disagreement() -> list[Any]:
    model, seen = build(), []
    try:
        with monitor(model, every=1, log=seen.append):
            model(torch.randn(8, 4))
            raise KeyError
    except KeyError:
        pass
    seen.append((hooks_of(model), len(observers)))
    if dist.get_rank() == 1:
        model = model[:2]
    try:
        with monitor(model, every=1):
            pass
    except SyncNormError as error:
        seen.append(str(error))
    seen.append((hooks_of(model), len(observers)))
    return seen


def test_nothing_is_left_after_an_exception_or_a_disagreement():
    for seen in run_ranks(_rank_exception_and_disagreement, 2):
        assert seen[0] == seen[2] == (0, 0)
        assert seen[1].startswith(
            "syncnorm.monitor.monitor needs the same batch norms on all ranks: "
            "rank 0 of the group has '4' with 8 channels, rank 1 has no further one"
        )


def test_copies_and_pickles_of_a_monitored_model_are_not_monitored():
    model = build()
    x = torch.randn(8, 4)
    with monitor(model, every=1, log=None) as watch:
        model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for made in copies:
            made(x)
            assert torch.equal(made.eval()(x), copies[0].eval()(x))
        assert watch._forwards == 1
    assert watch.findings().samples == 1
    assert "only one rank: nothing to synchronize" in str(watch.findings())


def test_bad_arguments():
    with pytest.raises(InputError, match="every must be 0"):
        monitor(build(), every=-1)
    with pytest.raises(InputError, match="lazy layers"), monitor(nn.LazyBatchNorm1d(), every=1):
        pass


@pytest.mark.parametrize(
    ("waits", "rank"),
    [((1.0, 9.0), 0), ((9.0, 1.0, 8.0), 1), ((0.1, 0.5), None), ((5.0, 6.0), None), (None, None), ((3.0,), None)],
)
def test_the_straggler_is_the_rank_that_waits_least(waits, rank):
    assert find_straggler(waits) == rank


def test_the_command_prints_lines_table_and_sentences(monkeypatch, capsys, tmp_path):
    found = diagnose(TrainingRun(build_small, data_small, steps=4, every=2, sync=False), 2)
    assert isinstance(found, Findings)
    # By its path, because the package has a command with the name of the module.
    command = importlib.import_module("syncnorm.tools.cli.diagnose")
    monkeypatch.setattr(command, "run_diagnose", lambda run, ranks: found)
    monkeypatch.setattr(sys, "argv", ["syncnorm", "diagnose", "--json", str(tmp_path / "x.json")])
    assert main() == 0
    out = capsys.readouterr().out
    assert re.search("^1 +BatchNorm1d +no ", out, re.MULTILINE)
    assert "differ: running_mean, running_var" in out
    assert '"schema": "syncnorm.diagnose"' in (tmp_path / "x.json").read_text()


def test_the_overhead_is_measured_in_turns():
    found = diagnose(TrainingRun(build_small, data_small, repetitions=1), 2)
    assert isinstance(found, Overhead)
    assert found.ratios["off"] == [1.0]
    assert found.ratios.keys() == {"off", "every 50", "every 1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "0"], "every must be at least 1, got 0"),
        (["--every", "9", "--steps", "5"], "every must be at most steps (5), got 9"),
        (["--model", "nothing"], "--model 'nothing': expected package.module:function"),
        (["--ranks", "1"], "diagnose needs at least 2 ranks, got 1"),
    ],
)
def test_bad_options_print_one_line_and_exit_with_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["syncnorm", "diagnose", *arguments])
    assert main() == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def build_small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def data_small() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    data = torch.utils.data.TensorDataset(x, y)
    return data, data
