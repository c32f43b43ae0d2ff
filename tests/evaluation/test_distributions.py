# SPDX-License-Identifier: Apache-2.0
"""Distances between sets, against closed forms and independent computations."""

import numpy as np
import pytest
import scipy.linalg

from stvdm.evaluation.distributions import frechet_distance, kernel_distance, precision_recall

RANDOM = np.random.default_rng(0)


def test_gaussians_far_apart_have_their_closed_form():
    n, scale, shift = 200_000, np.array([1.0, 2.0, 0.5]), np.array([0.3, -1.0, 2.0])
    one, other = RANDOM.normal(size=(n, 3)), RANDOM.normal(size=(n, 3)) * scale + shift
    expected = np.square(shift).sum() + np.square(scale - 1).sum()  # independent values: deviations subtract
    assert frechet_distance(one, other) == pytest.approx(expected, rel=0.01)


def test_the_root_is_that_of_scipy():
    real, made = RANDOM.normal(size=(40, 7)) @ RANDOM.normal(size=(7, 7)), RANDOM.normal(size=(30, 7))
    cov_r, cov_g = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    root = scipy.linalg.sqrtm(cov_r @ cov_g).real
    expected = np.square(real.mean(0) - made.mean(0)).sum() + np.trace(cov_r + cov_g - 2 * root)
    assert frechet_distance(real, made) == pytest.approx(expected, rel=1e-6)


def test_fewer_clips_than_features_is_no_trouble():
    few = RANDOM.normal(size=(5, 50))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(few, RANDOM.normal(size=(4, 50))))


def test_one_feature():
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[5.0], [7.0]])) == pytest.approx(25)


def test_the_kernel_distance_is_its_double_sum():
    real, made = RANDOM.normal(size=(9, 4)), RANDOM.normal(size=(6, 4)) + 0.5
    kernel = lambda x, y: (x @ y / 4 + 1) ** 3  # noqa: E731
    among_real = np.mean([kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j])
    among_made = np.mean([kernel(x, y) for i, x in enumerate(made) for j, y in enumerate(made) if i != j])
    across = np.mean([kernel(x, y) for x in real for y in made])
    assert kernel_distance(real, made) == pytest.approx(among_real + among_made - 2 * across)


def test_the_kernel_distance_of_equal_distributions_is_nought_on_average():
    values = [kernel_distance(RANDOM.normal(size=(20, 3)), RANDOM.normal(size=(20, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_precision_falls_with_bad_clips_and_recall_with_missing_ones():
    real = RANDOM.uniform(size=(400, 2))
    assert min(precision_recall(real, RANDOM.uniform(size=(400, 2)))) > 0.9
    half = precision_recall(real, RANDOM.uniform(size=(400, 2)) * [0.5, 1])
    assert half.precision > 0.9
    assert half.recall == pytest.approx(0.5, abs=0.1)
    wild = precision_recall(real, np.concatenate([RANDOM.uniform(size=(200, 2)), 5 + RANDOM.uniform(size=(200, 2))]))
    assert wild.precision == pytest.approx(0.5, abs=0.1)
    assert wild.recall > 0.9


def test_neighbours_are_counted_without_oneself():
    real = np.array([[0.0], [1.0], [3.0], [7.0]])
    # The nearest of 0 is 1 away, so 0 reaches to -1; of 7 it is 4 away.
    assert precision_recall(real, np.array([[-1.0], [11.0]] + [[100.0]] * 2), neighbours=1).precision == 0.5


@pytest.mark.parametrize(
    ("real", "made", "said"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), r"\(4, 3\) and \(4, 2\)"),
        (np.zeros((1, 3)), np.zeros((4, 3)), "1 and 4 clips: expected at least 2"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "not finite"),
    ],
)
def test_errors_teach(real, made, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(real, made)
    with pytest.raises(ValueError, match="expected at least 4"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
