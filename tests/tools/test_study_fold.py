"""The study of folding: every norm of its networks folds, its timing is right, its findings follow from the rows."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.tools.study.fold import (
    BATCHES,
    FORMATS,
    LAYERS,
    MAX_DIFFERENCE,
    MODELS,
    QUESTION,
    SAME,
    SPEEDUP,
    UNFOLDED,
    find,
    speedup,
)
from syncnorm.tools.study.records import StudyRow

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
    # 40 times the work, so that a busy machine cannot hide it; few values, since only one thread is timed.
    fast, slow = nn.Tanh(), nn.Sequential(*(nn.Tanh() for _ in range(40)))
    x = torch.randn(64, 256)
    assert speedup(slow, fast, x, 5) > 3
    assert speedup(fast, slow, x, 5) < 1 / 3
    assert 1 / 3 < speedup(slow, slow, x, 5) < 3


def rows(speed=lambda model, name, batch, seed: 1.2 + seed / 100, difference=3e-7, same=1.0, unfolded=0):
    made = []
    for model in MODELS:
        for seed in range(3):
            condition = {"model": model}
            for measure, value in ((MAX_DIFFERENCE, difference), (SAME, same), (LAYERS, 4), (UNFOLDED, unfolded)):
                made.append(StudyRow(condition, seed, measure, value))
            for name in FORMATS:
                for batch in BATCHES:
                    cell = condition | {"format": name, "batch": batch}
                    made.append(StudyRow(cell, seed, SPEEDUP, speed(model, name, batch, seed)))
    return made


RULE = QUESTION.rule


def test_findings_where_folding_is_faster_everywhere():
    found = find(rows(), RULE)
    assert found[0] == (
        "All batch norms are folded; outputs differ by at most 3e-07 of the largest, and all predictions stay the "
        "same."
    )
    assert found[1] == (
        "Speed-up by folding (95% intervals), plain, batch size 1: 1.21 (1.19 to 1.23) contiguous, "
        "1.21 (1.19 to 1.23) channels last."
    )
    assert found[-2] == ("The largest speed-up by folding is 1.21 (1.19 to 1.23) (plain, batch size 1, contiguous).")
    assert found[-1].startswith("The claim that folding makes inference faster holds here: supported by 12,")


def test_findings_where_it_is_slower_or_the_seeds_disagree():
    def speed(model, name, batch, seed):
        if model == "plain":
            return 0.8 + seed / 100
        return (
            1.5 + seed / 100 if (model, name, batch) == ("ResNet-18-like", "channels last", 32) else 0.9 + seed / 10
        )

    found = find(rows(speed, same=0.75, unfolded=1), RULE)
    assert found[0].startswith("9 of 36 batch norms are not folded;")
    assert found[0].endswith("in the worst network 75.0 % of the predictions stay the same.")
    assert "0.81 (0.79 to 0.83, slower) contiguous" in found[1]
    assert "1.00 (0.75 to 1.25, undecided: about " in found[3]
    assert found[-2].startswith(
        "The largest speed-up by folding is 1.51 (1.49 to 1.53) (ResNet-18-like, batch size 32,"
    )
    assert found[-1].endswith(
        "holds in part here: supported by 1, contradicted by 4 and left open by 7 of 12 comparisons."
    )
    equal = find(rows(lambda *_: 1.0), RULE)
    assert "1.00 (1.00 to 1.00, equally fast within 0.02) contiguous" in equal[1]
    assert equal[-1].startswith("The claim that folding makes inference faster does not hold here")


def test_the_margin_of_a_speed_up_is_in_percent():
    found = find(rows(lambda model, name, batch, seed: 0.95 + seed / 20), replace(RULE, margin=13))
    assert "1.00 (0.88 to 1.12, equally fast within 0.13)" in found[1]
