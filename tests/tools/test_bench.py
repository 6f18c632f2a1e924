import csv
import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from syncnorm.__main__ import main
from syncnorm.comm.observers import observers
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks
from syncnorm.tools.bench import Benchmark, LayerWait, Memory, ModelResult, RankProfile, Row, Settings
from syncnorm.tools.bench.gpu_targets import gpu_figures
from syncnorm.tools.bench.layers import LayerStep
from syncnorm.tools.bench.measure import block_length
from syncnorm.tools.bench.models import build_model
from syncnorm.tools.bench.peers import BASELINES, MEAN_OF_SQUARES, PEERS, SYNCNORM
from syncnorm.tools.bench.shapes import CUDA_SHAPES, DTYPES, MAX_BYTES, TABLES, parse_shapes, rows
from syncnorm.tools.bench.statistics import rotated, summary, timings
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.stats import median_ratio, quartiles
from syncnorm.tools.compare.waiting import Exchanges, noting
from syncnorm.tools.report.bench_plot import write_plot
from syncnorm.tools.report.bench_terminal import print_benchmark

ROOT = Path(__file__).parents[2]
NOT_ON_CPU = "SyncBatchNorm expected input tensor to be on GPU"


# --- the peers compute what they are said to


def batches(shape, ranks=2):
    """By rank (x, dy), well-conditioned: means about as large as the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=generator) for _ in range(2 * ranks)]
    return [x + 0.5 for x in draws[:ranks]], draws[ranks:]


def stepped(name, shape, dtype):
    peer = next(p for p in PEERS if p.name == name)
    inputs, grads = batches(shape)
    x, dy = (t[dist.get_rank()].to(dtype) for t in (inputs, grads))
    layer = peer.build(len(shape), shape[1])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        layer.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    step = LayerStep(layer, [(x.requires_grad_(), dy)])
    step()
    mean = layer.running_mean.clone()
    step()  # the gradients are this step's, not the sum of both
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
def test_synced_peers_are_the_full_batch(name, shape, dtype):
    torch_dtype = DTYPES[dtype]
    got = run_ranks(stepped, 2, (name, shape, torch_dtype))
    inputs, grads = ([t.to(torch_dtype) for t in ts] for ts in batches(shape))
    zeros, ones = torch.zeros(shape[1]), torch.ones(shape[1])
    want = batch_norm_oracle(inputs, grads, got[0]["w"], got[0]["b"], zeros, ones)
    for rank, mine in enumerate(got):
        assert mine["y"].dtype == mine["dx"].dtype == torch_dtype
        assert_close(mine["y"], want.outputs[rank], torch_dtype)
        assert_close(mine["dx"], want.grad_inputs[rank], torch_dtype)
        assert_close(mine["mean"], want.running_mean, torch.float32)
    # Each rank's own part or all of it, as the peer has it: DDP would add them up, the work-around's too.
    for key, parts in (("dw", want.grad_weight), ("db", want.grad_bias)):
        total = sum(mine[key].double() for mine in got)
        assert_close(total, sum(parts), torch.bfloat16 if dtype == "bf16" else torch.float32)


# --- arithmetic, on made-up numbers


def test_every_contender_is_first_equally_often():
    orders = [rotated(["a", "b", "c"], r) for r in range(6)]
    assert ["".join(order) for order in orders] == ["abc", "acb", "bca", "bac", "cab", "cba"]


def test_ratios_are_taken_inside_a_repetition():
    # The machine is ten times slower in the second repetition; ours is twice the floor in both.
    floor, ours = [1.0, 10.0, 2.0], [2.0, 20.0, 5.0]
    assert median_ratio(ours, floor) == 2.0
    timed = timings({"floor": floor, "syncnorm": ours}, BASELINES, {"torch": "no GPU"})
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
        "syncnorm": [f * ratio * (base + 3e-4) for f in (0.9, 1, 1, 1.2)],
    }
    not_run = {"torch": NOT_ON_CPU}
    if device == "cuda":
        seconds, not_run = {name: [t / 40 for t in times] for name, times in seconds.items()}, {}
        seconds["torch"] = seconds["floor"]
    num_bytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    return Row(shape, memory_format, dtype, num_bytes, 9, timings(seconds, BASELINES, not_run), 3, {"syncnorm": 0.8})


def made_up(ratio=1.0, model_ratio=1.05, device="cpu"):
    measured = [made_up_row(*row, dtype, ratio, device) for dtype in DTYPES for row in rows(device, None)]
    memory = Memory(4e12, 50 * 2**20) if device == "cuda" else Memory(2e10, None)
    arms = timings({"ddp": [1.0, 1.0], "ddp+syncnorm": [model_ratio] * 2}, ["ddp"], {})
    waits = tuple(LayerWait(f"stages.{i}.norm1", 0.5, 0.25) for i in range(3))
    profile = tuple(RankProfile(rank, 3, 10.0, 2.25, 5.0, 2.75, waits) for rank in range(4))
    model = ModelResult("a network", 11_000_000, 20, (8, 3, 64, 64), 2, arms, profile)
    return Benchmark(
        settings=Settings("all", 2, "cpu", tuple(DTYPES), 4, 0.02, None, 8, 64, 64, False, None),
        hardware=Hardware("cpu", "A processor with a name as vendors make them @ 2.0 GHz", "gloo", 2, 1),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm bench",
        rows=tuple(measured),
        model=model,
        summary=(*summary(measured, model, device), *gpu_figures(measured, memory, device)),
        memory=memory,
        wall_seconds=61.0,
    )


def test_summary_is_the_geometric_mean_and_the_worst_row():
    measured = [made_up_row((4, 8), "contiguous", "fp32", r) for r in (0.5, 2.0)]
    measured.append(made_up_row((4, 8), "contiguous", "bf16", 3.0))
    found = {figure.what: figure for figure in summary(measured, None, "cpu")}
    mean = found["syncnorm / floor, fp32, geometric mean"]
    worst = found["syncnorm / floor, fp32, worst row"]
    assert mean.value == pytest.approx(1.0)
    assert (worst.value, worst.where, worst.met) == (pytest.approx(2.0), "4x8 contiguous fp32", False)
    assert found["syncnorm / floor, bf16, geometric mean"].value == pytest.approx(3.0)
    assert found["syncnorm / E[x^2], fp32, worst row"].met is None
    assert not any("torch" in what for what in found)


# --- what is shown


def printed(benchmark):
    out = io.StringIO()
    print_benchmark(benchmark, Console(file=out, highlight=False, width=100))
    return out.getvalue()


def test_the_table_fits_and_says_what_is_met():
    text = printed(made_up())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "4x512x7x7 NCHW fp32 392 150 450 1,401 450 439-473 1.00 0.32 0.80" in lines
    assert "model, ddp+syncnorm / ddp 1.05 <= 1.10 met" in lines
    assert "ddp+syncnorm 1,050.0 1,050.0-1,050.0 1.05" in lines
    assert "0 10.00 5.00 1.50 0.75 2.75" in lines
    assert "stages.1.norm1 0.50 0.25 0.50 0.25 0.50 0.25" in lines
    assert f"Not run: {NOT_ON_CPU}" in text
    assert "not met" not in text
    # Mean and worst row over the floor and the mean over E[x^2] in fp32, and the model.
    assert printed(made_up(1.6, 1.2)).count("not met") == 4


def test_on_a_gpu_torchs_layer_has_columns_and_the_target():
    text = printed(made_up(1.5, device="cuda"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "256x64x112x112 NCHW fp32 802,816 5,139 5,147 5,147 7,720 7,527-8,106 1.50 1.50 0.80" in lines
    assert "4,000.0 GB/s" in text
    assert "share of copy bandwidth past the cache, mean 0.80 >= 0.85 not met, 16 rows, lowest 0.80" in lines
    assert "share of rows slower than torch's layer 1.00 <= 0.00 not met, 56 of 56" in lines
    assert any(line.startswith("syncnorm / torch, fp32, worst row 1.50 <= 1.00 not met, ") for line in lines)
    assert text.count("not met") == 5


def test_the_plot_is_a_picture(tmp_path):
    write_plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- shapes, profile


def test_shapes():
    assert parse_shapes("4,8,5,5; 64,512") == ((4, 8, 5, 5), (64, 512))
    assert {shape for shape, _ in rows("cuda", None)} == set(CUDA_SHAPES) == set(parse_shapes("gpu"))
    assert all(torch.Size(shape).numel() * 4 <= MAX_BYTES for table in TABLES.values() for shape in table)
    batches, channels, sides = (set(sizes) for sizes in list(zip(*CUDA_SHAPES, strict=True))[:3])
    assert (batches, min(channels), max(channels), min(sides), max(sides)) == ({8, 32, 256}, 64, 2048, 7, 112)
    assert len(list(rows("cpu", None))) == len(list(rows("cuda", parse_shapes("cpu")))) == 14


def noted_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), SYNCNORM.build(2, 4))
    noted = Exchanges()
    with noting(noted, model):
        model(torch.randn(5, 3)).backward(torch.randn(5, 4))
    return {(layer, kind.name) for layer, kind in noted.seconds}, noted.total(), noted.last_gradient


def test_the_profile_notes_each_exchange_and_leaves_nothing_behind():
    for layers, seconds, last_gradient in run_ranks(noted_step, 2):
        assert {kind for _, kind in layers} == {"FORWARD", "BACKWARD"}
        assert len(layers) == 2
        assert seconds > 0
        assert last_gradient > 0
    with suppress(ZeroDivisionError), noting(Exchanges(), torch.nn.Linear(1, 1)):
        assert observers
        _ = 1 / 0
    assert not observers


def test_the_model_has_twenty_norm_layers():
    model = build_model(width=4)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 20
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


# --- the command


@pytest.fixture
def call(monkeypatch, capsys):
    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "bench", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


BAD = [
    (["--dtypes", "fp32,int8"], "no dtype is called 'int8': the dtypes are fp32, bf16"),
    (["--ranks", "1"], "bench needs at least 2 ranks, got 1: ask for --ranks 2"),
    (["--what", "everything"], "what must be one of layer, model, all, growth, got 'everything'"),
    (["--shapes", "4,8;4"], "'4' is no shape"),
    (["--shapes", "1,8"], "'1,8' is no shape"),
    (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
    (["--batch-per-rank", "0"], "batch_per_rank must be at least 1, got 0"),
    (["--backend", "mpi"], "backend must be one of gloo, nccl, fake, got 'mpi'"),
    (["--backend", "nccl", "--device", "cpu"], "nccl needs cuda, got cpu: take --backend fake or gloo"),
    (["--backend", "fake", "--world", "0"], "ranks must be at least 1, got 0"),
    (["--backend", "fake", "--what", "all"], "does not run over the fake backend: ask for layer, got 'all'"),
    (["--backend", "fake", "--what", "growth"], "growth is measured over gloo, got backend 'fake'"),
    (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
    (["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file or directory"),
    (["--csv", "/no/such/folder/x.csv"], "cannot write /no/such/folder/x.csv"),
    (["--plot", "/no/such/folder/x.png"], "cannot write /no/such/folder/x.png"),
    (["--profile", "/dev/null/x"], "cannot write in /dev/null/x: Not a directory"),
    (["--what", "layer", "--profile", "/tmp"], "profile and compile are the model's"),
    (["--frobnicate"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_cost_one_line_and_exit_2(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("syncnorm bench: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_matplotlib_is_told_before_the_measuring(call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = importlib.import_module("syncnorm.tools.cli.bench")  # the package has the command under this name
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("it measured"))
    code, _, err = call("--plot", str(tmp_path / "plot.png"))
    assert (code, err) == (2, 'syncnorm: needs matplotlib: pip install "syncnorm[compare]"\n')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(call):
    code, _, err = call("--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "asked for cuda, but there is none" in err


@pytest.mark.slow
def test_a_quick_run_writes_what_it_measured(call, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    code, out, err = call(
        "--quick", "--shapes", "4,8,5,5", "--batch-per-rank", "1", "--device", "cpu", "--repetitions", "2",
        "--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
        "--profile", str(tmp_path / "traces"),
    )  # fmt: skip
    assert code == 0
    assert err == ""  # what rank 0 writes is its own process's
    assert "4x8x5x5 NHWC   bf16" in out
    assert "1 thread(s) a rank, gloo.\ntorch" in out
    found = json.loads(files["json"].read_text())
    assert (found["schema"], found["schema_version"]) == ("syncnorm.bench", 1)
    assert found["hardware"]["threads_per_rank"] == 1
    assert [(row["memory_format"], row["dtype"]) for row in found["rows"]] == [
        (layout, dtype) for dtype in ("fp32", "bf16") for layout in ("contiguous", "channels_last")
    ]
    for row in found["rows"]:
        assert [peer["name"] for peer in row["peers"]] == ["local", "floor", "E[x^2]", "syncnorm", "torch"]
        assert all(len(peer["seconds"]) == 2 and min(peer["seconds"]) > 0 for peer in row["peers"][:4])
        ours = row["peers"][3]["median"]
        share = 8 * row["num_bytes"] / ours / found["memory"]["copy_bandwidth"]
        assert row["bandwidth_shares"]["syncnorm"] == pytest.approx(share)
        assert sorted(row["bandwidth_shares"]) == ["E[x^2]", "floor", "local", "syncnorm"]
        assert row["input_sets"] == 1
        assert row["peers"][4]["not_run"].startswith(NOT_ON_CPU)
    assert [arm["name"] for arm in found["model"]["arms"]] == ["ddp", "ddp+floor", "ddp+syncnorm"]
    for rank in found["model"]["profile"]:
        assert len(rank["layers"]) == 20
        assert sum(rank[f"{part}_ms"] for part in ("norm", "compute", "rest")) == pytest.approx(rank["step_ms"])
        assert min(rank[f"{part}_ms"] for part in ("norm", "compute", "rest")) > 0
        assert json.loads((tmp_path / "traces" / f"rank{rank['rank']}.json").read_text())["traceEvents"]
    assert len(found["summary"]) == 14
    assert found["memory"]["copy_bandwidth"] > 1e8
    assert all("met" in figure for figure in found["summary"])
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(lines) == 4 * 5
    ours = next(line for line in lines if line["peer"] == "syncnorm")
    assert ours["shape"] == "4x8x5x5"
    assert float(ours["median_us"]) == pytest.approx(found["rows"][0]["peers"][3]["median"] * 1e6, abs=0.01)
    assert ours["torch"] == torch.__version__
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_under_torchrun_it_uses_the_given_ranks_and_prints_once():
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "syncnorm", "bench", "--quick", "--what", "layer", "--shapes", "4,8", "--dtypes", "fp32"]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=100,
        env=environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks, 2 repetitions") == 1
    assert "1 thread(s) a rank" in done.stdout
    assert done.stdout.count("\n4x8 ") == 1
