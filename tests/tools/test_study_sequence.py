"""The study of padded sequences: its data, what padding does to each norm, and what it says of made-up rows."""

import pytest
import torch
from click.testing import CliRunner

import syncnorm
from syncnorm.tools.cli import syncnorm as command_line
from syncnorm.tools.study import sequence
from syncnorm.tools.study.data import SIDE, load_images
from syncnorm.tools.study.records import Row
from syncnorm.tools.study.recurrent import build_reader, columns, mask_of, padded, padded_batches
from syncnorm.tools.study.sequence import BN, LAYER, MASKED, NORMS, SYNC, find


def some_sequences():
    return columns(load_images().train_x[:12])


def test_a_sequence_is_the_images_columns_from_ink_to_ink():
    image = torch.full((1, SIDE, SIDE), -1.0)
    image[0, 2, 3], image[0, 5, 7] = 0.5, 0.25
    (found,) = columns(image.unsqueeze(0))
    assert found.shape == (5, SIDE)
    assert (found[0, 2], found[-1, 5], (found > -1).sum()) == (0.5, 0.25, 2)


def test_padding_is_what_the_mask_leaves_out():
    parts = [torch.ones(2, SIDE), torch.ones(4, SIDE)]
    for shortest, length in ((0, 4), (6, 6)):
        x = padded(parts, shortest)
        assert x.shape == (2, length, SIDE)
        assert mask_of(x).sum(dim=1).tolist() == [2, 4]
        assert x.isnan().sum() == SIDE * (2 * length - 6)


def test_ranks_share_the_batches_and_each_draws_its_own_lengths():
    data = some_sequences()
    labels = torch.arange(len(data))
    lengths, seen = [], []
    for part in (slice(0, 2), slice(2, 4)):
        drawn = padded_batches(data, labels, 4, seed=0, part=part, pad_to=(12, 40))
        found = [next(drawn) for _ in range(3)]
        lengths.append([x.size(1) for x, _ in found])
        seen += [label for _, y in found for label in y.tolist()]
        for x, y in found:
            assert mask_of(x).sum(dim=1).tolist() == [len(data[i]) for i in y.tolist()]
    assert sorted(seen) == list(range(12))
    assert lengths[0] != lengths[1]
    assert all(12 <= length <= 40 for of_rank in lengths for length in of_rank)


def logits(norm, shortest):
    """In training, without a process group."""
    model = build_reader(0, 8, masked=norm == MASKED)
    if norm != BN:
        syncnorm.convert(model, to="layer" if norm == LAYER else "sync")
    return model(padded(some_sequences(), shortest))


@pytest.mark.parametrize("norm", NORMS)
def test_padding_reaches_those_norms_alone_that_count_it(norm):
    apart = (logits(norm, 0) - logits(norm, 24)).abs().max()
    assert apart > 1e-2 if norm in (BN, SYNC) else apart < 1e-5


def rows(**accuracies):
    """``bn=[[to the longest, by seed], [to 24, by seed]]``; a norm that is left out stays at 0.9."""
    names = {"bn": BN, "sync": SYNC, "masked": MASKED, "layer": LAYER}
    made = []
    for key, norm in names.items():
        found = accuracies.get(key, [[0.9] * 3] * 2)
        for padding, by_seed in zip(("to the longest", "to 24"), found, strict=True):
            condition = {"norm": norm, "padding": padding, "lr": 0.2}
            made += [Row(condition, seed, "accuracy", value) for seed, value in enumerate(by_seed)]
            made += [Row(condition, seed, "padding", 0.5) for seed in range(3)]
    return made


WORSE = [0.80, 0.81, 0.82]


def test_findings_where_padding_costs_batch_norm_what_a_mask_brings_back():
    found = find(rows(bn=[[0.9] * 3, WORSE], sync=[[0.9] * 3, WORSE]))
    assert "BN against LN, by padding, in points: worse at to 24 (-9.0 ± 0.6)" in found[0]
    assert "Masked SyncBN against SyncBN, by padding, in points: better at to 24 (+9.0 ± 0.6)" in found[1]
    assert found[2] == "BN padded to 24 reaches 81.0 % and to the longest 90.0 %: 9.0 ± 0.6 points worse."
    assert found[-1] == (
        "Where the seeds agree, LN beats BN at 1 of 2 paddings, and BN beats LN at none; masking beats "
        "SyncBN with padding in its statistics at 1 of 2 paddings, and loses to it at none."
    )


def test_findings_where_it_comes_out_the_other_way():
    found = find(rows(layer=[WORSE, WORSE[::-1]], masked=[WORSE, WORSE]))
    assert "better at to the longest (+9.0 ± 0.6) and to 24 (+9.0 ± 0.6)" in found[0]
    assert "worse at to the longest" in found[1]
    assert found[-2] == (
        "From padding to padding, a run with masked SyncBN changes by 0.0 points at most and one with LN changes by "
        "2.0 points at most."
    )
    assert found[-1] == (
        "Where the seeds agree, LN beats BN at none, and BN beats LN at 2 of 2 paddings; masking beats "
        "SyncBN with padding in its statistics at none, and loses to it at 2 of 2 paddings."
    )


def test_seeds_that_do_not_agree_make_no_finding():
    split = [0.8, 0.95, 0.9]
    found = find(rows(bn=[split, split], masked=[split, split]))
    assert "the seeds do not agree at to the longest and to 24" in found[0]
    assert found[-1].count("at none") == 4
    assert "do not agree on a difference" in find(rows(bn=[[0.9] * 3, split]))[2]


@pytest.mark.slow
def test_a_tiny_run():
    result = CliRunner().invoke(command_line, ["study", "sequence", "--quick", "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "norm \\ padding  to the longest" in result.output
    assert "Where the seeds agree, LN beats BN" in result.output
    for name in NORMS:
        assert name in result.output
    assert sequence.num_stages(syncnorm.tools.study.Settings("sequence", 2, 2, 2, quick=True)) == len(NORMS) * 2 * 2
