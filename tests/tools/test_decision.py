"""The rule that judges differences: exact properties, known cases, and how often it is wrong in simulations."""

import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from math import inf, isfinite, nan
from pathlib import Path

import pytest
import torch
from calibration import (
    AT_MARGIN,
    LITTLE,
    MUCH,
    NO_NOISE,
    NOISY,
    SAME,
    SEEDS,
    Case,
    decisions,
    decisions_of_looks,
    of_units,
    tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from syncnorm.tools.common.decision import LEVEL, Rule, Scores, level_of_look
from syncnorm.tools.common.units import decode, encode

settings.register_profile("no deadline", deadline=None)  # the machine may be busy
settings.load_profile("no deadline")


def shares(*rows):
    """A row of right (1) and wrong (0) samples per seed."""
    return of_units(torch.tensor(rows, dtype=torch.float64))


def losing(num_samples, *lost):
    """An arm that is right on all samples but the first ``lost`` of each seed."""
    return shares(*((torch.arange(num_samples) >= number).double().tolist() for number in lost))


def without_units(scores):
    return replace(scores, units_SU=None)


@st.composite
def pairs_of_shares(draw):
    seeds, samples = draw(st.integers(1, 6)), draw(st.integers(1, 60))
    arm = st.lists(
        st.lists(st.sampled_from((0.0, 1.0)), min_size=samples, max_size=samples), min_size=seeds, max_size=seeds
    )
    return shares(*draw(arm)), shares(*draw(arm))


@st.composite
def pairs_of_losses(draw):
    seeds, units = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    value = st.floats(-1e200, 1e200, allow_nan=False)
    arm = st.lists(st.lists(value, min_size=units, max_size=units), min_size=seeds, max_size=seeds)
    return of_units(torch.tensor(draw(arm), dtype=torch.float64)), of_units(
        torch.tensor(draw(arm), dtype=torch.float64)
    )


any_pair = st.one_of(
    st.tuples(pairs_of_shares(), st.builds(Rule, st.just(True), st.booleans(), st.sampled_from((None, 0.0, 20.0)))),
    st.tuples(pairs_of_losses(), st.builds(Rule, st.just(False), st.booleans(), st.sampled_from((None, 0.0, 50.0)))),
)


@given(any_pair)
def test_the_interval_alone_decides(made):
    (ours, other), rule = made
    found = rule.decide(ours, other)
    assert found.low <= found.mean <= found.high
    if found.kind == "equivalent":
        assert -found.margin <= found.low <= 0 <= found.high <= found.margin
    elif found.kind == "undecided":
        assert found.low <= 0 <= found.high
        assert found.low < -found.margin or found.high > found.margin
    else:
        assert found.low > 0 if found.kind == "better" else found.high < 0
    assert (found.kind == "undecided") == (found.more_seeds != 0)


@given(any_pair)
def test_exchanged_arms_have_the_mirrored_interval(made):
    (ours, other), rule = made
    found, mirrored = rule.decide(ours, other), rule.decide(other, ours)
    assert mirrored.by_seed == tuple(-each for each in found.by_seed)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), rel=1e-6, abs=1e-9)
    if rule.share:  # the margin of other metrics is a part of the other arm's result
        opposite = {"better": "worse", "worse": "better"}
        assert mirrored.kind == opposite.get(found.kind, found.kind)


@given(any_pair)
def test_one_seed_decides_nothing(made):
    (ours, other), rule = made
    first = [Scores(arm.by_seed[:1], arm.units_SU[:1], arm.num_samples) for arm in (ours, other)]
    found = rule.decide(*first)
    assert (found.kind, found.low, found.high) == ("undecided", -inf, inf)
    assert found.more_seeds is None or found.more_seeds >= 1


@given(pairs_of_shares(), st.booleans())
def test_the_other_direction_is_the_other_sign(pair, higher):
    found, reverse = (Rule(higher_is_better=each).decide(*pair) for each in (higher, not higher))
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("accuracy", [0.75, 0.97])
def test_without_results_per_sample_the_interval_is_wider(accuracy):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ours, other = Case(500, accuracy, LITTLE, effect=-2.0).draw(generator)
        found, unknown = Rule().decide(ours, other), Rule().decide(without_units(ours), without_units(other))
        assert unknown.by_seed == found.by_seed
        assert unknown.high - unknown.low > found.high - found.low


def test_without_results_per_sample_other_metrics_are_students_paired_t():
    ours, other = (1.0, 1.4, 1.3, 1.2), (1.5, 1.6, 1.9, 1.6)
    found = Rule(share=False, higher_is_better=False).decide(Scores(ours, None, 1), Scores(other, None, 1))
    expected = stats.ttest_rel(other, ours).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.kind == "better"
    assert found.margin == pytest.approx(0.02 * sum(other) / 4)


def test_the_number_of_seeds_that_would_decide():
    differences = (0.1, 0.3, 0.5)
    found = Rule(share=False).decide(Scores((1.1, 1.3, 1.5), None, 1), Scores((1.0,) * 3, None, 1))
    assert found.kind == "undecided"
    spread = stats.tstd(differences)

    def half_width(seeds):
        return stats.t.ppf(0.975, seeds - 1) * spread / seeds**0.5

    assert half_width(3 + found.more_seeds) < 0.3 <= half_width(2 + found.more_seeds)


def test_the_number_of_samples_that_would_decide():
    ours, other = losing(100, 4, 3, 4), losing(100, 0, 0, 0)
    found = Rule().decide(ours, other)
    assert found.kind == "undecided"

    def with_samples(number):
        return Rule().decide(*(of_units(arm.units_SU.repeat(1, round(number / 100))) for arm in (ours, other)))

    needed = 100 + found.more_samples
    assert with_samples(1.6 * needed).kind == "worse"
    assert with_samples(0.6 * needed).kind == "undecided"


@pytest.mark.parametrize(("ours", "other", "kind"), [
    # One arm is worse by 4 of 96 samples at every seed: McNemar's exact test has p = 0.125.
    (losing(96, 4, 4, 4), losing(96, 0, 0, 0), "undecided"),
    (losing(96, 9, 10, 9), losing(96, 0, 0, 0), "worse"),
    # 1.2 points with a standard deviation of 0.3.
    (losing(5000, 45, 60, 75), losing(5000, 0, 0, 0), "worse"),
    (losing(5000, 0, 0, 0), losing(5000, 45, 60, 75), "better"),
    # Seeds that lose 5 to 18 points, of an arm that hardly loses.
    (losing(300, 36, 54, 16), losing(300, 0, 0, 1), "worse"),
    (losing(5000, 3, 4, 5), losing(5000, 4, 3, 5), "equivalent"),
    (losing(96, 3, 4, 5), losing(96, 4, 3, 5), "undecided"),
    # Perfect and hopeless arms.
    (losing(5000, 0, 0), losing(5000, 0, 0), "equivalent"),
    (losing(96, 0, 0), losing(96, 0, 0), "undecided"),
    (losing(5000, 5000, 5000), losing(5000, 5000, 5000), "equivalent"),
    (losing(96, 0, 0), losing(96, 96, 96), "better"),
])  # fmt: skip
def test_known_cases(ours, other, kind):
    assert Rule().decide(ours, other).kind == kind


def test_seeds_that_fail_to_train_leave_their_mean_in_the_interval():
    """By log-odds the first arm is better by 17 to 23 points; by the mean of the accuracies by half a point."""
    ours, other = losing(1000, *[500, 1] * 40), losing(1000, *[500, 10] * 40)
    found = Rule().decide(ours, other)
    assert found.low <= found.mean == pytest.approx(0.45)


@pytest.mark.parametrize("units", [[[1.0]], [[1.0], [0.0]], [[1.0]] * 5])
def test_one_sample_decides_nothing(units):
    ours, other = shares(*units), shares(*[[0.0]] * len(units))
    assert Rule().decide(ours, other).kind == "undecided"


def test_units_that_are_all_equal():
    loss, other = torch.full((3, 8), 1.5), torch.full((3, 8), 1.2)
    rule = Rule(share=False, higher_is_better=False)
    same, worse = rule.decide(of_units(loss), of_units(loss)), rule.decide(of_units(loss), of_units(other))
    assert (same.kind, same.low, same.high) == ("equivalent", 0, 0)
    assert worse.kind == "worse"
    assert worse.mean == pytest.approx(-0.3)


def test_groups_of_samples_on_which_both_arms_agree_decide_nothing():
    """Nothing was learned, and both arms predict the same class of 96 samples in 20 groups."""
    groups = torch.linspace(0.2, 0.3, 20).repeat(3, 1)
    arm = replace(of_units(groups), num_samples=96)
    assert Rule().decide(arm, arm).kind == "undecided"


def test_a_few_samples_of_a_whole_test_set_decide_nothing():
    """One sample of 96 is lost in each of four groups, at every seed: as little as four single samples."""
    groups = torch.full((3, 20), 0.9, dtype=torch.float64)
    lost = groups.clone()
    lost[:, :4] -= 20 / 96
    ours, other = (replace(of_units(each), num_samples=96) for each in (lost, groups))
    found = Rule().decide(ours, other)
    assert found.mean == pytest.approx(-100 * 4 / 96)
    assert found.kind == "undecided"
    many = Rule().decide(*(replace(each, num_samples=5000) for each in (ours, other)))
    assert many.high < found.high


@pytest.mark.parametrize("right", [1.0, 100.0])
def test_right_and_wrong_samples_of_a_metric_that_is_not_a_share(right):
    """Ten samples that all are right, or four of a hundred, decide as little as those of an accuracy."""
    for ours, other in ((losing(10, 0, 0), losing(10, 0, 0)), (losing(100, 4, 4, 4), losing(100, 0, 0, 0))):
        scaled = [of_units(right * arm.units_SU) for arm in (ours, other)]
        assert Rule(share=False).decide(*scaled).kind == "undecided"


def test_the_margin_of_other_metrics_is_in_percent_of_the_other_arm():
    ours, other = Scores((10.0, 10.1, 9.9), None, 1), Scores((-10.0, -10.0, -10.0), None, 1)
    assert Rule(share=False).decide(ours, other).margin == pytest.approx(0.2)
    assert Rule(share=False, margin=7.0).decide(ours, other).margin == pytest.approx(0.7)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("rule", [Rule(), Rule(share=False)])
def test_results_that_are_not_finite_are_refused(bad, rule):
    good, broken = Scores((0.5, 0.5), None, 10), Scores((0.5, bad), None, 10)
    for pair in ((good, broken), (broken, good)):
        with pytest.raises(ValueError, match="expected finite results, got"):
            rule.decide(*pair)


@pytest.mark.parametrize(("ours", "other"), [((), ()), ((0.5,), (0.5, 0.6))])
def test_other_seeds_are_refused(ours, other):
    with pytest.raises(ValueError, match="expected results of the same seeds, got"):
        Rule().decide(Scores(ours, None, 10), Scores(other, None, 10))


def test_huge_losses_leave_it_undecided():
    huge = Scores((1e200, 3e199, -1e180), None, 1)
    found = Rule(share=False).decide(huge, Scores((1.0, 1.0, 1.0), None, 1))
    assert found.kind == "undecided"
    assert isfinite(found.mean)


def test_the_levels_of_all_looks_add_up_to_the_level_of_one():
    assert sum(map(level_of_look, range(1, 60))) <= LEVEL
    assert [level_of_look(look) for look in (1, 2)] == [LEVEL / 2, LEVEL / 4]


@given(st.lists(st.one_of(st.sampled_from((0.0, 1.0)), st.floats(-1e30, 1e30)), max_size=20))
def test_results_per_sample_survive_as_text(values):
    assert decode(encode(values)).tolist() == pytest.approx(values, rel=1e-6)
    assert decode(encode(torch.tensor(values, dtype=torch.float64))).tolist() == pytest.approx(values, rel=1e-6)


# How often a rule that is wrong in 5 % of the comparisons is wrong in ``runs`` of them, with a probability of 1e-4.
def most(runs):
    return stats.binom.ppf(1 - 1e-4, runs, LEVEL)


SOME_RUNS = pytest.mark.parametrize("runs", [10, pytest.param(100, marks=pytest.mark.slow)])


@SOME_RUNS
def test_without_a_difference_at_most_5_percent_are_better_or_worse(runs):
    by_case, by_seeds = Counter[Case](), Counter[int]()
    for case in SAME:
        for seeds in SEEDS:
            found = decisions(replace(case, seeds=seeds), runs)
            by_case[case] += found["better"] + found["worse"]
            by_seeds[seeds] += found["better"] + found["worse"]
    assert max(by_case.values()) <= most(runs * len(SEEDS)), by_case
    assert max(by_seeds.values()) <= most(runs * len(SAME)), by_seeds


@SOME_RUNS
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_however_many_samples_are_hard_for_both_arms(shared, runs):
    cases = [Case(1000, 0.75, noise, seeds, shared=shared) for noise in (NO_NOISE, LITTLE, MUCH) for seeds in (3, 10)]
    found = [decisions(case, 2 * runs) for case in cases]
    assert sum(each["better"] + each["worse"] for each in found) <= most(2 * runs * len(cases))


@SOME_RUNS
def test_a_difference_of_exactly_the_margin_is_equivalent_in_at_most_5_percent(runs):
    by_case = {
        case: sum(decisions(replace(case, seeds=seeds), runs)["equivalent"] for seeds in SEEDS) for case in AT_MARGIN
    }
    assert max(by_case.values()) <= most(runs * len(SEEDS)), by_case


@SOME_RUNS
def test_seeds_that_are_added_until_the_interval_decides_do_not_make_it_wrong(runs):
    found = {case: decisions_of_looks(case, runs) for case in NOISY}
    wrong = {case: each["better"] + each["worse"] for case, each in found.items()}
    assert max(wrong.values()) <= most(runs), wrong
    assert sum(wrong.values()) <= most(runs * len(wrong)), wrong
    at_margin = islice(AT_MARGIN, 0, None, 2)
    assert sum(decisions_of_looks(case, runs)["equivalent"] for case in at_margin) <= most(runs * 8)


def test_the_tables_of_the_documentation_are_those_of_the_simulation():
    text = (Path(__file__).parents[2] / "docs" / "decision.md").read_text()
    shown, simulated = (re.sub(r"\d+\.\d %", "", each) for each in (text, "\n".join(tables(2))))
    assert simulated in shown


@pytest.mark.parametrize(("case", "kind", "least"), [
    (Case(1000, 0.97, LITTLE, 3, effect=-5), "worse", 0.8),
    (Case(96, 0.97, LITTLE, 10, effect=-10), "worse", 0.9),
    (Case(1000, 0.75, LITTLE, 10, effect=-5), "worse", 0.9),
    (Case(1000, 0.97, MUCH, 10, effect=-5), "worse", 0.9),
    (Case(5000, 0.97, LITTLE, 10, effect=-1), "worse", 0.85),
    (Case(5000, 0.97, LITTLE, 10, effect=1), "better", 0.85),
    (Case(5000, 0.97, NO_NOISE, 10), "equivalent", 0.8),
    (Case(5000, 0.75, NO_NOISE, 5, margin=2), "equivalent", 0.8),
])  # fmt: skip
def test_differences_and_their_absence_are_found(case, kind, least):
    assert decisions(case, 40)[kind] >= 40 * least
