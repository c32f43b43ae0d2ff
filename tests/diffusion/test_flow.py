# SPDX-License-Identifier: Apache-2.0
"""Paths, predictions, loss and times: each against its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.diffusion import flow

PATHS = [flow.RECTIFIED, flow.COSINE]
PREDICTIONS = ["velocity", "epsilon", "x0", "v"]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def pair(shape=(4, 3, 2, 2, 5)):
    data, noise = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    return jnp.asarray(data), jnp.asarray(noise)


@by_name
def test_path_runs_from_exactly_the_data_to_exactly_the_noise(path):
    data, noise = pair()
    np.testing.assert_array_equal(flow.interpolate(data, noise, 0.0, path=path), data)
    np.testing.assert_array_equal(flow.interpolate(data, noise, 1.0, path=path), noise)
    assert path.log_snr(jnp.asarray(1.0)) == -jnp.inf and path.log_snr(jnp.asarray(0.0)) == jnp.inf


@by_name
def test_rates_are_the_derivatives(path):
    t = jnp.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(jax.vmap(jax.grad(path.alpha))(t), path.alpha_rate(t), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(path.sigma))(t), path.sigma_rate(t), atol=1e-6)


def test_cosine_path_preserves_variance():
    t = jnp.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(flow.COSINE.alpha(t) ** 2 + flow.COSINE.sigma(t) ** 2, 1.0, atol=1e-6)


def test_targets_of_the_rectified_path():
    data, noise = pair()
    for prediction, wanted in [("velocity", noise - data), ("epsilon", noise), ("x0", data)]:
        got = flow.target(data, noise, 0.3, objective=flow.Objective(prediction))
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_v_is_the_velocity_of_the_cosine_path_over_half_pi():
    data, noise = pair()
    v, velocity = (flow.target(data, noise, 0.3, objective=flow.Objective(p, flow.COSINE)) for p in ("v", "velocity"))
    np.testing.assert_allclose(v * jnp.pi / 2, velocity, atol=1e-5)


@by_name
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimate_inverts_target(path, prediction):
    data, noise = pair()
    t = jnp.asarray([0.02, 0.3, 0.7, 0.98])
    objective = flow.Objective(prediction, path)
    x = flow.interpolate(data, noise, t, path=path)
    estimate = flow.estimate(flow.target(data, noise, t, objective=objective), x, t, objective=objective)
    velocity = flow.target(data, noise, t, objective=flow.Objective("velocity", path))
    for got, wanted in zip(estimate, (data, noise, velocity), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-4)


@by_name
@pytest.mark.parametrize("source, goal", list(itertools.permutations(PREDICTIONS, 2)))
def test_predictions_convert_into_each_other_and_back(path, source, goal):
    data, noise = pair()
    t = jnp.asarray([0.02, 0.3, 0.7, 0.98])
    source, goal = flow.Objective(source, path), flow.Objective(goal, path)
    x = flow.interpolate(data, noise, t, path=path)
    start = jax.random.normal(jax.random.key(1), x.shape)  # any answer, also a wrong one
    parts = flow.estimate(start, x, t, objective=source)
    there = flow.target(parts.data, parts.noise, t, objective=goal)
    parts = flow.estimate(there, x, t, objective=goal)
    np.testing.assert_allclose(flow.target(parts.data, parts.noise, t, objective=source), start, atol=1e-3)


@by_name
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_predictions_give_finite_velocities_at_both_ends(path, prediction):
    data, noise = pair()
    objective = flow.Objective(prediction, path)
    for t, error in [(0.0, None), (1.0, None), (0.0, 0.01), (1.0, 0.01)]:
        x = flow.interpolate(data, noise, t, path=path)
        answer = flow.target(data, noise, t, objective=objective) + (error or 0.0)
        estimate = flow.estimate(answer, x, t, objective=objective)
        assert all(jnp.isfinite(part).all() for part in estimate)
        # What cannot be known is 0 / 0 = 0 in a perfect answer, and a small error stays bounded.
        bound = 0.0 if error is None else 0.01 / flow.DIVISOR_FLOOR
        unknown = {("epsilon", 1.0): "data", ("x0", 0.0): "noise"}.get((prediction, t))
        if unknown:
            assert jnp.abs(getattr(estimate, unknown)).max() <= bound + 1e-5
    exact = flow.estimate(data, data, 0.0, objective=flow.Objective("x0", path)).velocity
    np.testing.assert_allclose(exact, path.alpha_rate(jnp.zeros(())) * data, atol=1e-6)


def test_velocity_field_of_a_velocity_network_is_the_network():
    def network(x, t):
        return x * t

    assert flow.velocity_field(network, objective=flow.Objective()) is network


@by_name
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_of_a_perfect_network_is_zero_and_of_a_wrong_one_its_error(path, prediction):
    data, noise = pair()
    t = jnp.asarray([0.1, 0.4, 0.6, 0.9])
    objective = flow.Objective(prediction, path)
    answer = flow.target(data, noise, t, objective=objective)
    losses, aux = flow.flow_matching_loss(lambda x, t: answer, data, noise, t, objective=objective)
    np.testing.assert_allclose(losses, np.zeros(4), atol=1e-10)
    np.testing.assert_allclose(aux["velocity_mse"], np.zeros(4), atol=1e-8)
    np.testing.assert_allclose(aux["time"], t, atol=1e-6)
    bias = jnp.asarray([0.0, 0.1, 0.2, 0.3])
    losses, _ = flow.flow_matching_loss(lambda x, t: answer + flow.expand(bias, x), data, noise, t, objective=objective)
    np.testing.assert_allclose(losses, bias**2, atol=1e-6)
    assert losses.dtype == jnp.float32


def test_velocity_mse_measures_all_objectives_alike():
    """On the rectified path, an epsilon off by e is a velocity off by e / alpha; an x0 off by e, by e / sigma."""
    data, noise = pair()
    t, e = jnp.full(4, 0.25), 0.1
    for prediction, factor in [("velocity", 1.0), ("epsilon", 1 / 0.75), ("x0", 1 / 0.25)]:
        objective = flow.Objective(prediction)
        answer = flow.target(data, noise, t, objective=objective) + e
        _, aux = flow.flow_matching_loss(lambda x, t, a=answer: a, data, noise, t, objective=objective)
        np.testing.assert_allclose(aux["velocity_mse"], (e * factor) ** 2, rtol=1e-4)


@by_name
def test_known_positions_are_shown_as_they_are_and_do_not_count(path):
    data, noise = pair()
    time = jnp.asarray([0.2, 0.5, 0.8, 0.9])
    mask = jnp.zeros((4, 3, 1, 1, 1), bool).at[:, 0].set(True).at[3].set(True)  # first frame; all of example 3
    seen = {}

    def network(x, t):
        seen.update(x=x, t=t)
        return jnp.where(mask, jnp.nan, 0.0) + jnp.zeros_like(x)

    losses, aux = flow.flow_matching_loss(network, data, noise, time, objective=flow.Objective(path=path), mask=mask)
    np.testing.assert_array_equal(seen["x"][:, 0], data[:, 0])
    assert not np.allclose(seen["x"][:3, 1:], data[:3, 1:])
    np.testing.assert_array_equal(seen["t"], time)
    velocity = flow.target(data, noise, time, objective=flow.Objective(path=path))
    np.testing.assert_allclose(losses[:3], jnp.mean(velocity[:3, 1:] ** 2, (1, 2, 3, 4)), rtol=1e-5)
    assert losses[3] == 0.0
    np.testing.assert_allclose(aux["time"], [0.2, 0.5, 0.8, 0.0], atol=1e-6)


def test_gradient_of_the_loss_ignores_known_positions():
    data, noise = pair((2, 4, 3))
    mask = jnp.zeros((2, 4, 1), bool).at[:, :2].set(True)

    def loss(answer):
        return flow.flow_matching_loss(
            lambda x, t: answer, data, noise, jnp.asarray([0.3, 0.6]), objective=flow.Objective("x0"), mask=mask
        )[0].sum()

    gradient = jax.grad(loss)(jnp.zeros_like(data))
    assert not gradient[:, :2].any() and gradient[:, 2:].all()


def test_time_may_differ_between_positions():
    data, noise = pair((2, 3, 4, 4, 1))
    data, noise, time = np.asarray(data), np.asarray(noise), np.linspace(0, 1, 96, dtype=np.float32).reshape(data.shape)
    x = flow.interpolate(data, noise, time)
    np.testing.assert_allclose(x, (1 - time) * data + time * noise, atol=1e-6)
    time = time[:, :, 0, 0, 0]
    x = flow.interpolate(data, noise, time)
    np.testing.assert_allclose(x[1, 2], (1 - time[1, 2]) * data[1, 2] + time[1, 2] * noise[1, 2], atol=1e-6)


def test_errors_teach():
    with pytest.raises(ValueError, match="t.shape=\\(3,\\): expected the leading axes of x.shape=\\(2, 4\\)"):
        flow.expand(jnp.zeros(3), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="prediction='noise': expected one of velocity, epsilon, x0, v"):
        flow.Objective("noise")
    with pytest.raises(ValueError, match="path='cosine': expected a flow.Path"):
        flow.Objective("v", "cosine")
    with pytest.raises(ValueError, match="density='beta': expected uniform or logit_normal"):
        flow.sample_times(jax.random.key(0), (2,), density="beta")
    with pytest.raises(ValueError, match="shift=0"):
        flow.shift_time(0.5, 0)


def distance_from_cdf(times, cdf):
    """The Kolmogorov-Smirnov statistic."""
    times = np.sort(np.asarray(times, np.float64).ravel())
    heights = cdf(times)
    steps = np.arange(len(times) + 1) / len(times)
    return max(np.max(steps[1:] - heights), np.max(heights - steps[:-1]))


def logit_normal_cdf(mean, std):
    return lambda t: np.asarray(jax.scipy.stats.norm.cdf((np.log(t) - np.log1p(-t) - mean) / std))


DENSITIES = [
    ({}, lambda t: t),
    ({"shift": 3.0}, lambda t: t / (3.0 - 2.0 * t)),  # P(shift_time(u, 3) < t) is the inverse shift of t
    ({"density": "logit_normal"}, logit_normal_cdf(0.0, 1.0)),
    ({"density": "logit_normal", "mean": 1.2, "std": 0.7}, logit_normal_cdf(1.2, 0.7)),
]


@pytest.mark.parametrize("settings, cdf", DENSITIES)
def test_times_follow_their_density(settings, cdf):
    count = 4000
    times = flow.sample_times(jax.random.key(0), (count // 2, 2), **settings)
    assert times.shape == (count // 2, 2) and times.dtype == jnp.float32
    assert distance_from_cdf(times, cdf) < 1.63 / np.sqrt(count)  # 1 % level


@pytest.mark.parametrize("settings, cdf", DENSITIES)
def test_stratified_times_have_one_draw_in_each_stratum(settings, cdf):
    count = 64
    times = flow.sample_times(jax.random.key(1), (count,), stratified=True, **settings)
    strata = np.floor(cdf(np.asarray(times, np.float64)) * count * (1 + 1e-6)).astype(int)
    assert np.sum(np.sort(strata) != np.arange(count)) <= 1  # float32 may push one over its edge


@pytest.mark.parametrize("settings, cdf", DENSITIES)
def test_each_element_of_a_stratified_batch_has_the_whole_density(settings, cdf):
    keys = jax.random.split(jax.random.key(2), 4000)
    first = jax.vmap(lambda key: flow.sample_times(key, (8,), stratified=True, **settings)[0])(keys)
    assert distance_from_cdf(first, cdf) < 1.63 / np.sqrt(len(keys))


@pytest.mark.parametrize("settings, cdf", [*DENSITIES, ({"shift": 5.0}, lambda t: t / (5.0 - 4.0 * t))])
@pytest.mark.parametrize("within", [(0.875, 1.0), (0.0, 0.875), (0.2, 0.4)])
def test_times_within_a_range_are_those_of_the_whole_that_lie_there(settings, cdf, within):
    times = flow.sample_times(jax.random.key(3), (4000,), within=within, **settings)
    low, high = (t if t in (0.0, 1.0) else float(cdf(np.float64(t))) for t in within)
    assert within[0] <= float(times.min()) < float(times.max()) <= within[1]
    assert distance_from_cdf(times, lambda t: (cdf(t) - low) / (high - low)) < 1.63 / np.sqrt(4000)


def test_shift_keeps_the_ends_multiplies_the_noise_ratio_and_has_an_inverse():
    t = jnp.linspace(0.0, 1.0, 21)
    shifted = flow.shift_time(t, 3.0)
    assert shifted[0] == 0.0 and shifted[-1] == 1.0
    inner, before = shifted[1:-1], t[1:-1]
    np.testing.assert_allclose(inner / (1 - inner), 3.0 * before / (1 - before), rtol=1e-5)
    np.testing.assert_allclose(flow.shift_time(shifted, 1 / 3.0), t, atol=1e-6)
    np.testing.assert_array_equal(flow.shift_time(t, 1.0), t)
