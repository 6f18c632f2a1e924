"""What does not fit is said in one line before anything is started: what came, and what to do."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import user_jobs
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from syncnorm.errors import InputError
from syncnorm.tools.compare import Metric, run
from syncnorm.tools.compare.metrics import as_metric


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def items(make):
    return [make(i) for i in range(16)], [make(i) for i in range(4)]


def images():
    return items(lambda i: (torch.randn(1, 6, 6), i % 3))


def ragged():
    return items(lambda i: (torch.randn(1, 6 + i % 3, 6), i % 3))


def boxes():
    return items(lambda i: (torch.randn(1, 6, 6), {"boxes": torch.zeros(i % 3, 4), "labels": torch.zeros(i % 3)}))


def stacked_boxes():
    return items(lambda i: (torch.randn(1, 6, 6), {"boxes": torch.zeros(1, 4)}))


def dicts():
    return items(lambda i: {"image": torch.randn(1, 6, 6), "label": i % 3})


class OnlyHere(list):
    def __getitem__(self, index):
        if get_worker_info() is not None:
            raise TypeError("cannot be pickled")
        return super().__getitem__(index)


def only_here():
    return tuple(OnlyHere(part) for part in images())


def as_dict(batch):
    return {"image": torch.stack([item[0] for item in batch])}


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def nothing(model, batch):
    model(batch[0])


def vector(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def texts(model, batch):
    return {"loss_a": loss_of(model, batch), "note": "fine"}


def bad_key(model, batch):
    return loss_of(model, (batch["image"], batch["target"]))


def of_constants(model, batch):
    return torch.tensor(1.0)


def one_argument(batch):
    return batch


def only_in_training(model, batch):
    return {"loss": loss_of(model, batch)} if model.training else [model(batch[0])]


def by_itself(model, batch, optimizers):
    loss = loss_of(model, batch)
    loss.backward()
    optimizers.step()
    return loss


def records_nothing(model, batch, optimizers):
    by_itself(model, batch, optimizers)


def mean(model, batch) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def not_finite(model, batch):
    return torch.full((len(batch[0]),), float("nan"))


def broken(model, batch):
    raise KeyError("boxes")


def no_direction(model, batch):
    return torch.ones(len(batch[0]))


mean.higher_is_better = not_finite.higher_is_better = broken.higher_is_better = True


class WithoutCompute:
    higher_is_better = True

    def update(self, model, batch):
        model(batch[0])


class UnitsAreMissing(WithoutCompute):
    def compute(self):
        return 1.0

    def units(self):
        return None


def percent_later(model, batch):
    """Between 0 and 1 in the trial only."""
    return torch.full((len(batch[0]),), 100.0 if dist.is_initialized() else 1.0)


def fewer_later(model, batch):
    return torch.ones(len(batch[0]))[: 1 if dist.is_initialized() else None]


percent_later.higher_is_better = fewer_later.higher_is_better = percent_later.share = True


def no_optimizer(model):
    return list(model.parameters())


def returns_none(model):
    pass


def refuses(model):
    return torch.optim.SGD([], lr=0.1)


def of_another_model(model):
    return torch.optim.SGD(net().parameters(), lr=0.1)


def with_closure(model):
    return torch.optim.LBFGS(model.parameters())


class OnlyFullPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        y = self.net(x)
        if y.dtype != torch.float32:
            raise TypeError("fp32 only")
        return y


def edits_nothing(model):
    return "a model"


def fails(model):
    raise AttributeError("no backbone")


STEP = {"step": loss_of}
REFUSED = [
    (
        {"datasets": ragged},
        r"items cannot be collated into a batch \(write a function of a list of items, and pass it",
    ),
    (
        {"datasets": boxes},
        r"items cannot be collated into a batch \(write a function .* with --collate\): RuntimeError",
    ),
    ({"datasets": stacked_boxes}, "cross-entropy needs .* tensors, got Tensor and dict: pass a loss .* --step"),
    ({"datasets": dicts}, r"items must be \(input, target\), got dict: say how to train on them with --step"),
    ({"collate": as_dict}, r"batches must be \(inputs, targets\), got dict from .*as_dict: say how .* --step"),
    ({"step": nothing}, "the step .*nothing returned None: expected a scalar tensor, a dict of them, or an output"),
    ({"step": vector}, r"the step .*vector returned float32 of shape \(4,\): expected a scalar, the mean"),
    ({"step": texts}, r"the step .*texts: \['note'\] returned str: expected a scalar tensor"),
    ({"step": bad_key}, r"the step .*bad_key raised in training: TypeError"),
    ({"step": of_constants}, "the step .*of_constants raised in training: RuntimeError.*does not require grad"),
    ({"step": one_argument}, r"the step .*one_argument has 1 parameter: expected \(model, batch\)"),
    ({"step": loss_of, "loss": F.cross_entropy}, "computes the loss itself: leave out the loss"),
    (
        {"step": only_in_training},
        "gives no loss in tests .*in eval mode, .* returned list.*: pass a metric with --metric",
    ),
    ({"step": by_itself}, r"gives no loss in tests \(it trains by itself\): pass a metric with --metric"),
    ({"step": by_itself, "metric": "loss"}, "gives no loss in tests"),
    ({"step": records_nothing, "metric": mean}, "the step .*records_nothing returned None"),
    ({"step": by_itself, "metric": "accuracy", "accumulate": 2}, "trains by itself: leave out --accumulate"),
    ({"step": by_itself, "metric": "accuracy", "amp": "float16"}, "without loss scaling: use --amp bfloat16"),
    ({"metric": "mIoU"}, "no metric is called 'mIoU': did you mean miou"),
    ({"metric": mean}, "the metric mean returned 1 values for 2 samples: expected one for each sample"),
    ({"metric": not_finite}, "the metric not_finite returned nan: expected finite values"),
    ({"metric": Metric(mean, "share", share=True)}, "the metric share returned 1 values for 2 samples"),
    ({"metric": broken}, "the metric broken raised KeyError: 'boxes'"),
    (
        {"metric": no_direction},
        "no_direction does not say its direction: set no_direction.higher_is_better to True or",
    ),
    ({"metric": WithoutCompute}, "the metric WithoutCompute raised AttributeError: .*compute"),
    ({"optimizer": no_optimizer}, r"no_optimizer returned Parameter: expected a torch\.optim\.Optimizer"),
    ({"optimizer": returns_none}, r"returns_none returned None: expected a torch\.optim\.Optimizer"),
    ({"optimizer": refuses}, "refuses raised ValueError: optimizer got an empty parameter list"),
    ({"optimizer": of_another_model}, "of_another_model returned an optimizer without any parameter of the model"),
    ({"optimizer": with_closure}, r"LBFGS\.step needs a closure: call it in a --step with a third parameter"),
    ({"metric": UnitsAreMissing}, "the metric UnitsAreMissing raised TypeError: 'NoneType' object is not iterable"),
    (
        {"build_model": OnlyFullPrecision, "amp": "bfloat16"},
        "the model raised in training, .*: TypeError: fp32 only",
    ),
    (
        {"datasets": only_here, "num_workers": 1},
        "cannot be loaded with --num-workers 1: TypeError: .*cannot be pickled",
    ),
    ({"amp": "half"}, "amp must be bfloat16 or float16, got 'half'"),
    ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ({"eval_batch": 0}, "eval_batch must be at least 1, got 0"),
    ({"arms": ["ddp+syncbn:3"]}, r"arm ddp\+syncbn:3: 2 ranks cannot be divided into groups of 3"),
    ({"arms": ["ddp+syncbn:x"]}, r"expected the number of ranks in a group, such as ddp\+syncbn:8"),
    ({"arms": ["user_jobs:with_nothing"]}, "--arms user_jobs:with_nothing: user_jobs has no 'with_nothing'"),
    (
        {"arms": [f"{__name__}:edits_nothing"]},
        "^arm .*:edits_nothing: expected a model, or None after an edit in place, got str",
    ),
    ({"arms": [f"{__name__}:fails"]}, "arm .*:fails raised AttributeError: no backbone"),
]


def _id(value):
    """The same in every process: without the addresses of functions."""
    return str(value)[:40] if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=_id)
def test_one_line_says_what_came_and_what_to_do(arguments, message):
    given = {"build_model": net, "datasets": images, **arguments}
    with pytest.raises(InputError, match=message) as raised:
        run(**given)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_the_user_may_forget_the_collate_function_of_a_step():
    with pytest.raises(InputError, match="user_jobs:two_view_step raised in training: AttributeError"):
        run(user_jobs.two_views, user_jobs.pairs, step=user_jobs.two_view_step)


def more_on_rank_0():
    train, test = images()
    return train, test if not dist.is_initialized() or dist.get_rank() == 0 else test[:3]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"metric": percent_later}, "the metric percent_later is 100: expected between 0 and 1, as share says"),
    ({"metric": fewer_later}, "fewer_later returned 2 values for 4 test samples: expected one for each sample"),
    ({"datasets": more_on_rank_0}, "returns 16 and 4 samples on rank 0, but 16 and 3 on rank 1: it must return the"),
], ids=["share", "values", "data"])  # fmt: skip
def test_one_line_says_what_only_a_rank_can_find_out(arguments, message):
    given = {"build_model": net, "datasets": images, "steps": 1, **arguments}
    with pytest.raises(InputError, match=message) as raised:
        run(**given)
    assert "\n" not in str(raised.value)


class MeanOfRight:
    """It divides by zero without a batch."""

    higher_is_better = share = True

    def __init__(self):
        self.right = []

    def update(self, model, batch):
        self.right += (model(batch[0]).argmax(1) == batch[1]).tolist()

    def compute(self):
        return sum(self.right) / len(self.right)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_metric_never_computes_without_a_batch(num_batches):
    metric = as_metric(MeanOfRight, "MeanOfRight")
    tally = metric.tally(num_batches, with_units=True)
    for _ in range(num_batches):
        tally.update(net().eval(), (torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])))
    assert 0 <= tally.result() <= 1
    assert len(tally.units()) == (0 if num_batches == 1 else 2)


def test_the_caller_keeps_the_state_of_its_random_generator():
    before = torch.random.get_rng_state()
    run(net, images, arms=["ddp"], steps=1, seeds=1)
    assert torch.equal(torch.random.get_rng_state(), before)


class GrowsLater(list):
    """Images of which one is larger than those that are tried before the training."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (torch.cat([image, image], 1), label) if index == len(self) - 1 else (image, label)


def grow_later():
    return [GrowsLater(each) for each in images()]


def test_what_breaks_in_the_middle_of_the_training_is_said_in_one_line():
    message = "arm .*: RuntimeError: stack expects each tensor to be equal size, but got"
    with pytest.raises(InputError, match=message) as raised:
        run(net, grow_later, arms=["ddp"], steps=40, parity_steps=1, seeds=1)
    assert "\n" not in str(raised.value)
