"""Metrics: their results against a calculation by hand, and the values of samples or groups behind them."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.tools.compare.metrics import GROUPS, Metric, as_metric, remembered
from syncnorm.tools.compare.named_metrics import NAMED


class Fixed(nn.Module):
    """Its input is its output; it counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def logits(classes, num_classes):
    return nn.functional.one_hot(classes, num_classes).movedim(-1, 1).float()


def tallied(metric, batches, model=None):
    tally = metric.tally(len(batches), with_units=True)
    for batch in batches:
        with remembered(model or Fixed()):
            tally.update(model or Fixed(), batch)
    return tally


def test_mean_iou_with_an_ignore_label_by_hand():
    predicted, true = torch.tensor([[0, 0, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 1, 255, -100]])
    tally = tallied(NAMED["miou"], [(logits(predicted, 4), true)])
    # Class 0: 1 of 2; class 1: 2 of 3; classes 2 and 3 neither occur nor are predicted where there is a label.
    assert tally.result() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_accuracy_of_a_sample_is_the_share_of_its_labels():
    predicted, true = torch.tensor([[0, 1], [1, 1], [0, 0]]), torch.tensor([[0, 0], [1, 255], [255, 255]])
    tally = tallied(NAMED["accuracy"], [(logits(predicted, 2), true)])
    assert tally.result() == pytest.approx(2 / 3)
    assert tally.units() == [0.5, 1.0]  # the third sample has no label


@pytest.mark.parametrize("num_batches", [3, 57])
def test_groups_are_the_pseudo_values_of_the_jackknife(num_batches):
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(3, (2, 4, 25), generator=generator) for _ in range(num_batches)]
    batches = [(logits(predicted, 3), true) for predicted, true in pairs]
    found = tallied(NAMED["miou"], batches)
    groups = min(GROUPS, num_batches)
    whole = tallied(NAMED["miou"], batches).result()
    expected = []
    for group in range(groups):
        rest = [batch for i, batch in enumerate(batches) if i % groups != group]
        expected.append(groups * whole - (groups - 1) * tallied(NAMED["miou"], rest).result())
    assert found.units() == pytest.approx(expected)
    assert sum(expected) / groups == pytest.approx(whole, abs=0.01)


def test_the_model_runs_once_for_all_groups_and_as_before_afterwards():
    model, batches = Fixed(), [(logits(torch.tensor([[0, 1]]), 2), torch.tensor([[0, 1]]))] * 4
    tallied(NAMED["miou"], batches, model)
    assert model.calls == 4
    assert "forward" not in vars(model)
    with remembered(model):
        assert model(batches[0][0]) is model(batches[0][0].clone())
        model(batches[0][0] + 1)
    assert model.calls == 6


def test_of_a_single_batch_there_are_no_groups():
    assert tallied(NAMED["miou"], [(logits(torch.tensor([[0, 1]]), 2), torch.tensor([[0, 1]]))]).units() == []


def drawn(model, batch):
    return torch.rand(len(batch))


drawn.higher_is_better = False


def test_a_metric_that_draws_noise_draws_the_same_again():
    metric = as_metric(drawn, "jobs:drawn")
    assert (metric.name, metric.higher_is_better, metric.share, metric.info.units) == (
        "drawn",
        False,
        False,
        "samples",
    )
    first, second = (tallied(metric, [torch.zeros(3), torch.zeros(2)]).units() for _ in range(2))
    assert first == second
    assert len(set(first)) == 5


def test_what_does_not_fit_named_metrics():
    with pytest.raises(InputError, match=r"logits of shape \(2, 3\) do not fit targets of shape \(1,\)"):
        tallied(NAMED["accuracy"], [(torch.zeros(2, 3), torch.zeros(1))])
    with pytest.raises(InputError, match=r"expected batches of \(inputs, targets\), got dict"):
        tallied(NAMED["miou"], [{"image": torch.zeros(2, 3)}])


@pytest.mark.skipif(find_spec("torchmetrics") is not None, reason="torchmetrics is installed")
def test_mean_average_precision_needs_torchmetrics():
    with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
        Metric(NAMED["map"].measure, "mAP").tally(1, with_units=False)
