"""The study of folding: its networks fold wholly, its clock tells fast from slow, its findings follow from rows."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import syncnorm
from syncnorm.tools.cli import syncnorm as command_line
from syncnorm.tools.study.fold import APART, BATCHES, FORMATS, LAYERS, LEFT, SAME, SPEEDUP, find, speedup
from syncnorm.tools.study.fold_models import MODELS
from syncnorm.tools.study.records import Row

NORM = nn.modules.batchnorm._BatchNorm


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_of_every_network_is_folded(name):
    model = syncnorm.convert(MODELS[name](0))
    assert sum(isinstance(m, NORM) for m in model.modules()) >= 4
    for module in model.modules():
        if isinstance(module, NORM):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    folded = syncnorm.fold(model)
    assert not any(isinstance(m, NORM) for m in folded.modules())
    x = torch.randn(2, 1, 14, 14)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(
        torch.equal(a, b) for a, b in zip(MODELS[name](0).parameters(), MODELS[name](0).parameters(), strict=True)
    )


def test_the_separable_network_is_separable():
    convs = [m for m in MODELS["depthwise separable"](0).modules() if isinstance(m, nn.Conv2d)]
    depthwise, pointwise = convs[1::2], convs[2::2]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert all(m.kernel_size == (1, 1) and m.groups == 1 for m in pointwise)


def test_speedup_is_slow_over_fast():
    # 40 times the work, so that a busy machine cannot hide it; few values, for one thread's clock is looked at.
    fast, slow = nn.Tanh(), nn.Sequential(*(nn.Tanh() for _ in range(40)))
    x = torch.randn(64, 256)
    assert speedup(slow, fast, x, 5) > 3
    assert speedup(fast, slow, x, 5) < 1 / 3
    assert 1 / 3 < speedup(slow, slow, x, 5) < 3


def rows(speed=lambda model, name, batch, seed: 1.2 + seed / 100, apart=3e-7, same=1.0, left=0):
    made = []
    for model in MODELS:
        for seed in range(3):
            condition = {"model": model}
            for measure, value in ((APART, apart), (SAME, same), (LAYERS, 4), (LEFT, left)):
                made.append(Row(condition, seed, measure, value))
            for name in FORMATS:
                for batch in BATCHES:
                    cell = condition | {"format": name, "batch": batch}
                    made.append(Row(cell, seed, SPEEDUP, speed(model, name, batch, seed)))
    return made


def test_findings_where_folding_is_faster_everywhere():
    found = find(rows())
    assert (
        found[0]
        == "All batch norms are folded; outputs differ by 3e-07 of the largest at most, and every answer stays."
    )
    assert (
        found[1] == "plain, batch of 1, times as fast when folded: 1.21 ± 0.01 contiguous, 1.21 ± 0.01 channels last."
    )
    assert found[-1].startswith(
        "Folding is faster in 12 of 12 cases; most in this one: plain, batch of 1, contiguous (1.21)"
    )


def test_findings_where_it_is_slower_or_open():
    def speed(model, name, batch, seed):
        if model == "plain":
            return 0.8 + seed / 100
        return (
            1.5 + seed / 100 if (model, name, batch) == ("ResNet-18-like", "channels last", 32) else 0.9 + seed / 10
        )

    found = find(rows(speed, same=0.75, left=1))
    assert found[0].startswith("9 of 36 batch norms are left unfolded;")
    assert found[0].endswith("in the worst network 75.0 % of the answers stay.")
    assert "0.81 ± 0.01 contiguous (slower)" in found[1]
    assert "(the seeds do not agree)" in found[3]
    assert found[-1] == (
        "Folding is faster in 1 of 12 cases; most in this one: ResNet-18-like, batch of 32, channels last (1.51)."
    )
    assert find(rows(lambda *_: 1.0))[-1] == "In none of 12 cases do the seeds agree that folding is faster."


@pytest.mark.slow
def test_a_tiny_run():
    result = CliRunner().invoke(command_line, ["study", "fold", "--quick", "--steps", "1"])
    assert result.exit_code == 0, result.output
    assert "Times as fast when folded, channels last" in result.output
    assert "All batch norms are folded" in result.output
