"""The study of padded sequences: its data, the effect of padding on each norm, and the findings from rows."""

import pytest
import torch
from study_rows import accuracy_row

from syncnorm.tools.common.decision import Rule
from syncnorm.tools.study.experiment import SIDE, load_images
from syncnorm.tools.study.records import StudyRow, StudySettings
from syncnorm.tools.study.sequence import (
    BN,
    LAYER,
    MASKED,
    NORMS,
    SYNC,
    build_reader,
    columns,
    find,
    mask_of,
    num_stages,
    padded,
    padded_batches,
)


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


def test_ranks_share_the_batches_and_draw_different_lengths():
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
    return build_reader(0, 8, norm)(padded(some_sequences(), shortest))


@pytest.mark.parametrize("norm", NORMS)
def test_padding_affects_only_the_norms_that_include_it(norm):
    difference = (logits(norm, 0) - logits(norm, 24)).abs().max()
    assert difference > 1e-2 if norm in (BN, SYNC) else difference < 1e-5


def rows(**accuracies):
    """``bn=[[to the longest, by seed], [to 24, by seed]]``; a norm that is left out stays at 0.9."""
    names = {"bn": BN, "sync": SYNC, "masked": MASKED, "layer": LAYER}
    made = []
    for key, norm in names.items():
        found = accuracies.get(key, [[0.9] * 3] * 2)
        for padding, by_seed in zip(("to the longest", "to 24"), found, strict=True):
            condition = {"norm": norm, "padding": padding, "lr": 0.2}
            made += [accuracy_row(condition, seed, value) for seed, value in enumerate(by_seed)]
            made += [StudyRow(condition, seed, "padding", 0.5) for seed in range(3)]
    return made


WORSE = [0.80, 0.81, 0.82]
RULE = Rule()


def test_findings_where_padding_costs_batch_norm_what_a_mask_restores():
    found = find(rows(bn=[[0.9] * 3, WORSE], sync=[[0.9] * 3, WORSE]), RULE)
    assert (
        'LN compared with BN, by padding, in percentage points (95% intervals): better at "to 24" by 9.0 ('
        in found[0]
    )
    assert 'equivalent within 0.5 at "to the longest" (' in found[0]
    assert (
        "Masked SyncBN compared with SyncBN, by padding, in percentage points (95% intervals): better at" in found[1]
    )
    assert found[2].startswith(
        "BN padded to 24 reaches 81.0 % and padded to the longest 90.0 %: worse by 9.0 points ("
    )
    claims = ("LN is better than BN on padded", "masked SyncBN is better than SyncBN, whose statistics include the")
    for claim, says in zip(claims, found[-2:], strict=True):
        assert says.startswith(f"The claim that {claim}")
        assert says.endswith(
            "holds in part here: supported by 1, contradicted by 1 and left open by 0 of 2 comparisons."
        )


def test_findings_where_the_opposite_holds():
    found = find(rows(layer=[WORSE, WORSE[::-1]], masked=[WORSE, WORSE]), RULE)
    assert 'worse at "to the longest" by 9.0 (' in found[0]
    assert '"to 24" by 9.0 (' in found[0]
    assert 'worse at "to the longest"' in found[1]
    assert found[-3] == (
        "Padding changes the accuracy of a run by at most 0.0 points with masked SyncBN "
        "and by at most 2.0 points with LN."
    )
    assert all("does not hold here: supported by 0, contradicted by 2" in claim for claim in found[-2:])


def test_seeds_that_do_not_agree_make_no_finding():
    split = [0.8, 0.95, 0.9]
    found = find(rows(bn=[split, split], masked=[split, split]), RULE)
    assert 'undecided at "to the longest" (' in found[0]
    assert "better" not in found[0]
    assert "worse" not in found[0]
    assert all(
        "is undecided here: supported by 0, contradicted by 0 and left open by 2" in each for each in found[-2:]
    )
    assert "%: undecided, " in find(rows(bn=[[0.9] * 3, split]), RULE)[2]


def test_a_quick_run_tunes_no_learning_rates():
    assert num_stages(StudySettings("sequence", 2, 2, 2, quick=True)) == len(NORMS) * 2 * 2
