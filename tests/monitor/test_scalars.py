"""The monitor's numbers on two ranks, as they stand in a TensorBoard event file, against its findings."""

import time
from math import sqrt

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.monitor import monitor, scalars_of
from syncnorm.monitor.findings import LayerSample, Sample
from syncnorm.monitor.scalars import LAST_NAME
from syncnorm.testing import run_ranks

PER_LAYER = ("divergence_mean", "divergence_var", "wait_ms", "wait_ms_max", "buffers_differ")
OF_ALL = ("divergence_mean", "divergence_var", "wait_ms", "wait_ms_max", "straggler", "step_ms", "buffers_differ")


def _rank_train_with_tensorboard(folder: str, synced: bool):
    """Rank 1 sleeps in each step; each rank writes to a folder of its own."""
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = syncnorm.convert(model) if synced else model
    ddp = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    with (
        SummaryWriter(f"{folder}/{rank}") as writer,
        monitor(ddp, every=2, log=None, scalars=writer.add_scalar) as watch,
    ):
        for _ in range(6):
            if rank == 1:
                time.sleep(0.2)
            ddp(torch.randn(16, 4, generator=generator) + rank).sum().backward()
    return watch.findings()


def read(folder) -> dict[str, dict[int, float]]:
    """By name: step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("synced", [True, False])
def test_a_tensorboard_file_has_every_number_of_every_sampled_step(tmp_path, synced):
    pytest.importorskip("tensorboard")
    found, _ = run_ranks(_rank_train_with_tensorboard, 2, (str(tmp_path), synced))
    written = read(tmp_path / "0")
    per_layer = PER_LAYER if synced else [name for name in PER_LAYER if not name.startswith("wait")]
    assert written.keys() == {
        *(f"syncnorm/{name}/{layer}" for layer in "14" for name in per_layer),
        *(f"syncnorm/all/{name}" for name in OF_ALL),
    }
    assert all(list(values) == [2, 4, 6] for values in written.values())
    assert read(tmp_path / "1") == {}  # the first rank writes alone

    def mean(name, power=1):
        return sum(value**power for value in written[f"syncnorm/{name}"].values()) / 3

    for layer in found.layers:
        assert sqrt(mean(f"divergence_mean/{layer.name}", 2)) == pytest.approx(layer.spread_mean)
        assert sqrt(mean(f"divergence_var/{layer.name}", 2)) == pytest.approx(layer.spread_var)
        assert mean(f"buffers_differ/{layer.name}") == (0 if synced else 1)
        if synced:
            assert mean(f"wait_ms/{layer.name}") == pytest.approx(sum(layer.wait_ms) / 2)
    assert mean("all/wait_ms") == pytest.approx(sum(found.wait_ms) / 2)
    assert mean("all/wait_ms_max") == pytest.approx(max(found.wait_ms))  # rank 0 waits longest in every step
    assert mean("all/straggler") == found.straggler == 1
    assert mean("all/wait_ms_max") > 150
    assert mean("all/step_ms") >= max(found.step_ms) * 0.999
    assert mean("all/buffers_differ") == (0 if synced else 2)


def test_without_ranks_there_is_nothing_to_wait_for():
    seen = []
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with monitor(model, every=1, log=None, scalars=lambda *scalar: seen.append(scalar)):
        model(torch.randn(8, 4))
    assert {step for _, _, step in seen} == {1}
    names = [name for name, _, _ in seen]
    assert not any("wait" in name or "straggler" in name for name in names)
    assert names[-1] == LAST_NAME
    assert ("syncnorm/divergence_mean/1", 0.0, 1) in seen


def layer(name="(model)", ran=True, wait_ms=(4.0, 1.0, 7.0), differing=()):
    spread = 0.5 if ran else None
    return LayerSample(name, True, ran, spread, spread, wait_ms, differing)


def test_what_is_unknown_is_left_out_and_the_last_name_is_always_the_same():
    sample = Sample(3, (9.0, 8.0, 9.5), None, (layer(), layer("unused", ran=False, wait_ms=None)))
    scalars = dict(scalars_of(sample))
    assert scalars["syncnorm/divergence_mean/model"] == 0.5  # the model itself is the layer
    assert (scalars["syncnorm/wait_ms/model"], scalars["syncnorm/wait_ms_max/model"]) == (4.0, 7.0)
    assert [name for name in scalars if "unused" in name] == ["syncnorm/buffers_differ/unused"]
    assert scalars["syncnorm/all/straggler"] == 1
    assert scalars["syncnorm/all/step_ms"] == 9.5
    assert list(scalars)[-1] == LAST_NAME
    even = dict(scalars_of(Sample(3, (9.0, 9.0), None, (layer(wait_ms=(4.0, 4.1)),))))
    assert even["syncnorm/all/straggler"] == -1
