# SPDX-License-Identifier: Apache-2.0
"""Intervals are scipy's; a claim is decided by the rule, whichever way it comes out."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from stvdm.ablations import verdicts
from stvdm.ablations.questions import Claim


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_interval_over_seeds_is_students(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    found = verdicts.over_seeds(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected)
    assert found.mean == pytest.approx(np.mean(values)) and found.num == n


@pytest.mark.parametrize("sizes", [(3, 3), (2, 7), (5, 3)])
def test_the_interval_of_a_difference_is_welchs(sizes):
    random = np.random.default_rng(sum(sizes))
    a, b = random.normal(1.0, 0.1, sizes[0]).tolist(), random.normal(0.0, 2.0, sizes[1]).tolist()
    found = verdicts.difference(a, b)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    found = [verdicts.difference(random.normal(0.3, 1, 3), random.normal(0, 2, 3)) for _ in range(2000)]
    share = np.mean([one.low < 0.3 < one.high for one in found])
    assert 0.93 < share < 0.985  # Welch's is a little wide for so few


def test_too_few_seeds_make_no_interval():
    assert verdicts.over_seeds([]).num == 0
    assert math.isnan(verdicts.over_seeds([0.5]).low) and str(verdicts.over_seeds([0.5])) == "0.5"
    assert math.isnan(verdicts.difference([0.5], [0.1, 0.2]).low)
    assert verdicts.difference([0.5, 0.5], [0.1, 0.1]) == pytest.approx((0.4, 0.4, 0.4, 2))  # no spread at all


def test_claims_are_decided_by_the_interval(question, grid):
    holds, flickers = verdicts.judge_all(question, grid)
    assert holds.outcome == "confirmed"
    full, frame = [0.7, 0.67, 0.64], [0.2, 0.22, 0.24]
    expected = stats.ttest_ind(full, frame, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose((holds.difference.low, holds.difference.high), expected)
    assert flickers.outcome == "undecided" and flickers.reason == "the interval holds 0"


def test_the_other_way_round_it_is_refuted(question, grid):
    backwards = Claim("frame", "full", "persistence", "it falls apart")
    assert verdicts.judge(question, backwards, grid).outcome == "refuted"
    assert verdicts.judge(question, dataclasses.replace(backwards, higher=False), grid).outcome == "confirmed"


@pytest.mark.parametrize("chance, outcome", [(0.1, "confirmed"), (0.65, "undecided"), (0.9, "undecided")])
def test_what_is_ahead_at_chance_decides_nothing(question, grid, chance, outcome):
    for one in grid:
        one["samplings"]["default"]["references"]["chance"]["persistence"] = chance
    verdict = verdicts.judge(question, question.claims[0], grid)
    assert verdict.outcome == outcome and verdict.difference.low > 0
    assert ("full is at chance: 0.67 [0.5" in verdict.reason) == (outcome == "undecided"), verdict.reason
    backwards = Claim("frame", "full", "persistence", "it falls apart")  # it is full, again, that is ahead
    assert verdicts.judge(question, backwards, grid).outcome == ("refuted" if chance == 0.1 else "undecided")
    lower = dataclasses.replace(backwards, higher=False)  # frame has less, and chance has less still, or more
    assert verdicts.judge(question, lower, grid).outcome == ("undecided" if chance == 0.1 else "confirmed")


def test_one_seed_decides_nothing(question, grid):
    alone = [one for one in grid if one["seed"] == 0]
    verdict = verdicts.judge(question, question.claims[0], alone)
    assert verdict.outcome == "undecided" and verdict.reason == "1 and 1 seeds, and an interval takes two of each"
    assert verdicts.judge(question, question.claims[0], []).outcome == "undecided"


def test_a_score_that_real_clips_fail_decides_nothing(question, grid):
    for one in grid:
        del one["samplings"]["default"]["scores"]["persistence"]
        one["samplings"]["default"]["not_reported"]["persistence"] = "real clips score 0.900, below 0.95"
    verdict = verdicts.judge(question, question.claims[0], grid)
    assert (verdict.outcome, verdict.reason) == ("undecided", "real clips score 0.900, below 0.95")


def test_divergence_decides_only_when_it_is_everywhere(question, made_up, grid):
    gone = [made_up("frame", seed, 0, 0, samplings={}, diverged="not finite") for seed in range(3)]
    full = [one for one in grid if one["variant"] == "full"]
    assert verdicts.judge(question, question.claims[0], gone + full).outcome == "confirmed"
    assert verdicts.judge(question, Claim("frame", "full", "flicker", ""), gone + full).outcome == "refuted"
    verdict = verdicts.judge(question, question.claims[0], gone[:1] + grid)
    assert verdict.outcome == "undecided" and "1 of 4 of the worse" in verdict.reason
