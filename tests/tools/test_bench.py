import io
import json
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from pictures import recorded_pictures
from rich.console import Console

from syncnorm.comm.call import observers
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks
from syncnorm.tools.bench import (
    Benchmark,
    BenchSettings,
    ExchangeLatency,
    ExchangeSituation,
    LayerRow,
    LayerWait,
    MemorySpeed,
    ModelResult,
    RankProfile,
)
from syncnorm.tools.bench.contenders import BASELINES, CONTENDERS, MEAN_OF_SQUARES, SYNCNORM
from syncnorm.tools.bench.exchange_latency import AFTER_WORK, BACK_TO_BACK
from syncnorm.tools.bench.layers import LayerStep
from syncnorm.tools.bench.measure import block_length, rotated, timings
from syncnorm.tools.bench.shapes import CUDA_SHAPES, DTYPES, MAX_BYTES, TABLES, parse_shapes, rows
from syncnorm.tools.bench.summary import exchange_summary, gpu_summary, summary
from syncnorm.tools.common.nets import build_resnet18
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.stats import median_ratio, quartiles
from syncnorm.tools.common.timing import ExchangeTimes, record_exchanges
from syncnorm.tools.report.bench_plot import write_plot
from syncnorm.tools.report.bench_terminal import print_benchmark

NOT_ON_CPU = "SyncBatchNorm expected input tensor to be on GPU"


# --- the contenders compute what they should


def batches(shape, ranks=2):
    """By rank (x, dy), well-conditioned: means about as large as the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator) for _ in range(2 * ranks)]
    return [x + 0.5 for x in draws[:ranks]], draws[ranks:]


def _rank_step(name, shape, dtype):
    contender = next(c for c in CONTENDERS if c.name == name)
    inputs, grads = batches(shape)
    x, dy = (t[dist.get_rank()].to(dtype) for t in (inputs, grads))
    layer = contender.build(len(shape), shape[1])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        layer.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    step = LayerStep(layer, [(x.requires_grad_(), dy)])
    step()
    mean = layer.running_mean.clone()
    step()  # the gradients are those of this step, not the sum of both
    return {
        "y": outputs[0],
        "dx": x.grad,
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "mean": mean,
        "w": layer.weight.detach(),
        "b": layer.bias.detach(),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5, 6), (2, 3, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("name", [MEAN_OF_SQUARES.name, SYNCNORM.name])
def test_synced_contenders_match_the_full_batch(name, shape, dtype):
    torch_dtype = DTYPES[dtype]
    got = run_ranks(_rank_step, 2, (name, shape, torch_dtype))
    inputs, grads = ([t.to(torch_dtype) for t in ts] for ts in batches(shape))
    zeros, ones = torch.zeros(shape[1]), torch.ones(shape[1])
    want = batch_norm_oracle(inputs, grads, got[0]["w"], got[0]["b"], zeros, ones)
    for rank, mine in enumerate(got):
        assert mine["y"].dtype == mine["dx"].dtype == torch_dtype
        assert_close(mine["y"], want.outputs[rank], torch_dtype)
        assert_close(mine["dx"], want.grad_inputs[rank], torch_dtype)
        assert_close(mine["mean"], want.running_mean, torch.float32)
    # DDP would add up the gradients of the parameters over the ranks, also those of the workaround.
    for key, parts in (("dw", want.grad_weight), ("db", want.grad_bias)):
        total = sum(mine[key].double() for mine in got)
        assert_close(total, sum(parts), torch.bfloat16 if dtype == "bf16" else torch.float32)


# --- arithmetic, on made-up numbers


def test_every_contender_is_first_equally_often():
    orders = [rotated(["a", "b", "c"], r) for r in range(6)]
    assert ["".join(order) for order in orders] == ["abc", "acb", "bca", "bac", "cab", "cba"]


def test_ratios_are_taken_within_a_repetition():
    # The machine is ten times slower in the second repetition; ours takes twice the baseline in both.
    baseline, ours = [1.0, 10.0, 2.0], [2.0, 20.0, 5.0]
    assert median_ratio(ours, baseline) == 2.0
    timed = timings({"floor": baseline, "syncnorm": ours}, BASELINES, {"torch": "no GPU"})
    assert [t.name for t in timed] == ["floor", "syncnorm", "torch"]
    assert timed[1].ratio_to == {"floor": 2.0}
    assert (timed[1].p25, timed[1].median, timed[1].p75) == (3.5, 5.0, 12.5)
    assert (timed[2].not_run, timed[2].median, timed[2].ratio("floor")) == ("no GPU", None, None)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_blocks_hold_whole_steps():
    assert [block_length(s, 0.02) for s in (1.0, 0.02, 0.003, 1e-9)] == [1, 1, 7, 1000]


def made_up_row(shape, memory_format, dtype, ratio, device="cpu"):
    base = 5e-5 + 1e-9 * torch.Size(shape).numel() * (1 if memory_format == "contiguous" else 0.8)
    seconds = {
        "local": [base] * 4,
        "floor": [base + 3e-4] * 4,
        "E[x^2]": [4 * base + 8e-4] * 4,
        "syncnorm": [f * ratio * base for f in (0.9, 1, 1, 1.2)],
    }
    not_run = {"torch": NOT_ON_CPU}
    if device == "cuda":
        seconds, not_run = {name: [t / 40 for t in times] for name, times in seconds.items()}, {}
        seconds["torch"] = seconds["local"]
    num_bytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    by_call = {}
    if device == "cpu":
        in_blocks = {name: [t / 2 for t in times] if name == "syncnorm" else times for name, times in seconds.items()}
        by_call = {"calls": 4, "lateness": 1.5e-4, "blocks": timings(in_blocks, BASELINES, not_run)}
    timed = timings(seconds, BASELINES, not_run)
    return LayerRow(shape, memory_format, dtype, num_bytes, 9, timed, 3, {"syncnorm": 0.8}, **by_call)


def made_up_exchange(median=2e-5):
    situations = [ExchangeSituation(name, (median,), median, 4 * median) for name in (BACK_TO_BACK, AFTER_WORK)]
    return ExchangeLatency(4096, "shm", tuple(situations))


def made_up(ratio=0.6, model_ratio=1.02, device="cpu"):
    measured = [made_up_row(*row, dtype, ratio, device) for dtype in DTYPES for row in rows(device, None)]
    memory = MemorySpeed(4e12, 50 * 2**20) if device == "cuda" else MemorySpeed(2e10, None)
    arms = timings({"ddp": [1.0, 1.0], "ddp+syncnorm": [model_ratio] * 2}, ["ddp"], {})
    exchange = made_up_exchange() if device == "cpu" else None
    waits = tuple(LayerWait(f"stages.{i}.norm1", 0.5, 0.25) for i in range(3))
    profile = tuple(RankProfile(rank, 3, 10.0, 2.25, 5.0, 2.75, waits) for rank in range(4))
    model = ModelResult("a network", 11_000_000, 20, (8, 3, 64, 64), 2, arms, profile)
    return Benchmark(
        settings=BenchSettings(what="all", world_size=2, device="cpu", repetitions=4),
        hardware=Hardware("cpu", "A processor with a name as vendors make them @ 2.0 GHz", "gloo", 2, 1),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm bench",
        rows=tuple(measured),
        model=model,
        summary=(
            *summary(measured, model, device),
            *gpu_summary(measured, memory, device),
            *exchange_summary(exchange),
        ),
        memory=memory,
        exchange=exchange,
        load_before=0.25,
        load_after=2.0,
        wall_seconds=61.0,
    )


def test_the_summary_has_the_geometric_mean_and_the_maximum():
    measured = [made_up_row((4, 8), "contiguous", "fp32", r) for r in (0.5, 2.5)]
    measured.append(made_up_row((64, 64, 8, 8), "contiguous", "fp32", 0.8))  # exactly 1 MiB
    measured.append(made_up_row((64, 64, 8, 8), "contiguous", "bf16", 3.0))  # half of that
    found = {line.what: line for line in summary(measured, None, "cpu")}
    mean, largest = (found[f"syncnorm / local, fp32, {which}"] for which in ("mean", "max"))
    large = found["syncnorm / local, fp32, 1 MiB and more, mean"]
    assert (mean.value, mean.met) == (pytest.approx(1.0), False)
    assert (largest.value, largest.where, largest.met) == (pytest.approx(2.5), "4x8 contiguous fp32", False)
    assert (large.value, large.where, large.limit) == (pytest.approx(0.8), "1 row", 0.7)
    assert found["syncnorm / local, bf16, mean"].value == pytest.approx(3.0)
    assert "syncnorm / local, bf16, 1 MiB and more, mean" not in found
    assert found["syncnorm / E[x^2], fp32, max"].met is None
    assert not any("torch" in what for what in found)
    assert next(line.what for line in summary(measured, None, "cpu")) == mean.what  # local comes first


def test_targets_of_an_exchange_are_those_of_a_model():
    median, p90 = exchange_summary(made_up_exchange(28e-6))
    assert (median.value, median.limit, median.met, median.where) == (pytest.approx(28), 30, True, "shm")
    assert (p90.value, p90.limit, p90.met) == (pytest.approx(112), 100, False)
    assert exchange_summary(None) == []


# --- files


def test_a_record_survives_json():
    benchmark = made_up()
    found = Benchmark.from_dict(json.loads(json.dumps(benchmark.to_dict())))
    assert found == benchmark
    assert found.rows[0].in_blocks("syncnorm").ratio("local") == pytest.approx(0.3)


def test_files_of_version_1_say_that_they_timed_blocks_alone():
    data = json.loads(json.dumps(made_up().to_dict())) | {"schema_version": 1}
    for name in ("exchange", "load_before", "load_after"):
        del data[name]
    for row in data["rows"]:
        for name in ("calls", "lateness", "blocks"):
            del row[name]
    found = Benchmark.from_dict(data)
    assert (found.rows[0].calls, found.rows[0].in_blocks("syncnorm"), found.exchange) == (0, None, None)
    assert found.rows[0]["syncnorm"].ratio("local") == pytest.approx(0.6)
    assert "Timed in blocks of the same call" in printed(found)
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.bench version 3, got syncnorm\.bench 4"):
        Benchmark.from_dict(data | {"schema_version": 4})


def test_files_of_version_2_are_read_without_what_they_say_about_nccl():
    # Fields that version 2 had and version 3 has not, at the three places where it had them.
    figures = {"latency": 1.0, "per_message": 1.0, "per_byte": 1.0}
    arrangements = {"flat": 1.0, "two_level": None, "best_g": None, "grouped": None}
    simulation = {
        "largest": 2, "channels": 256, "model_channels": [64], "model_name": "a network", "group_size": 8,
        "network": figures, "given": [], "fit_oversubscribed": False,
        "ring": {"launch": 1.0, "hop": 1.0, "per_byte": 1.0},
        "host": {"base": 1.0, "per_channel": 1.0, "per_row": 1.0, "per_value": 1.0}, "host_samples": [], "checks": [],
        "worlds": [
            {"world_size": 2, "layer_bytes": 1, "model_bytes": 2}
            | dict.fromkeys(("layer", "model", "nccl_layer", "nccl_model"), arrangements)
        ],
        "pays_from": dict.fromkeys(
            ("two_level_layer", "two_level_model", "grouped", "nccl_two_level_layer", "nccl_two_level_model")
        ),
    }  # fmt: skip
    data = json.loads(json.dumps(made_up().to_dict())) | {"schema_version": 2, "simulation": simulation}
    found = Benchmark.from_dict(data).simulation
    assert found is not None
    assert found.gpus is None
    assert (found.worlds[0].layer.flat, found.pays_from.grouped, found.network.latency) == (1.0, None, 1.0)
    assert "over NCCL" not in printed(Benchmark.from_dict(data))


# --- what is shown


def printed(benchmark, width=100):
    out = io.StringIO()
    print_benchmark(benchmark, Console(file=out, highlight=False, width=width))
    return out.getvalue()


def test_the_table_fits_and_says_which_targets_are_met():
    text = printed(made_up())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # In blocks syncnorm takes half the time that it takes call by call.
    assert "4x512x7x7 NCHW 392 150 450 1,401 90 88-95 0.60 0.20 0.06 0.30" in lines
    assert "syncnorm / local, fp32, max 0.60 <= 2.00 met, 8x64x56x56 contiguous fp32" in lines
    assert "model, ddp+syncnorm / ddp 1.02 <= 1.03 met" in lines
    assert "ddp+syncnorm 1,020.0 1,020.0-1,020.0 1.02" in lines
    assert "last rank arrived 150 us after the first, in the median" in " ".join(lines)
    assert "after other work 20.0 80.0" in lines
    assert "exchange after other work, us, 90 % 80 <= 100 met, shm" in lines
    assert "Load average: 0.2 before, 2.0 after, ranks included." in lines
    assert "0 10.00 5.00 1.50 0.75 2.75" in lines
    assert "stages.1.norm1 0.50 0.25 0.50 0.25 0.50 0.25" in lines
    assert f"Not run: {NOT_ON_CPU}" in text
    assert "not met" not in text
    # In fp32: means for local, also of large rows, and E[x^2]; in bf16: the mean for local; and the model.
    assert printed(made_up(1.6, 1.2)).count("not met") == 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_80_columns_the_table_leaves_out_sizes_and_quartiles(device):
    text = printed(made_up(device=device), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "In 100 columns the table also has KiB and p25-p75" in " ".join(text.split())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert device == "cuda" or "4x512x7x7 NCHW 150 450 1,401 90 0.60 0.20 0.06 0.30" in lines


def test_on_a_gpu_torchs_layer_has_columns_and_the_target():
    text = printed(made_up(1.5, device="cuda"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "256x64x112x112 NCHW 802,816 5,139 5,147 5,139 7,709 7,516-8,094 1.50 1.50 1.50 0.80" in lines
    assert "4,000.0 GB/s" in text
    assert "share of copy bandwidth past the cache, mean 0.80 >= 0.85 not met, 16 rows, lowest 0.80" in lines
    assert "share of rows slower than torch's layer 1.00 <= 0.00 not met, 56 of 56" in lines
    assert any(line.startswith("syncnorm / torch, fp32, max 1.50 <= 1.00 not met, ") for line in lines)
    assert text.count("not met") == 5


def test_the_plot_is_an_image_without_faults(tmp_path):
    with recorded_pictures() as pictures:
        write_plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [picture.faults() for picture in pictures] == [[]]
    assert {"1,000", "100,000"} <= {tick.text for tick in pictures[0].ticks}


# --- shapes, profile


def test_shapes():
    assert parse_shapes("4,8,5,5; 64,512") == ((4, 8, 5, 5), (64, 512))
    assert {shape for shape, _ in rows("cuda", None)} == set(CUDA_SHAPES) == set(parse_shapes("gpu"))
    assert all(torch.Size(shape).numel() * 4 <= MAX_BYTES for table in TABLES.values() for shape in table)
    batches, channels, sides = (set(sizes) for sizes in list(zip(*CUDA_SHAPES, strict=True))[:3])
    assert (batches, min(channels), max(channels), min(sides), max(sides)) == ({8, 32, 256}, 64, 2048, 7, 112)
    assert len(list(rows("cpu", None))) == len(list(rows("cuda", parse_shapes("cpu")))) == 14


def _rank_recorded_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), SYNCNORM.build(2, 4))
    times = ExchangeTimes()
    with record_exchanges(times, model):
        model(torch.randn(5, 3)).backward(torch.randn(5, 4))
    return {(layer, kind.name) for layer, kind in times.seconds}, times.total(), times.last_gradient


def test_the_profile_records_each_exchange_and_leaves_nothing_behind():
    for layers, seconds, last_gradient in run_ranks(_rank_recorded_step, 2):
        assert {kind for _, kind in layers} == {"FORWARD", "BACKWARD"}
        assert len(layers) == 2
        assert seconds > 0
        assert last_gradient > 0
    with suppress(ZeroDivisionError), record_exchanges(ExchangeTimes(), torch.nn.Linear(1, 1)):
        assert observers
        _ = 1 / 0
    assert not observers


def test_the_model_has_twenty_norm_layers():
    model = build_resnet18(width=4)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 20
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
