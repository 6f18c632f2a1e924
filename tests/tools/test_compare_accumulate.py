"""Arms of a comparison that split each rank's batch into micro-batches, on two ranks."""

import pytest
import torch
import user_jobs
from torch import nn

from syncnorm.errors import InputError
from syncnorm.testing import run_ranks, shutdown
from syncnorm.tools.common.data import Batches, digits, pieces
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.compare import MORE_ARMS, arm_named, run
from syncnorm.tools.compare.arms import DEFAULT_ARMS
from syncnorm.tools.compare.paired import pairs
from syncnorm.tools.compare.problem import Problem
from syncnorm.tools.compare.runner import make_settings
from syncnorm.tools.compare.training import Trainer

SHORT = {"steps": 4, "parity_steps": 2, "seeds": 1}


@pytest.fixture(scope="module", autouse=True)
def _end_of_ranks():
    yield
    shutdown()


def few_digits():
    train, test = digits()
    return torch.utils.data.Subset(train, range(100)), torch.utils.data.Subset(test, range(20))


@pytest.fixture(scope="module")
def uneven():
    """Five samples per rank in three micro-batches: 2, 2 and 1."""
    arms = ["ddp", "ddp+syncbn", "accumulate-bn:3", "accumulate:3", "accumulate-exact:3"]
    return run(datasets=few_digits, arms=arms, batch_per_rank=5, **SHORT)


def largest(parity):
    errors = (parity.output, parity.gradients, parity.params, parity.running_mean, parity.running_var)
    return max(error.max_rel for error in errors)


def test_exact_micro_batches_equal_one_process_as_closely_as_ddp_with_syncbn(uneven):
    exact, synced = uneven["accumulate-exact:3"], uneven["ddp+syncbn"]
    assert exact.parity[0].within_rounding
    assert largest(exact.parity[0]) < 4 * largest(synced.parity[0])
    assert all(layer.output.max_rel < 1e-5 for layer in exact.parity[0].layers)
    assert any(sentence.startswith("Exact accumulation in 3 micro-batches is correct") for sentence in uneven.verdict)


def test_cross_micro_batch_statistics_are_those_of_the_whole_batch_in_the_first_layer(uneven):
    cross, local = uneven["accumulate:3"].parity[0], uneven["accumulate-bn:3"].parity[0]
    for error in (cross.layers[0].running_mean, cross.layers[0].running_var):
        assert error.max_rel < 1e-5  # no norm comes before it, and it has moved once
    assert local.layers[0].running_mean.max_rel > 0.1  # it has moved three times
    assert not cross.within_rounding  # the first micro-batch has seen only itself
    assert not any("CmBN" in sentence and "is correct" in sentence for sentence in uneven.verdict)


def test_ddp_reduces_once_and_norms_exchange_for_each_micro_batch(uneven):
    def calls(arm, origin, op):
        return sum(c.calls for c in uneven[arm].collectives if (c.origin, c.op) == (origin, op))

    for arm in ("accumulate-bn:3", "accumulate:3", "accumulate-exact:3"):
        assert calls(arm, "ddp", "all_reduce") == calls("ddp", "ddp", "all_reduce") == 1
        assert uneven[arm].cost.ratio > 0
        assert uneven[arm].memory is None or uneven[arm].memory.peak_bytes > 0
    assert calls("accumulate-bn:3", "norm", "exchange") == 0
    assert calls("accumulate:3", "norm", "exchange") == 3 * calls("ddp+syncbn", "norm", "exchange") > 0
    assert calls("accumulate-exact:3", "norm", "exchange") > 0


class WithoutEffect(nn.Module):
    """The batch norm does not reach the output."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1)) + 0 * self.norm(x).sum()


def test_the_loss_is_the_mean_over_the_samples_of_uneven_micro_batches():
    found = run(WithoutEffect, few_digits, arms=["accumulate-bn"], batch_per_rank=5, **SHORT)
    parity = found["accumulate-bn"].parity[0]
    assert parity.gradients.max_rel < 1e-6
    assert parity.gradient_factor == pytest.approx(1, abs=1e-6)
    losses = [[point.value for point in found[arm].seeds[0].train_loss] for arm in ("single", "accumulate-bn")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"amp": "bfloat16"}, {"num_workers": 1}], ids=str)
def test_a_step_that_calls_the_model_twice(more):
    found = run(
        user_jobs.two_views,
        user_jobs.pairs,
        step=user_jobs.two_view_step,
        collate=user_jobs.batch_of_views,
        metric=user_jobs.right,
        arms=["ddp+syncbn", "accumulate-bn", "accumulate", "accumulate-exact"],
        batch_per_rank=4,
        **SHORT,
        **more,
    )
    exact, synced = found["accumulate-exact"], found["ddp+syncbn"]
    assert exact.parity[0].within_rounding
    assert exact.results == pytest.approx(synced.results, abs=0.03 if more else 1e-6)
    for arm in found.arms:
        assert arm.not_run is None
        assert arm.test_metric is not None
    assert not found["accumulate"].parity[0].within_rounding


def test_a_step_that_trains_by_itself_has_no_micro_batches():
    arms = ["accumulate-bn", "accumulate", "accumulate-exact"]
    found = run(
        user_jobs.gan,
        user_jobs.pairs,
        step=user_jobs.gan_step,
        optimizer=user_jobs.gan_optimizers,
        metric=user_jobs.distance,
        arms=arms,
        batch_per_rank=4,
        **SHORT,
    )
    why = "micro-batches need a step that returns its loss, and user_jobs:gan_step trains by itself"
    assert [found[arm].not_run for arm in arms] == [why] * 3
    assert "Accumulation with CmBN did not run: micro-batches need a step" in " ".join(found.verdict)


def vectors():
    def make(size):
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(size))
        return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())

    return make(40), make(20)


def vector_net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_local_statistics_of_a_single_sample_are_refused_and_those_of_the_step_are_not():
    arms = ["accumulate-bn", "accumulate", "accumulate-exact"]
    found = run(vector_net, vectors, arms=arms, batch_per_rank=3, **SHORT)
    assert "Expected more than 1 value per channel" in found["accumulate-bn"].not_run
    assert found["accumulate"].not_run is None
    assert found["accumulate-exact"].parity[0].within_rounding


def _rank_sizes(name, settings):
    """How many samples the first layer gets in each of its calls in one step, of five per rank."""
    arm, sizes = arm_named(name), []
    with initialized_ranks(torch.device("cpu")) as ranks:
        problem = Problem.of(vector_net, vectors)
        model = arm.convert_norms(vector_net(), 1)
        model[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        part = slice(5 * ranks.rank, 5 * ranks.rank + 5)
        batches = Batches(vectors()[0], 10, part, 0, micro_batches=arm.micro_batches_in_turn)
        Trainer(model, model, problem, batches, arm, 0, settings, ranks).step()
    return sizes


@pytest.mark.parametrize("name", ["accumulate-bn:2", "accumulate:2", "accumulate-exact:2"])
def test_a_layer_gets_the_micro_batches_one_by_one(name):
    settings = make_settings(arms=[name], ranks=2, batch_per_rank=5)
    for sizes in run_ranks(_rank_sizes, 2, (name, settings)):
        assert sorted(sizes) == [2, 3]
    assert run_ranks(_rank_sizes, 2, ("ddp+syncbn", settings)) == [[5], [5]]


class LossInside(nn.Module):
    """Returns the loss alone, which no parts of a batch can be concatenated from."""

    def __init__(self):
        super().__init__()
        self.body = vector_net()

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.body(x), y)


def loss_inside(model, batch):
    return model(*batch)


def test_a_model_that_cannot_be_divided_is_not_run_and_the_other_arms_are():
    arms = ["accumulate", "accumulate-exact"]
    found = run(LossInside, vectors, step=loss_inside, arms=arms, batch_per_rank=4, **SHORT)
    assert "run_in_step" in found["accumulate-exact"].not_run
    assert found["accumulate"].test_metric is not None


REFUSED = [
    (["accumulate:0"], {}, "arm 'accumulate:0': expected the number of micro-batches, such as accumulate:8"),
    (["accumulate-exact:x"], {}, "arm 'accumulate-exact:x': expected the number of micro-batches, such as"),
    (["accumulate-bn:"], {}, "arm 'accumulate-bn:': expected the number of micro-batches"),
    (["acumulate"], {}, "no arm is called 'acumulate': did you mean accumulate"),
    (["accumulate:4"], {"batch_per_rank": 3}, "arm accumulate:4: 3 samples per rank cannot be split into 4 micro-b"),
    (["accumulate-exact"], {"batch_per_rank": 1}, "arm accumulate-exact: 1 samples? per rank cannot be split into 2"),
    (["accumulate"], {"accumulate": 2}, "arm accumulate splits the batch of each step itself: leave out --accumula"),
]


@pytest.mark.parametrize(("arms", "more", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_bad_numbers_of_micro_batches_are_refused_before_anything_starts(arms, more, message):
    with pytest.raises(InputError, match=message):
        run(arms=arms, **more)


def test_the_names_are_promises():
    names = {"accumulate", "accumulate-exact", "accumulate-bn"}
    assert names < MORE_ARMS.keys()
    assert not names & {*DEFAULT_ARMS}
    for name in names:
        assert (arm_named(name).name, arm_named(name).micro_batches) == (name, 2)
        assert (arm_named(f"{name}:5").name, arm_named(f"{name}:5").micro_batches) == (f"{name}:5", 5)


def test_accumulation_is_compared_with_syncbn_and_with_local_statistics():
    names = ["single", "ddp+syncbn", "accumulate-bn:4", "accumulate:4", "accumulate-exact", "accumulate-bn"]
    found = set(pairs(iter(names)))
    assert found >= {(name, "ddp+syncbn") for name in names[2:]}
    assert found >= {("accumulate:4", "accumulate-bn:4"), ("accumulate-exact", "accumulate-bn")}
    assert ("accumulate:4", "accumulate-bn") not in found
    assert all(name != other for name, other in found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_micro_batches_are_the_batch_in_pieces(num_workers):
    data = [torch.tensor([float(i)]) for i in range(20)]
    whole = Batches(data, 10, slice(5, 10), seed=3)
    split = Batches(data, 10, slice(5, 10), seed=3, num_workers=num_workers, micro_batches=3)
    assert split.shares == [0.4, 0.4, 0.2]
    for _ in range(3):
        parts = [split.next() for _ in split.shares]
        assert [len(part) for part in parts] == [2, 2, 1]
        assert torch.equal(torch.cat(parts), whole.next())
    assert [len(piece) for piece in pieces(range(3, 10), 4)] == [2, 2, 2, 1]
