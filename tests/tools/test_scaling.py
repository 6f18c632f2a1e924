import io
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pictures import recorded_pictures
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import syncnorm
from syncnorm import comm
from syncnorm.comm import exchange_of
from syncnorm.comm.frames import capacity_for
from syncnorm.comm.gather import gather_rows
from syncnorm.comm.native import SUM_FROM_RANKS
from syncnorm.layer.global_sums import pack_sums_of_moments
from syncnorm.testing import run_ranks
from syncnorm.tools.bench import Benchmark, BenchSettings, Parameters, scaling
from syncnorm.tools.bench.cluster_model import (
    Cluster,
    GpuCost,
    backward_bytes,
    by_gather,
    by_sum,
    by_two_gathers,
    gathered_bytes,
    of_layers,
    reduced_bytes,
    resnet50_channels,
    sum_pays_from,
    summed_bytes,
)
from syncnorm.tools.bench.cost_model import (
    Host,
    Network,
    bytes_received,
    fit_host,
    fit_network,
    flat,
    frame_bytes,
    over_gloo,
    two_level,
    two_level_pays_from,
    worlds_up_to,
)
from syncnorm.tools.bench.records import SCALING
from syncnorm.tools.bench.scaling import CHANNELS, measured_worlds
from syncnorm.tools.bench.scaling_records import Cost, HostSample, Scaling
from syncnorm.tools.bench.simulation import LARGEST, measure_host, model_channels, simulate
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.report.bench_plot import write_plot
from syncnorm.tools.report.scaling_terminal import render_scaling, render_simulation

NETWORK = Network(latency=100e-6, per_message=10e-6, per_byte=1e-9)
HOST = Host(base=1e-3, per_channel=1e-7, per_row=1e-6, per_value=1e-8)
CLUSTER = Cluster(
    launch=5e-6, hop=2e-6, per_byte=1e-10, tree_hop=3e-6, node_hop=1e-6, ring_node_hop=1.5e-6, node_per_byte=1e-11
)


# --- arithmetic, on made-up parameters


def test_a_world_of_one_costs_nothing():
    assert over_gloo(NETWORK, HOST)(1, 64) == 0
    assert by_gather(CLUSTER, 1, 64).seconds == by_sum(CLUSTER, 1, 64).seconds == 0
    assert bytes_received(1, 64) == 0


def test_the_flat_cost_is_linear_in_ranks_and_layers():
    cost = over_gloo(NETWORK, HOST)
    one, four = flat(cost, [64]), flat(cost, [64] * 4)
    steps = [one(w + 1) - one(w) for w in range(2, 50)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert four(9) == pytest.approx(4 * one(9))


def test_an_exchange_by_hand():
    # 2 rounds of 100 us, 7 others at 10 us and 576 ns each; 8 rows of 1 us and 64 values of 10 ns.
    assert frame_bytes(64) == 576
    assert over_gloo(NETWORK, HOST)(8, 64) == pytest.approx(2 * (100e-6 + 7 * 10.576e-6) + 8 * 1.64e-6)
    assert HOST.own(10) == pytest.approx(1.001e-3)
    assert bytes_received(8, 64) == 2 * 7 * 576


def test_collectives_of_gpus_by_hand():
    # On a node: 3 hops of 520 bytes; 6 hops of a ring, which a tree takes too, of a quarter of 516 or 1,552 bytes.
    backward = 5e-6 + 6 * (1e-6 + 129e-11)
    assert by_gather(CLUSTER, 4, 64) == approx(3 * 520 + 774, 5e-6 + 3 * (1e-6 + 520e-11) + backward)
    assert by_sum(CLUSTER, 4, 64) == approx(6 * 388 + 774, 5e-6 + 6 * (1e-6 + 388e-11) + backward)
    # On 4 nodes: a ring has 28 hops inside and 3 between them; a tree twice a chain of 7 hops and 2 hops between.
    received = 2 * 31 / 32
    backward = 5e-6 + 2 * (7 * 1e-6 + 2 * 3e-6) + received * 516 * 1e-10
    gather = 5e-6 + 28 * 1.5e-6 + 3 * 2e-6 + 31 * 520 * 1e-10
    assert by_gather(CLUSTER, 32, 64) == approx(31 * 520 + received * 516, gather + backward)
    summed = 5e-6 + 2 * (7 * 1e-6 + 2 * 3e-6) + received * 1552 * 1e-10
    assert by_sum(CLUSTER, 32, 64) == approx(received * (1552 + 516), summed + backward)
    two = 5e-6 + 7 * (1e-6 + 520e-11) + 5e-6 + 3 * (3e-6 + 520e-10)
    assert by_two_gathers(CLUSTER, 32, 64) == approx(10 * 520 + received * 516, two + backward)


def approx(received, seconds):
    return GpuCost(pytest.approx(received), pytest.approx(seconds))


def test_the_sum_pays_from_where_each_larger_world_costs_less():
    cluster, widths = Parameters().cluster(), resnet50_channels()
    assert len(widths) == 53
    assert sum(widths) == 26560
    for channels in (widths, (64,), (2048,)):
        found = sum_pays_from(cluster, channels, 1024)
        gains = {
            w: of_layers(by_sum, cluster, w, channels).seconds < of_layers(by_gather, cluster, w, channels).seconds
            for w in range(8, 1025, 8)
        }
        assert all(gains[w] for w in gains if w >= found)
        assert not gains[found - 8]
    assert sum_pays_from(cluster, (64,), 8) is None


def test_the_layer_sums_from_where_the_model_says():
    gpus = made_up(4096).gpus
    assert gpus.sum_pays_from_layer == SUM_FROM_RANKS
    assert gpus.sum_pays_from <= SUM_FROM_RANKS


def test_the_bytes_of_a_sum_do_not_grow_with_the_world():
    worlds = {w.world_size: w for w in made_up(4096).gpus.worlds}
    assert worlds[4096].gather.received > 400 * worlds[8].gather.received
    assert worlds[4096].summed.received < 1.2 * worlds[8].summed.received
    assert worlds[8].two_level is None
    assert worlds[4096].summed.received < worlds[4096].two_level.received < worlds[4096].gather.received
    # 1,023 rows of 4,096 values, a count and a tag: 16 MB.
    backward = reduced_bytes(1024, backward_bytes(2048))
    assert by_gather(CLUSTER, 1024, 2048).received - backward == 1023 * 4 * 4098


def test_the_best_split_is_found_by_trying_all():
    step = flat(over_gloo(NETWORK, HOST), [64, 256])
    for world_size in (12, 64, 60, 1024):
        best = min(step(g) + step(world_size // g) for g in range(2, world_size) if world_size % g == 0)
        g, seconds = two_level(step, world_size)
        assert seconds == pytest.approx(best)
        assert step(g) + step(world_size // g) == pytest.approx(best)
    assert two_level(step, 13) is None
    assert two_level(step, 1024)[0] == 32


@pytest.mark.parametrize("latency", [1.0, 5.0, 30.0, 1e9])
def test_the_break_even_is_where_the_formula_says(latency):
    # latency + (W - 1) against 2 latency + g + W / g - 2: pays where W > latency + g + W / g - 1.
    found = two_level_pays_from(lambda w: 0.0 if w == 1 else latency + w - 1, 2000)

    def better(w, g):
        return w > latency + g + w // g - 1

    split = [w for w in range(4, 2001) if any(w % g == 0 for g in range(2, math.isqrt(w) + 1))]
    pays = [any(w % g == 0 and better(w, g) for g in range(2, math.isqrt(w) + 1)) for w in split]
    wanted = [w for i, w in enumerate(split) if all(pays[i:])]
    assert found == (wanted[0] if wanted else None)
    if latency == 5.0:
        # With one latency a message: (1 + sqrt(5))**2 = 10.5, and 10 = 2 x 5 splits badly, 14 = 2 x 7 as well.
        assert found == 12


def test_worlds():
    assert worlds_up_to(1024) == tuple(2**n for n in range(1, 11))
    assert worlds_up_to(12) == (2, 4, 8, 12)
    assert worlds_up_to(2) == (2,)
    assert [measured_worlds(n) for n in (2, 3, 4, 6)] == [(1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 6)]


# --- fits


def test_fits_find_the_parameters_that_made_the_samples():
    samples = [(w, size, NETWORK.exchange(w, size)) for w in (2, 3) for size in (512, 4096, 65536)]
    found = fit_network(samples)
    assert vars(found) == pytest.approx(vars(NETWORK))
    half = fit_network(samples, per_byte=2e-9)
    assert half.per_byte == 2e-9
    assert half.per_message < NETWORK.per_message
    worlds = itertools.product((2, 64, 1024), (16, 256))
    host = fit_host([(w, c, HOST.own(c) + HOST.merging(w, c)) for w, c in worlds])
    assert vars(host) == pytest.approx(vars(HOST))


def test_a_fit_has_no_negative_cost():
    # Larger frames that took less time, and a third rank that did.
    found = fit_network([(2, 512, 3e-3), (2, 65536, 2e-3), (3, 512, 2e-3), (3, 65536, 1e-3)])
    assert min(vars(found).values()) == 0
    assert found.latency > 1e-3
    assert vars(fit_network([], 1.0, 2.0, 3.0)) == {"latency": 1.0, "per_message": 2.0, "per_byte": 3.0}


# --- the simulation


def made_up_scaling(cores=4):
    """As `NETWORK` and `HOST` have it, but for a world of 4, which takes twice as long."""

    def cost(world_size, size, seconds):
        seconds *= 2 if world_size == 4 else 1
        return Cost(world_size, size, world_size > 2, 3, (seconds,), seconds, seconds, seconds, 1.0)

    exchanges = [cost(w, s, NETWORK.exchange(w, capacity_for(s))) for w in (2, 3, 4) for s in (512, 65536)]
    gloo = over_gloo(NETWORK, HOST)
    layers = [cost(w, c, gloo(w, c) + HOST.own(c)) for w in (1, 2, 3, 4) for c in CHANNELS]
    stacks = [cost(w, n, n * (gloo(w, 64) + HOST.own(64))) for w in (1, 2, 3, 4) for n in (1, 4)]
    return Scaling((1, 2, 3, 4), cores, 64, 64, tuple(layers), tuple(stacks), tuple(exchanges))


def made_up(largest=1024, scaling=None, parameters=None):
    host = [HostSample(w, c, HOST.own(c) + HOST.merging(w, c)) for w in (2, 64, 512, 1024) for c in (16, 256)]
    left_out = [s for s in host if s.world_size == 512]
    host = [s for s in host if s.world_size != 512]
    return simulate(largest, parameters or Parameters(100.0, 10.0, 1.0), scaling, host, left_out)


def test_the_plot_has_no_faults(tmp_path):
    scaling = made_up_scaling(cores=2)
    benchmark = Benchmark(
        settings=BenchSettings(what=SCALING, world_size=4, device="cpu", repetitions=3),
        hardware=Hardware("cpu", "A processor", "gloo", 2, 1),
        **dict.fromkeys(("syncnorm_version", "torch_version", "python_version", "date", "command"), "1"),
        rows=(),
        model=None,
        summary=(),
        wall_seconds=1.0,
        growth=scaling,
        simulation=made_up(4096, scaling, Parameters()),
    )
    with recorded_pictures() as pictures:
        write_plot(benchmark, tmp_path / "plot.png")
    assert [picture.faults() for picture in pictures] == [[]]
    assert {"3", "4", "1,024"} <= {tick.text for tick in pictures[0].ticks}


def test_the_model_is_checked_against_what_it_was_not_fitted_to():
    found = made_up(scaling=made_up_scaling(), parameters=Parameters())
    assert vars(found.network) == pytest.approx(vars(NETWORK))
    assert found.given == ()
    ratios = {(c.what, c.world_size, c.size): c.ratio for c in found.checks}
    assert {key[:2] for key in ratios} == {("exchange", 4), ("layer", 2), ("layer", 3), ("layer", 4), ("host", 512)}
    assert ratios == pytest.approx({key: 0.5 if key[1] == 4 else 1.0 for key in ratios})
    assert {c.world_size for c in found.checks if c.oversubscribed} == {3, 4}


def test_a_ranks_own_work_takes_longer_where_ranks_share_cores():
    found = {
        c.world_size: c
        for c in made_up(scaling=made_up_scaling(cores=2), parameters=Parameters()).checks
        if c.size == 16
    }
    exchanges = 2 * NETWORK.exchange(3, frame_bytes(16))
    assert found[3].predicted == pytest.approx(exchanges + 1.5 * (HOST.own(16) + HOST.merging(3, 16)))
    assert found[2].ratio == pytest.approx(1)


def test_worlds_of_a_simulation():
    found = made_up()
    assert [w.world_size for w in found.worlds] == [2**n for n in range(1, 11)]
    assert len(found.model_channels) == 20
    step = flat(over_gloo(NETWORK, HOST), model_channels())
    for world in found.worlds:
        assert world.layer_bytes == bytes_received(world.world_size, found.channels)
        assert world.model.flat == pytest.approx(step(world.world_size))
        assert world.model.grouped == (None if world.world_size < 8 else pytest.approx(step(8)))
    assert found.worlds[0].model.two_level is None
    assert found.pays_from.two_level_model == two_level_pays_from(step, 1024)
    assert made_up(12).pays_from.grouped is None


def shown(parts):
    out = io.StringIO()
    console = Console(file=out, highlight=False, width=100)
    for part in parts:
        console.print(part)
    return out.getvalue()


def test_the_tables_fit_and_name_what_is_oversubscribed():
    scaling = made_up_scaling()
    text = shown(render_scaling(scaling, 2)) + shown(render_simulation(made_up(LARGEST, scaling, Parameters()), 2))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "channels 1 rank 2 ranks 3 ranks* 4 ranks*" in lines
    assert "4* 512 132 263 0.50" in lines
    assert any(line.startswith("*: oversubscribed: more ranks than the 2 cores") for line in lines)
    assert "two-level" in text
    assert "(model only)" in text
    assert "These figures hold only for ranks that share cores" in text
    given = " ".join(shown(render_simulation(made_up(), 2)).split())
    assert f"gather pays from {made_up().pays_from.two_level_layer} ranks on for a layer of 256 channels" in given
    assert "they cost less than two levels from 16 ranks on" in given
    assert "oversubscribed" not in given
    assert "These figures hold only" not in given
    assert "A sum costs less than a gather from 16 ranks on for all these layers together, and from 32" in given
    on_a_node = " ".join(shown(render_simulation(made_up(8), 2)).split())
    assert "A sum costs less than a gather nowhere up to 8 ranks for all these layers" in on_a_node
    assert "pays nowhere up to 4 ranks for a layer" in " ".join(shown(render_simulation(made_up(4), 2)).split())


# --- what is sent, and what the host does


class Sent(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.sizes.append((func._opname, args[1].numel()))
        return func(*args, **(kwargs or {}))


def _rank_frames_of_a_step(channels):
    group = dist.new_group()
    comm.set_transport(group, "gloo")
    layer = syncnorm.SyncBatchNorm2d(channels, process_group=group)
    x = torch.randn(4, channels, 4, 4, requires_grad=True)
    for _ in range(3):  # the first connects, and guesses the size
        with Sent() as sent:
            layer(x).backward(torch.randn(4, channels, 4, 4))
    return sent.sizes


@pytest.mark.parametrize("channels", [3, 64, 500])
def test_the_models_bytes_are_those_that_travel(channels):
    for sizes in run_ranks(_rank_frames_of_a_step, 2, (channels,)):
        assert sizes == [("alltoall_base_", 2 * frame_bytes(channels))] * 2
        # Of what is handed in, a rank's own part does not travel.
        assert sum(size for _, size in sizes) // 2 == bytes_received(2, channels)


class BytesHandedIn(TorchDispatchMode):
    """The bytes of the tensors that collectives are called with: the output of a gather, and what is reduced."""

    def __init__(self):
        super().__init__()
        self.nbytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [args[0]] if isinstance(args[0], torch.Tensor) else args[0]
            self.nbytes.append(sum(t.nbytes for t in tensors))
        return func(*args, **(kwargs or {}))


def _rank_native_collectives(channels):
    mean, invstd = torch.zeros(channels), torch.ones(channels)
    row = pack_sums_of_moments(mean, invstd, 5, 1e-5, 1.0)
    with BytesHandedIn() as handed_in:
        gather_rows(torch.cat([mean, invstd, torch.ones(2)]), dist.group.WORLD, "the gather")
        dist.all_reduce(row)
        dist.all_reduce(torch.zeros(2 * channels + 1))
    return handed_in.nbytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_models_bytes_are_those_of_native_collectives(world_size):
    channels = 33
    want = [world_size * gathered_bytes(channels), summed_bytes(channels), backward_bytes(channels)]
    assert run_ranks(_rank_native_collectives, world_size, (channels,)) == [want] * world_size


def _rank_native_exchange():
    scaling.exchange_of = lambda group, device: None
    try:
        with Sent() as sent:
            scaling._ExchangeStep(dist.group.WORLD, 512)()
    finally:
        scaling.exchange_of = exchange_of
    return sent.sizes


def test_where_the_layer_exchanges_no_frames_a_native_gather_is_timed():
    assert [[size for _, size in sizes] for sizes in run_ranks(_rank_native_exchange, 2)] == [[128], [128]]


def test_the_host_is_measured_in_fake_worlds_and_leaves_no_group_behind():
    fitted_to, left_out = measure_host(1, quick=True)
    assert {s.world_size for s in fitted_to} == {2, 8, 64}
    assert {s.world_size for s in left_out} == {32}
    assert all(0 < s.seconds < 1 for s in (*fitted_to, *left_out))
    assert not dist.is_initialized()


def test_the_documented_table_of_gpus_is_that_of_the_model():
    documented = (Path(__file__).parents[2] / "examples" / "speed.md").read_text().splitlines()
    lines = shown(render_simulation(made_up(4096), 2)).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Simulated on GPUs")) :]
    rows = [line for line in table if re.match(r" *[\d,]+( +(-|[\d,.]+)){6}$", line)]
    assert len(rows) == 12
    for row in rows:
        if row.split()[0] in ("8", "16", "32", "64", "512", "1,024", "4,096"):
            assert row in documented
