"""How the arguments of a model are divided into micro-batches, and its outputs concatenated."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from syncnorm.errors import InputError
from syncnorm.training.parts import concatenated, divided


class Pair(NamedTuple):
    x: Tensor
    note: str


class Output(OrderedDict):
    """Made from keywords, as those of transformers are."""


def rows(n: int, *shape: int) -> Tensor:
    return torch.arange(float(n)).view(n, *(1,) * len(shape)).expand(n, *shape)


@pytest.mark.parametrize(
    ("samples", "count", "sizes"), [(12, 3, [4, 4, 4]), (7, 3, [2, 2, 3]), (2, 4, [1, 1]), (0, 3, [0]), (1, 1, [1])]
)
def test_sizes_differ_by_one_sample_at_most(samples, count, sizes):
    parts = divided(((rows(samples, 2),), {}), count)
    assert [part.samples for part in parts] == sizes
    assert torch.equal(torch.cat([part.value[0][0] for part in parts]), rows(samples, 2))


def test_structures_keep_their_types_and_everything_else_is_passed_on():
    whole = ((Pair(rows(4, 3), "a"), None, [rows(4), rows(4, 2)]), {"mask": rows(4) > 1, "scale": torch.tensor(2.0)})
    first, second = (part.value for part in divided(whole, 2))
    assert isinstance(first[0][0], Pair)
    assert first[0][0].note == "a"
    assert first[0][1] is None
    assert [t.shape[0] for t in first[0][2]] == [2, 2]
    assert second[1]["mask"].tolist() == [True, True]
    assert second[1]["scale"] == 2.0


def test_lists_with_one_element_per_sample_are_divided_as_lists():
    images = [torch.zeros(3, 8 + i, 8) for i in range(5)]
    targets = [{"boxes": torch.zeros(i, 4)} for i in range(5)]
    parts = divided(((images, targets), {}), 2)
    assert [len(part.value[0][0]) for part in parts] == [2, 3]
    assert parts[1].value[0][1] == targets[2:]


def test_one_entry_in_all_is_for_every_part():
    first, second = divided(((rows(4, 3), torch.ones(1, 3)), {}), 2)
    assert first.value[0][1].shape == second.value[0][1].shape == (1, 3)


@pytest.mark.parametrize(
    ("whole", "got"),
    [
        ((("text", 3), {}), "no tensor or list"),
        (((rows(4, 3), rows(2, 9)), {}), r"expected 4 samples.*got one of shape \(2, 9\)"),
        (((pack_sequence([rows(3), rows(2)]),), {}), "PackedSequence"),
    ],
)
def test_what_cannot_be_divided_is_refused(whole, got):
    with pytest.raises(InputError, match=got + ".*run_in_step"):
        divided(whole, 2)


def test_outputs_are_concatenated_in_their_structure():
    outputs = [Output(logits=rows(n, 3), hidden=(rows(2 * n), [rows(n)]), loss=None) for n in (2, 3)]
    whole = concatenated(outputs, [2, 3])
    assert isinstance(whole, Output)
    assert whole["logits"].shape == (5, 3)
    assert whole["hidden"][0].shape == (10,)
    assert whole["hidden"][1][0].shape == (5,)
    assert whole["loss"] is None


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        ([torch.tensor(1.0), torch.tensor(2.0)], "For a loss"),
        ([rows(7), rows(4)], r"of \[2, 3\] samples, has shapes"),
        ([rows(2), None], "differ in type"),
        ([{"a": rows(2)}, {"b": rows(3)}], "different keys"),
        ([(rows(2),), (rows(3), rows(3))], "different lengths"),
        ([1.5, 2.5], "of type float that differ"),
    ],
)
def test_outputs_that_cannot_be_concatenated_are_refused(outputs, got):
    with pytest.raises(InputError, match=got):
        concatenated(outputs, [2, 3])
