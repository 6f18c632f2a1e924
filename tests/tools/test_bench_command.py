"""`syncnorm bench` and its subcommands: what they refuse, and what a quick run prints and writes."""

import csv
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import syncnorm
import syncnorm.tools.bench.runner as bench_runner
from syncnorm.__main__ import main
from syncnorm.tools.bench import RunOptions, run_scaling
from syncnorm.tools.bench.simulation import LARGEST

ROOT = Path(__file__).parents[2]
NOT_ON_CPU = "SyncBatchNorm expected input tensor to be on GPU"
CONTENDERS = ["local", "floor", "E[x^2]", "syncnorm", "torch"]


@pytest.fixture
def call(monkeypatch, capsys):
    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "bench", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


SIMULATE = ["scaling", "--simulate", "8"]
BAD = [
    (["--ranks", "1"], "bench needs at least 2 ranks, got 1: ask for --ranks 2"),
    (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
    (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
    (["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file or directory"),
    (["--csv", "/no/such/folder/x.csv"], "cannot write /no/such/folder/x.csv"),
    (["--plot", "/no/such/folder/x.png"], "cannot write /no/such/folder/x.png"),
    (["--quick", "layer"], "options go after the subcommand: syncnorm bench layer ..."),
    (["everything"], "No such command 'everything'"),
    (["layer", "--dtypes", "fp32,int8"], "unknown dtype 'int8': expected one of fp32, bf16"),
    (["layer", "--shapes", "4,8;4"], "'4' is not a shape"),
    (["layer", "--shapes", "1,8"], "'1,8' is not a shape"),
    (["layer", "--repetitions", "0"], "repetitions must be at least 1, got 0"),
    (["layer", "--backend", "mpi"], "backend must be one of gloo, nccl, fake, got 'mpi'"),
    (["layer", "--backend", "nccl", "--device", "cpu"], "nccl needs cuda, got cpu: use --backend fake or gloo"),
    (["layer", "--backend", "fake", "--world", "0"], "ranks must be at least 1, got 0"),
    (["layer", "--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file or directory"),
    (["model", "--batch-per-rank", "0"], "batch_per_rank must be at least 1, got 0"),
    (["model", "--profile", "/dev/null/x"], "cannot write in /dev/null/x: Not a directory"),
    (["model", "--backend", "fake"], "does not run over the fake backend: only the layer does"),
    (["model", "--backend", "nccl", "--profile", "/tmp"], "but nccl runs as a single rank here"),
    (["scaling", "--ranks", "1"], "scaling needs at least 2 ranks, got 1: use --ranks 2"),
    (["scaling", "--latency-us", "1"], "belong to the simulation: add --simulate N"),
    (["scaling", "--simulate", "1"], f"simulate needs 2 to {LARGEST} ranks, got 1"),
    (["scaling", "--simulate", "1000000"], f"simulate needs 2 to {LARGEST} ranks, got 1000000"),
    (
        [*SIMULATE, "--ranks", "2"],
        "simulate needs at least 3 ranks, because the cost model is fitted to worlds of 2 and 3",
    ),
    ([*SIMULATE, "--latency-us", "-1"], "latency_us must be at least 0 and finite, got -1"),
    ([*SIMULATE, "--latency-us", "nan"], "latency_us must be at least 0 and finite, got nan"),
    ([*SIMULATE, "--bandwidth-gb", "0"], "bandwidth_gb must be more than 0 and finite, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_cost_one_line_and_exit_2(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    command = f"bench {arguments[0]}" if arguments[0] in ("layer", "model", "scaling") else "bench"
    assert err.startswith(f"syncnorm {command}: ")
    assert message in err
    assert err.count("\n") == 1


UNKNOWN = [
    ["--simulate", "8"],
    ["--frobnicate"],
    ["--what", "layer"],
    ["layer", "--profile", "/tmp"],
    ["layer", "--simulate", "8"],
    ["layer", "--latency-us", "1"],
    ["scaling", "--backend", "fake"],
    ["scaling", "--device", "cuda"],
    ["scaling", "--shapes", "4,8"],
    ["scaling", "--compile"],
    ["scaling", "--csv", "x.csv"],
]


@pytest.mark.parametrize("arguments", UNKNOWN, ids=" ".join)
def test_options_of_other_subcommands_are_unknown(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    option = next(each for each in arguments if each.startswith("--"))
    assert "No such option" in err
    assert option in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("subcommand", [[], ["layer"], ["scaling"]], ids=str)
def test_a_missing_matplotlib_is_reported_before_the_measurement(call, monkeypatch, tmp_path, subcommand):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = importlib.import_module("syncnorm.tools.cli.bench")  # the package has the command under this name
    for name in ("run_layer_and_model", "run_layer", "run_scaling"):
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("it measured"))
    code, _, err = call(*subcommand, "--plot", str(tmp_path / "plot.png"))
    assert (code, err) == (2, 'syncnorm: needs matplotlib: pip install "syncnorm[compare]"\n')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(call):
    code, _, err = call("--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "device is cuda, but there is no GPU" in err


def test_under_a_launcher_scaling_is_refused(call, monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    code, _, err = call("scaling")
    assert (code, err.count("\n")) == (2, 1)
    assert "run it without a launcher" in err


def test_an_existing_process_group_is_refused_before_the_measurement(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(syncnorm.SyncNormError, match="simulate needs a process group of its own"):
        run_scaling(RunOptions(), simulated_ranks=8)


# --- layer and model


@pytest.mark.slow
def test_a_quick_run_of_both_writes_what_it_measured(call, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_runner, "measure_on_rank", _rank_measure_one_shape)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png")}
    code, out, err = call(
        "--quick", "--device", "cpu", "--repetitions", "2",
        "--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
    )  # fmt: skip
    assert code == 0
    assert err == ""  # rank 0 reports the progress in its own process
    assert out.count("\n4x8x5x5 NHWC ") == 2
    assert "Forward and backward of a layer, bf16, microseconds" in out
    assert "1 thread(s) per rank, gloo.\ntorch" in out
    found = json.loads(files["json"].read_text())
    assert (found["schema"], found["schema_version"]) == ("syncnorm.bench", 3)
    assert (found["settings"]["what"], found["hardware"]["threads_per_rank"]) == ("all", 1)
    assert [(row["memory_format"], row["dtype"]) for row in found["rows"]] == [
        (layout, dtype) for dtype in ("fp32", "bf16") for layout in ("contiguous", "channels_last")
    ]
    for row in found["rows"]:
        assert [peer["name"] for peer in row["peers"]] == CONTENDERS
        assert [peer["name"] for peer in row["blocks"]] == CONTENDERS
        assert row["calls"] >= 2
        for timed, count in ((row["peers"], row["calls"]), (row["blocks"], 2)):
            assert all(len(peer["seconds"]) == count and min(peer["seconds"]) > 0 for peer in timed[:4])
        assert 0 < row["lateness"] < 1
        ours = row["peers"][3]["median"]
        share = 8 * row["num_bytes"] / ours / found["memory"]["copy_bandwidth"]
        assert row["bandwidth_shares"]["syncnorm"] == pytest.approx(share)
        assert sorted(row["bandwidth_shares"]) == sorted(CONTENDERS[:4])
        assert row["input_sets"] == 1
        assert row["peers"][4]["not_run"].startswith(NOT_ON_CPU)
    assert [arm["name"] for arm in found["model"]["arms"]] == ["ddp", "ddp+floor", "ddp+syncnorm"]
    assert len(found["summary"]) == 20
    assert found["exchange"]["transport"] == "shared memory, 2 ranks of one host"
    assert [len(situation["seconds"]) for situation in found["exchange"]["situations"]] == [40, 40, 40]
    assert found["load_before"] >= 0 <= found["load_after"]
    assert found["memory"]["copy_bandwidth"] > 1e8
    assert all("met" in figure for figure in found["summary"])
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(lines) == 4 * 5
    ours = next(line for line in lines if line["peer"] == "syncnorm")
    assert ours["shape"] == "4x8x5x5"
    assert float(ours["median_us"]) == pytest.approx(found["rows"][0]["peers"][3]["median"] * 1e6, abs=0.01)
    in_blocks = found["rows"][0]["blocks"][3]
    assert float(ours["blocks_median_us"]) == pytest.approx(in_blocks["median"] * 1e6, abs=0.01)
    assert float(ours["blocks_ratio_to_local"]) == pytest.approx(in_blocks["ratio_to"]["local"], abs=1e-4)
    assert float(ours["ratio_to_local"]) == pytest.approx(found["rows"][0]["peers"][3]["ratio_to"]["local"], abs=1e-4)
    assert int(ours["calls"]) == found["rows"][0]["calls"]
    assert ours["torch"] == torch.__version__
    assert files["png"].read_bytes().startswith(b"\x89PNG")


MEASURE = bench_runner.measure_on_rank


def _rank_measure_one_shape(ranks, settings, *how):
    # The table of the device has too many shapes for a test.
    assert settings.shapes is None
    return MEASURE(ranks, replace(settings, shapes=((4, 8, 5, 5),)), *how)


@pytest.mark.slow
def test_a_quick_run_of_the_model_profiles_each_rank(call, tmp_path):
    file, traces = tmp_path / "out.json", tmp_path / "traces"
    code, out, err = call(
        "model", "--quick", "--batch-per-rank", "1", "--device", "cpu",
        "--json", str(file), "--profile", str(traces),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Parts of a profiled step of ddp+syncnorm, milliseconds" in out
    found = json.loads(file.read_text())
    assert (found["settings"]["what"], found["rows"]) == ("model", [])
    assert found["model"]["input_shape"] == [1, 3, 16, 16]
    assert len(found["summary"]) == 2
    assert len(found["model"]["profile"]) == 2
    for rank in found["model"]["profile"]:
        assert len(rank["layers"]) == 20
        assert sum(rank[f"{part}_ms"] for part in ("norm", "compute", "rest")) == pytest.approx(rank["step_ms"])
        assert min(rank[f"{part}_ms"] for part in ("norm", "compute", "rest")) > 0
        assert json.loads((traces / f"rank{rank['rank']}.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_under_torchrun_it_uses_the_given_ranks_and_prints_once():
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "syncnorm", "bench", "layer", "--quick", "--shapes", "4,8", "--dtypes", "fp32"]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=100,
        env=environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks, 2 repetitions") == 1
    assert "1 thread(s) per rank" in done.stdout
    assert done.stdout.count("\n4x8 ") == 1


# --- scaling


@pytest.mark.slow
def test_a_quick_run_of_scaling_writes_what_it_measured_and_simulated(call, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "png")}
    code, out, _ = call(
        "scaling", "--simulate", "12", "--quick", "--ranks", "3", "--repetitions", "1", "--bandwidth-gb", "1",
        "--json", str(files["json"]), "--plot", str(files["png"]),
    )  # fmt: skip
    assert code == 0
    assert "Worlds of 1, 2, 3 ranks" in out
    found = json.loads(files["json"].read_text())
    assert (found["settings"]["what"], found["settings"]["simulate"], found["rows"]) == ("growth", 12, [])
    scaling, simulation = found["growth"], found["simulation"]
    assert scaling["worlds"] == [1, 2, 3]
    assert [(c["world_size"], c["size"]) for c in scaling["layers"]] == [(w, c) for w in (1, 2, 3) for c in (16, 64)]
    assert [(c["world_size"], c["size"]) for c in scaling["stacks"]] == [(w, n) for w in (1, 2, 3) for n in (1, 2)]
    assert {c["world_size"] for c in scaling["exchanges"]} == {2, 3}
    assert all(c["median"] > 0 and len(c["seconds"]) == 1 for c in scaling["layers"])
    assert {c["ratio_to_two"] for c in scaling["layers"] if c["world_size"] == 2} == {1.0}
    assert simulation["given"] == ["bandwidth_gb"]
    assert simulation["network"]["per_byte"] == pytest.approx(1e-9)
    assert [w["world_size"] for w in simulation["worlds"]] == [2, 4, 8, 12]
    assert {c["what"] for c in simulation["checks"]} == {"layer", "host"}
    assert {"two_level_layer", "grouped"} <= simulation["pays_from"].keys()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_with_the_network_given_only_the_host_is_measured(call, monkeypatch, tmp_path):
    monkeypatch.setattr("syncnorm.tools.bench.scaling.ranks_for", lambda *args, **kwargs: pytest.fail("ranks"))
    file = tmp_path / "out.json"
    given = ["--latency-us", "30", "--per-message-us", "5", "--bandwidth-gb", "1.25"]
    code, out, err = call("scaling", "--simulate", "16", "--quick", "--repetitions", "1", *given, "--json", str(file))
    assert code == 0
    assert err == "1/1 host: torch's fake process group\n"
    assert out.startswith("No ranks, because the network is given")
    found = json.loads(file.read_text())
    assert found["growth"] is None
    assert found["simulation"]["network"] == pytest.approx({"latency": 3e-5, "per_message": 5e-6, "per_byte": 8e-10})
