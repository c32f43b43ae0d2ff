# SPDX-License-Identifier: Apache-2.0
"""The rule by which a grid decides a claim, and the intervals it rests on.

    over n seeds        mean ± t(n - 1) s / √n                                         Student
    of a difference     mean a - mean b ± t(ν) √(s_a² / n_a + s_b² / n_b)              Welch 1947
                        ν = (s_a² / n_a + s_b² / n_b)² / Σ (s² / n)² / (n - 1)

t is the 97.5 % quantile, so that the interval is of 95 %. A claim is *confirmed* where the interval of its difference
lies wholly on the side that it names, *refuted* where it lies wholly on the other, and *undecided* else, or where a
variant has fewer than two seeds. It is undecided too where the one that came out ahead is itself at *chance*: where its
own interval holds, or lies beyond, what real clips of other prompts score. Such trainings were too short to tell.

A training that diverged has no scores: a claim with one of those is undecided, unless the worse variant diverged with
every seed and the better with none (confirmed), or the reverse (refuted).

Seeds are of training; prompts and noise are the same for all cells. Claims are judged one by one: of twenty true
"no difference" one is decided by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from stvdm.ablations.questions import Claim, Question
from stvdm.ablations.results import Result

LEVEL = 0.95
HOLDS_ZERO = "the interval holds 0"


class Interval(NamedTuple):
    """A mean with its 95 % interval over ``num`` values; the ends are nan where there are too few."""

    mean: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Verdict(NamedTuple):
    """What came of a claim; ``difference`` is better minus worse."""

    claim: Claim
    outcome: Literal["confirmed", "refuted", "undecided"]
    difference: Interval | None
    reason: str


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's interval of a mean."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(_quantile(n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Welch's interval of mean a - mean b; ``num`` is the number of the smaller."""
    num = min(len(a), len(b))
    if num == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(a) - np.mean(b))
    if num == 1:
        return Interval(mean, math.nan, math.nan, 1)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    variance = sum(parts)
    if variance == 0.0:
        return Interval(mean, mean, mean, num)
    freedom = variance**2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True) if part > 0
    )
    half = float(_quantile(freedom) * math.sqrt(variance))
    return Interval(mean, mean - half, mean + half, num)


def values_of(question: Question, results: Sequence[Result], name: str, score: str) -> list[float]:
    """A score of all seeds of "variant@sampling" that have it."""
    variant, sampling = question.split(name)
    ours = [one["samplings"] for one in results if one["variant"] == variant]
    found = [samplings[sampling]["scores"] for samplings in ours if sampling in samplings]
    return [scores[score] for scores in found if score in scores]


def judge(question: Question, claim: Claim, results: Sequence[Result]) -> Verdict:
    """The rule above."""
    sides = [[one for one in results if one["variant"] == question.split(name)[0]] for name in _names(claim)]
    lost = [sum("diverged" in one for one in side) for side in sides]
    if any(lost):
        reason = (
            f"diverged: {lost[0]} of {len(sides[0])} trainings of the better, {lost[1]} of {len(sides[1])} of the worse"
        )
        if min(map(len, sides)) > 1 and lost == [0, len(sides[1])]:
            return Verdict(claim, "confirmed", None, reason)
        if min(map(len, sides)) > 1 and lost == [len(sides[0]), 0]:
            return Verdict(claim, "refuted", None, reason)
        return Verdict(claim, "undecided", None, reason)
    a, b = (values_of(question, results, name, claim.score) for name in _names(claim))
    found = difference(a, b)
    if found.num < 2:
        hidden = [
            _not_reported(question, side, name, claim.score) for side, name in zip(sides, _names(claim), strict=True)
        ]
        reason = next((why for why in hidden if why), f"{len(a)} and {len(b)} seeds, and an interval takes two of each")
        return Verdict(claim, "undecided", None, reason)
    if found.low <= 0 <= found.high:
        return Verdict(claim, "undecided", found, HOLDS_ZERO)
    confirmed = (found.low > 0) == claim.higher
    ahead, values = (claim.better, a) if confirmed else (claim.worse, b)
    chance, reached = chance_of(question, results, ahead, claim.score), over_seeds(values)
    if chance is not None and not (reached.low > chance if claim.higher else reached.high < chance):
        return Verdict(claim, "undecided", found, f"{ahead} is at chance: {reached}, where chance is {chance:.3g}")
    return Verdict(claim, "confirmed" if confirmed else "refuted", found, "")


def chance_of(question: Question, results: Sequence[Result], name: str, score: str) -> float | None:
    """What real clips of other prompts score where "variant@sampling" is sampled; None of what no prompt asks for."""
    variant, sampling = question.split(name)
    ours = [one["samplings"] for one in results if one["variant"] == variant]
    sides = [samplings[sampling]["references"]["chance"] for samplings in ours if sampling in samplings]
    values = [side[score] for side in sides if score in side]
    return float(np.mean(values)) if values else None


def judge_all(question: Question, results: Sequence[Result]) -> list[Verdict]:
    return [judge(question, claim, results) for claim in question.claims]


def _names(claim: Claim) -> tuple[str, str]:
    return claim.better, claim.worse


def _not_reported(question: Question, results: Sequence[Result], name: str, score: str) -> str:
    """Why a score is missing, where the evaluation said so."""
    _, sampling = question.split(name)
    reasons = (one["samplings"][sampling]["not_reported"] for one in results if sampling in one["samplings"])
    return next((found[score] for found in reasons if score in found), "")


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
