# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

from stvdm.models.patterns import PATTERNS, Pattern

GRID, WINDOW = (3, 4, 5), (1, 1, 2)
N = 60


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("size", [7, 10, 16])
def test_a_block_that_is_not_touched_holds_nothing_that_is_seen(kind, size):
    pattern = Pattern(kind, GRID, WINDOW)
    numbers = np.arange(2 * N)
    seen = pattern.sees(numbers[:N, None], numbers[None])
    assert seen.any() and not seen[:, N:].any(), "numbers past the last token are padding"
    assert seen.sum() == round(pattern.share * N**2)
    kept = total = 0
    for q, k in itertools.product(range(0, N, size), range(0, 2 * N, size)):
        touched = pattern.touches(q, q + size - 1, k, k + size - 1)
        assert touched or not seen[q : q + size, k : k + size].any(), (q, k)
        kept, total = kept + bool(touched), total + 1
    if kind in ("frame", "window", "block_causal"):
        assert kept < 0.6 * total, "a pattern with gaps leaves blocks out"


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("size", [1, 7, 16])
def test_what_is_computed_is_what_blocks_touch(kind, size):
    pattern = Pattern(kind, GRID, WINDOW)
    pairs = 0
    for q, k in itertools.product(range(0, N, size), range(0, N, size)):
        if pattern.touches(q, q + size - 1, k, k + size - 1):
            pairs += (min(q + size, N) - q) * (min(k + size, N) - k)
    assert pattern.computed(size) == pytest.approx(pairs / N**2)
    assert pattern.computed(size) >= pattern.share
    assert Pattern("full", GRID).computed(size) == 1.0


def test_a_window_in_blocks_of_512_tokens():
    pattern = Pattern("window", (21, 30, 52), (1, 4, 4))
    assert (round(pattern.share, 4), round(pattern.computed(512), 3)) == (0.0064, 0.164)


def test_blocks_are_told_all_at_once():
    pattern = Pattern("window", GRID, WINDOW)
    first = 8 * np.arange(8)
    table = pattern.touches(first[:, None], first[:, None] + 7, first[None], first[None] + 7)
    one_by_one = [[pattern.touches(q, q + 7, k, k + 7) for k in first] for q in first]
    np.testing.assert_array_equal(table, one_by_one)


@pytest.mark.parametrize("kind", [kind for kind in PATTERNS if Pattern(kind, GRID, WINDOW).falls_apart])
def test_groups_that_never_meet_are_clips_of_their_own(kind):
    pattern = Pattern(kind, GRID, WINDOW)
    numbers = np.arange(2 * N).reshape(2, N, 1)
    groups = pattern.split(numbers)
    np.testing.assert_array_equal(pattern.join(groups), numbers)
    for group in groups[: len(groups) // 2, :, 0]:
        seen = pattern.sees(group[:, None], np.arange(N)[None])
        np.testing.assert_array_equal(seen, np.broadcast_to(np.isin(np.arange(N), group), seen.shape))
