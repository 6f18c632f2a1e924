"""The emulation of ``nn.DataParallel``, and the batches and data that the tools train on."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncnorm.tools.common.data import Batches, batch_indices, digits
from syncnorm.tools.common.data_parallel import EmulatedDataParallel


def _tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 5))


@pytest.mark.parametrize("replicas", [2, 3])
def test_emulated_data_parallel_against_replicas_by_hand(replicas):
    model, x, y = _tiny_model(), torch.randn(6, 1, 6, 6), torch.randint(5, (6,))
    copies = [copy.deepcopy(model) for _ in range(replicas)]
    emulated = EmulatedDataParallel(model, replicas)
    for _ in range(2):
        outputs = torch.cat([replica(part) for replica, part in zip(copies, x.chunk(replicas), strict=True)])
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        got = emulated(x)
        torch.testing.assert_close(got, outputs)
        F.cross_entropy(got, y).backward()
        # The buffers of replica 0 are kept, and the sum of the gradients.
        for name, parameter in model.named_parameters():
            by_hand = sum(replica.get_parameter(name).grad for replica in copies)
            torch.testing.assert_close(parameter.grad, by_hand)
        torch.testing.assert_close(dict(model.named_buffers()), dict(copies[0].named_buffers()))
        for replica in copies[1:]:
            replica.load_state_dict(copies[0].state_dict())


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(x)
        return {"logits": y, "others": (y.sum(), [y * 2])}


def test_emulated_data_parallel_concatenates_nested_outputs():
    x = torch.randn(8, 3)
    found = EmulatedDataParallel(InADict(), 2)(x)
    parts = [InADict()(part) for part in x.chunk(2)]
    assert torch.equal(found["logits"], torch.cat([part["logits"] for part in parts]))
    assert torch.equal(found["others"][0], torch.stack([part["others"][0] for part in parts]))
    assert torch.equal(found["others"][1][0], found["logits"] * 2)


class Augmented:
    """Items that are random at each access."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randn(2) + random.random() + index, index % 3


def test_augmented_items_are_the_same_on_every_rank_and_new_at_every_step():
    whole, second = Batches(Augmented(), 6, slice(0, 6), seed=1), Batches(Augmented(), 6, slice(3, 6), seed=1)
    steps = []
    for _ in range(2):
        (x, y), (part_x, part_y) = whole.next(), second.next()
        assert torch.equal(x[3:], part_x)
        assert torch.equal(y[3:], part_y)
        steps.append(x - x.round())
    assert not torch.equal(*steps)


def test_batches_depend_only_on_the_seed_and_cover_an_epoch():
    batches = batch_indices(11, 4, seed=3)
    first, second, third = (next(batches) for _ in range(3))
    assert len({*first.tolist(), *second.tolist()}) == 8  # the last three of eleven are dropped
    assert [len(b) for b in (first, second, third)] == [4, 4, 4]
    assert torch.equal(first, next(batch_indices(11, 4, seed=3)))
    assert not torch.equal(first, next(batch_indices(11, 4, seed=4)))


def test_split_separates_train_and_test():
    (train_x, _), (test_x, _) = (data.tensors for data in digits())
    assert (len(train_x), len(test_x)) == (1347, 450)
    assert train_x.shape[1:] == (1, 8, 8)
    assert (train_x.min(), train_x.max()) == (-1, 1)
