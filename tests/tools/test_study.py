import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from syncnorm.__main__ import main
from syncnorm.testing import run_ranks
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.common.records import write_json
from syncnorm.tools.report.study_markdown import markdown
from syncnorm.tools.report.study_plot import write_plot
from syncnorm.tools.report.study_terminal import print_study
from syncnorm.tools.study import (
    STUDIES,
    Row,
    Settings,
    Study,
    View,
    batch_size,
    dp_vs_ddp,
    learning_rate,
    placement,
    run,
)
from syncnorm.tools.study.data import batches, load_images, shares
from syncnorm.tools.study.models import build_net
from syncnorm.tools.study.norms import with_norm
from syncnorm.tools.study.sentences import by_level, compared
from syncnorm.tools.study.statistics import Difference, difference
from syncnorm.tools.study.training import Recipe, fit
from syncnorm.tools.study.trials import Trials, run_trials
from syncnorm.tools.study.tuning import MEASURE, best_rates

ROOT = Path(__file__).parents[2]
OURS = ("batch-size", "placement", "learning-rate", "dp-vs-ddp")


# --- whole studies, small, on real ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_a_study_gives_a_well_formed_record(name, tmp_path):
    study = run(name, quick=True, steps=1)
    assert study.settings == Settings(name, world_size=2, seeds=2, steps=1, quick=True)
    assert {row.seed for row in study.rows if row.measure == "accuracy"} == {0, 1}
    assert all(math.isfinite(row.value) for row in study.rows)
    assert all(0 <= row.value <= 1 for row in study.rows if "accuracy" in row.measure)
    assert study.hardware.threads_per_rank == 1
    assert study.findings
    assert not any("nan" in finding or "inf" in finding.split() for finding in study.findings)
    assert len({(row.measure, row.seed, *row.condition.items()) for row in study.rows}) == len(study.rows)
    for view in study.views:
        shown = [row for row in study.rows if view.shows(row)]
        assert shown
        assert all(view.lines in row.condition and view.across in row.condition for row in shown)

    write_json(study, tmp_path / "study.json")
    back = json.loads((tmp_path / "study.json").read_text())
    assert (back["schema"], back["schema_version"]) == ("syncnorm.study", 1)
    assert Study.from_dict(back) == study


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.study version 1, got syncnorm\.bench 1"):
        Study.from_dict({"schema": "syncnorm.bench", "schema_version": 1})


# --- what the arms of the studies are said to be


def _state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}


def _trained(norm, world_size, together, steps):
    images, model = load_images(), with_norm(build_net(3), norm)
    part = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4) if together else slice(None)
    module = nn.parallel.DistributedDataParallel(model) if together else model
    fit(module, batches(images.train_x, images.train_y, 4 * world_size, 0, part), Recipe(0.1, steps))
    return _state(model)


def _alone_and_together(norm):
    return _trained("batch" if norm == "sync" else norm, 2, False, 3), _trained(norm, 2, True, 3)


@pytest.mark.parametrize("norm", ["sync", "group"])
def test_one_process_with_the_whole_batch_trains_what_two_ranks_train(norm):
    """Why batch-size may train the norms that need no other rank alone; and that SyncBN is the whole batch's BN."""
    for alone, together in run_ranks(_alone_and_together, 2, (norm,)):
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)  # three steps of fp32 rounding


def _alone_and_together_in_the_study(norm):
    with initialized_ranks(torch.device("cpu")) as ranks:
        alone = batch_size.Trial("batch" if norm == "sync" else norm, 8, 0.2, 0, 12, tuning=True)
        together = replace(alone, norm=norm)
        return [batch_size.train(trial, ranks, trial is together)[0].value for trial in (alone, together)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sync", "group"])
def test_so_does_the_study(norm):
    alone, together = run_ranks(_alone_and_together_in_the_study, 2, (norm,))[0]
    assert 0.2 < alone < 0.9  # it has learned, and has more to learn
    assert together == pytest.approx(alone, abs=0.006)  # three of the 500 images


def test_local_batch_norm_trains_something_else():
    alone, together = run_ranks(_alone_and_together, 2, ("batch",))[0]
    assert not torch.allclose(alone["1.running_var"], together["1.running_var"], rtol=1e-3)


def _dp_and_ddp(split):
    with initialized_ranks(torch.device("cpu")) as ranks:
        trials = [dp_vs_ddp.Trial(arm, split, 0.05, 0, 40) for arm in ("dp", "ddp", "own buffers", "sync")]
        return [dp_vs_ddp.train(trial, ranks, True) for trial in trials]


def test_dataparallel_and_ddp_keep_rank_0s_statistics_and_syncbn_everyones():
    for dp, ddp, own, sync in run_ranks(_dp_and_ddp, 2, ("by brightness",)):
        assert {row.measure for row in own} == {"accuracy"}
        for rows, nearest in ((dp, "rank 0"), (ddp, "rank 0"), (sync, "all ranks")):
            far = {row.condition["statistics of"]: row.value for row in rows if row.measure == "distance"}
            assert min(far, key=far.get) == nearest
            assert far[nearest] < 0.8 * min(distance for whose, distance in far.items() if whose != nearest)
        # The weights are the same training, and so is what the first rank counted.
        assert [row.value for row in dp] == pytest.approx([row.value for row in ddp], rel=0.02)


def test_buffers_are_those_that_they_are_said_to_be():
    images = load_images()
    low, high = shares(images, "by digit", 2)
    assert images.train_y[low].max() < images.train_y[high].min() + 1
    assert len(low) == len(high) == 1250
    dark, bright = shares(images, "by brightness", 2)
    assert images.train_x[dark].mean() < images.train_x[bright].mean() - 0.1
    first, second = shares(images, "shuffled", 2)
    assert torch.cat([first, second]).sort().values.equal(torch.arange(2500))


def test_distance_is_in_standard_deviations():
    model, other = nn.BatchNorm1d(2, eps=0.0), nn.BatchNorm1d(2, eps=0.0)
    other.running_mean.copy_(torch.tensor([3.0, 4.0]))
    other.running_var.copy_(torch.tensor([9.0, 4.0]))
    assert dp_vs_ddp.distance(model, other) == pytest.approx(math.sqrt((1 + 4) / 2))


def test_every_batch_size_sees_as_many_images():
    settings = Settings("batch-size", 2, 3, 40)
    assert {batch_size._steps(settings, images) * images for images in batch_size.SIZES} == {40 * 32}


def test_images_are_split_once_and_each_digit_alike():
    images = load_images()
    counts = [part.bincount().tolist() for part in (images.train_y, images.validation_y, images.test_y)]
    assert counts == [[250] * 10, [50] * 10, [200] * 10]
    everything = torch.cat([images.train_x, images.validation_x, images.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == 5000  # none of them in two parts


@pytest.mark.parametrize(("place", "kinds"), [
    ("before", ["Conv2d", "BatchNorm2d", "ReLU"]),
    ("after", ["Conv2d", "ReLU", "BatchNorm2d"]),
    ("both", ["Conv2d", "BatchNorm2d", "ReLU", "BatchNorm2d"]),
    ("none", ["Conv2d", "ReLU"]),
])  # fmt: skip
def test_the_norm_stands_where_it_is_said_to(place, kinds):
    net = build_net(0, (8, 8), place)
    assert [type(layer).__name__ for layer in net] == [*kinds * 2, "Flatten", "Linear"]
    assert net[0].weight.equal(build_net(0, (8, 8), "before")[0].weight)
    assert net(torch.zeros(2, 1, 14, 14)).shape == (2, 10)


def test_small_weights_are_small():
    net = build_net(0, (32, 32), init="small")
    assert net[3].weight.std().item() == pytest.approx(0.01, rel=0.05)


def _in_order(trials):
    with initialized_ranks(torch.device("cpu")) as ranks:
        told = []
        found = run_trials(trials, lambda trial, ranks, together: [(trial, ranks.rank, together)], ranks, told.append)
        return found, told


def test_trials_come_back_in_order_each_run_once_alone_or_by_all():
    trials = Trials(together=["a", "b"], alone=["c", "d", "e"])
    (found, told), (same, others) = run_ranks(_in_order, 2, (trials,))
    assert found == same
    assert found == [("a", 0, True), ("b", 0, True), ("c", 0, False), ("d", 1, False), ("e", 0, False)]
    assert (told, others) == (["a", "b", "c", "e"], ["a", "b", "d"])
    assert trials.num_stages(2) == len(told)


# --- differences and sentences


@pytest.mark.parametrize(("by_seed", "agreed"), [
    ((0.01, 0.011, 0.012), 1),
    ((-0.01, -0.011, -0.012), -1),
    ((0.01, 0.011, -0.0001), 0),  # one seed disagrees
    ((0.01,) * 7 + (-0.001,), 0),  # one of eight disagrees, though their mean is far from zero
    ((0.001, 0.02, 0.04), 0),  # all of one sign, but too far apart
    ((0.0, 0.0, 0.0), 0),
    ((0.01,), 0),  # one seed is no evidence
])  # fmt: skip
def test_when_seeds_agree(by_seed, agreed):
    assert Difference(by_seed).agreed == agreed


@pytest.mark.parametrize(("factor", "agreed"), [(1.01, 1), (0.99, 0)])
def test_the_interval_is_students(factor, agreed):
    """Three seeds: 4.303 standard errors."""
    error = 1 / math.sqrt(3)  # of -1, 0, 1
    assert Difference(tuple(4.303 * error * factor + d for d in (-1, 0, 1))).agreed == agreed


def test_differences_are_paired_by_seed():
    assert difference({0: 1.0, 1: 2.0, 3: 9.0}, {1: 0.5, 0: 0.25}).by_seed == (0.75, 1.5)
    with pytest.raises(ValueError, match="no seed has both"):
        difference({0: 1.0}, {1: 1.0})


GOOD, FAIR, SAME = ({seed: base + 0.001 * seed for seed in range(3)} for base in (0.95, 0.90, 0.9))
UNLIKE = {0: 0.95, 1: 0.85, 2: 0.91}


def test_sentences_say_what_the_seeds_agree_on():
    assert compared("A", GOOD, "B", FAIR) == "A reaches 95.1 % and B 90.1 %: 5.0 ± 0.0 points better."
    assert compared("B", FAIR, "A", GOOD) == "B reaches 90.1 % and A 95.1 %: 5.0 ± 0.0 points worse."
    assert "the seeds do not agree on a difference (+0.2 ± 2.9 points)" in compared("C", UNLIKE, "B", FAIR)
    apart = {
        1: difference(GOOD, FAIR),
        2: difference(FAIR, GOOD),
        4: difference(SAME, UNLIKE),
        8: difference(GOOD, FAIR),
    }
    assert by_level("A", "B", "images", apart) == (
        "A against B, by images, in points: better at 1 (+5.0 ± 0.0) and 8 (+5.0 ± 0.0); worse at 2 (-5.0 ± 0.0); "
        "the seeds do not agree at 4."
    )


def _rows(measure, cells):
    """Rows of three seeds around each cell's value: condition -> value."""
    return [
        Row(dict(condition), seed, measure, value + 0.0001 * seed)
        for condition, value in cells.items()
        for seed in range(3)
    ]


def _by_size(table):
    names = ("BN", "BN, recalibrated", "SyncBN", "GN", "LN", "IN")
    return _rows(
        "accuracy",
        {
            (("norm", name), ("images a rank", size)): accuracy
            for size, accuracies in table.items()
            for name, accuracy in zip(names, accuracies, strict=True)
        },
    )


@pytest.mark.parametrize(("small", "large", "verdict"), [
    (0.95, 0.85, "is what happens here: GN is ahead at 1 of the 1 sizes below, and behind at 1 of the 1"),
    (0.95, 0.95, "happens in part here: GN is ahead at 1 of the 1 sizes below, and behind at 0 of the 1"),
    (0.85, 0.95, "does not happen here: GN is ahead at 0 of the 1 sizes below, and behind at 0 of the 1"),
])  # fmt: skip
def test_batch_size_findings(small, large, verdict):
    rows = _by_size({4: (0.9, 0.91, 0.92, small, 0.9, 0.9), 16: (0.9, 0.9, 0.92, large, 0.9, 0.9)})
    found = batch_size.find(rows)
    assert found[0].startswith("BN against SyncBN, by images a rank, in points: worse at 4 (-2.0 ± 0.0) and 16")
    assert verdict in found[-1]
    assert "-1.0 ± 0.0" not in found[-2]
    assert "+1.0 ± 0.0 (BN, recalibrated)" in found[-2]


def _by_rate(none, bn):
    """Rows in which networks train up to these rates, best at 0.02; None: at none, as no norm from small weights."""
    cells = {}
    for weights in learning_rate.INITS.values():
        for name, highest in (("no norm", none), ("BN", bn), ("GN", 0.1)):
            for lr in learning_rate.RATES:
                trains = highest is not None and lr <= highest and (weights, name) != ("weights of 0.01", "no norm")
                best = 0.02 * (lr == 0.02)
                cells[("norm", name), ("weights", weights), ("lr", lr)] = 0.9 + best if trains else 0.1 + best
    return [*_rows("accuracy", cells), *_rows(MEASURE, cells)]


@pytest.mark.parametrize(("none", "bn", "rates", "verdict"), [
    (0.05, None, "no norm up to 2.5 times, BN at none and GN up to 5 times",
     "BN bears none; without a norm 5 times is too much."),
    (0.05, 0.1, "no norm up to 2.5 times, BN up to 5 times and GN", "BN bears 5 times; without a norm 5 times is"),
    (0.2, 0.6, "no norm up to 10 times, BN up to 30 times and GN", "5 and 30 times; without a norm 5 times is not"),
])  # fmt: skip
def test_learning_rate_findings(none, bn, rates, verdict):
    found = learning_rate.find(_by_rate(none, bn))
    assert found[0].startswith(
        "From He's weights without a norm, the best rate is 0.02, where the network reaches 92.0 %"
    )
    assert rates in found[1]
    assert verdict in found[2]
    assert (
        "From weights of 0.01, in multiples of 0.02, the rates at which a network trains: no norm at none" in found[5]
    )
    assert sum("each at its best rate" in finding for finding in found) == 4


def test_the_best_rate_is_the_validations_and_the_smallest_of_equals():
    cells = {(("norm", "BN"), ("lr", lr)): right for lr, right in ((0.4, 0.9), (0.1, 0.8), (0.2, 0.9))}
    assert best_rates(_rows(MEASURE, cells), "norm") == {"BN": 0.2}


def test_placement_findings():
    cells = {
        (("place", name), ("steps", step)): accuracy
        for step, accuracies in ((25, (0.5, 0.6, 0.4, 0.1)), (200, (0.9, 0.9, 0.95, 0.5)))
        for name, accuracy in zip(placement.NAMES.values(), accuracies, strict=True)
    }
    found = placement.find(_rows("accuracy", cells))
    assert found[0] == (
        "After ReLU against before ReLU, by steps, in points: better at 25 (+10.0 ± 0.0); "
        "the seeds do not agree at 200."
    )
    assert "After 200 steps, after ReLU reaches 90.0 % and before ReLU 90.0 %: the seeds do not agree" in found[3]
    assert found[4] == "After 200 steps, both reaches 95.0 % and before ReLU 90.0 %: 5.0 ± 0.0 points better."


def test_dp_vs_ddp_findings():
    arms = (dp_vs_ddp.DP, dp_vs_ddp.DDP, dp_vs_ddp.LAST, dp_vs_ddp.MERGED, dp_vs_ddp.RECALIBRATED, dp_vs_ddp.SYNC)
    right = {(("arm", arm), ("images", "by digit")): 0.9 - 0.1 * (arm == dp_vs_ddp.DDP) for arm in arms}
    far = {
        (("arm", arm), ("images", "by digit"), ("statistics of", whose)): 0.1 + 0.5 * (whose != nearest)
        for arm, nearest in ((dp_vs_ddp.DP, "rank 0"), (dp_vs_ddp.DDP, "rank 0"), (dp_vs_ddp.SYNC, "all ranks"))
        for whose in dp_vs_ddp.WHOSE
    }
    rows = [*_rows("accuracy", right), *_rows("distance", far)]
    found = dp_vs_ddp.find(rows)
    assert found[0].startswith(
        "Images by digit, nearest to the buffers: in DataParallel (emulated) those of rank 0 with every seed "
        "(rank 0 0.10, the last rank 0.60, all ranks 0.60 standard deviations away); in DDP those of rank 0 "
    )
    assert "in SyncBN those of all ranks with every seed" in found[0]
    assert "DDP against SyncBN, by images, in points: worse at by digit (-10.0 ± 0.0)." in found

    odd = [
        replace(row, value=9.0) if (row.seed, row.condition.get("statistics of")) == (1, "rank 0") else row
        for row in rows
    ]
    assert dp_vs_ddp.find(odd)[0].count("the seeds do not agree whose") == 2


# --- reports


@pytest.fixture
def study():
    rows = tuple(_by_size({1: (0.9, 0.91, 0.92, 0.93, 0.94, 0.95), 16: (0.9, 0.9, 0.92, 0.91, 0.9, 0.9)}))
    question = STUDIES["batch-size"]
    return Study(
        question=question.question,
        claim=question.claim,
        settings=Settings("batch-size", 2, 3, 40),
        notes={"data": "digits"},
        rows=rows[:-3],  # the last cell is missing
        views=(*question.views(rows), View("By norm", "accuracy", "images a rank", "norm", {"norm": "GN"}, "number")),
        findings=tuple(batch_size.find(rows)),
        hardware=Hardware("cpu", "A processor", "gloo", 2, 1),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm study batch-size",
        wall_seconds=61.0,
    )


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_every_cell(study, width):
    out = io.StringIO()
    print_study(study, Console(file=out, highlight=False, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if " ± " in line and line[:1] in "BSGLI"}
    assert rows["GN"] == ["GN", "93.0", "±", "0.0", "91.0", "±", "0.0"]
    assert rows["IN"] == ["IN", "95.0", "±", "0.0", "-"]
    assert "0.930 ± 0.000" in text
    assert study.claim.source in " ".join(text.split())
    assert all(" ".join(finding.split()) in " ".join(text.split()) for finding in study.findings)


def test_markdown_has_a_table_for_each_view_and_every_finding(study):
    lines = markdown(study).splitlines()
    assert "| norm / images a rank | 1 | 16 |" in lines
    assert "| --- | ---: | ---: |" in lines
    assert "| IN | 95.0 ± 0.0 | - |" in lines
    assert [line for line in lines if line.startswith("- ")][: len(study.findings)] == [
        f"- {finding}" for finding in study.findings
    ]


def test_the_plot_is_a_png_whose_lines_differ_without_colour(study, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *args, **look: drawn.append(look) or errorbar(*args, **look))
    write_plot(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = drawn[:6]
    assert [look["label"] for look in first] == ["BN", "BN, recalibrated", "SyncBN", "GN", "LN", "IN"]
    assert len({look["marker"] for look in first}) == len({str(look["linestyle"]) for look in first}) == 6


# --- the command line


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "study", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


BAD = [
    (["batchsize"], "syncnorm study: No such command 'batchsize'."),
    (["placement", "--seeds", "1"], "syncnorm study placement: seeds must be at least 2, got 1"),
    (["placement", "--steps", "0"], "syncnorm study placement: steps must be at least 1, got 0"),
    (
        ["placement", "--ranks", "1"],
        "syncnorm study placement: study needs at least 2 ranks, got 1: ask for --ranks 2",
    ),
    (["placement", "--ranks", "65"], "syncnorm study placement: ranks must be at most 64, got 65"),
    (["placement", "--seeds", "1001"], "syncnorm study placement: seeds must be at most 1000, got 1001"),
    (["placement", "--plot", "/no/such/x.png"], "syncnorm study placement: cannot write /no/such/x.png"),
    (["placement", "--markdown", "/no/such/x.md"], "syncnorm study placement: cannot write /no/such/x.md"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_cost_one_line_and_exit_2(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_under_a_launcher_rank_0_tells_first(call, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    code, out, err = call("placement", "--seeds", "1")
    assert (code, out) == (2, "")
    assert err.startswith("rank 1: syncnorm study placement: ")


def test_a_missing_package_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    code, out, err = call("placement", "--quick")
    assert (code, out) == (2, "")
    assert err == 'syncnorm: needs mlxtend: pip install "syncnorm[compare]"\n'


def test_an_unknown_study_names_the_studies():
    with pytest.raises(ValueError, match="no study is called 'x': the studies are batch-size, "):
        run("x")


@pytest.mark.slow
def test_under_torchrun_it_uses_the_given_ranks_and_writes_every_file(tmp_path):
    files = {"--json": tmp_path / "s.json", "--markdown": tmp_path / "s.md"}
    options = [text for option, file in files.items() for text in (option, str(file))]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "syncnorm", "study")
    done = subprocess.run(
        [sys.executable, *launcher, "placement", "--quick", "--steps", "1", *options],
        capture_output=True, text=True, timeout=100, env=environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Findings") == 1
    assert "\x1b" not in done.stdout
    assert json.loads(files["--json"].read_text())["settings"]["study"] == "placement"
    assert "| no norm |" in files["--markdown"].read_text()
