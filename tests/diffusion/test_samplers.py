# SPDX-License-Identifier: Apache-2.0
"""Samplers on Gaussian data, whose velocity and flow have closed forms, and against plain NumPy from the papers."""

import itertools

import foreign_wan_sampling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stvdm.diffusion import flow, samplers, schedules

PATHS = [flow.RECTIFIED, flow.COSINE]
MEAN, STD = 0.7, 0.4  # of the data


def builders(path):
    return {
        "euler": samplers.euler(),
        "heun": samplers.heun(),
        "dpm_solver_pp": samplers.dpm_solver_pp(path),
        "unipc": samplers.unipc(path),
    }


def gaussian_velocity(path, std=STD):
    """dx/dt for data N(MEAN, std^2): the conditional expectations of data and noise, given x, are linear in x."""

    def velocity(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        whitened = (x - alpha * MEAN) / (alpha**2 * std**2 + sigma**2)
        return path.alpha_rate(t) * (MEAN + alpha * std**2 * whitened) + path.sigma_rate(t) * sigma * whitened

    return velocity


def exact_flow(path, x, t, t_next):
    """The flow keeps (x - mean_t) / std_t."""

    def moments(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha * MEAN, jnp.sqrt(alpha**2 * STD**2 + sigma**2)

    (mean, std), (mean_next, std_next) = moments(jnp.asarray(t)), moments(jnp.asarray(t_next))
    return mean_next + std_next * (x - mean) / std


def measured_order(path, name, start, stop, counts):
    """Minus the slope of log error over log steps, in float64."""
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64)[None]
        wanted = exact_flow(path, x, start, stop)
        errors = []
        for count in counts:
            times = np.linspace(start, stop, count + 1)
            got = samplers.sample(gaussian_velocity(path), x, times, sampler=builders(path)[name])
            errors.append(float(jnp.abs(got - wanted).max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "name, low, high",
    [("dpm_solver_pp", 1.85, 2.1), ("unipc", 2.8, 3.1)],
)
def test_order_of_convergence_of_the_multistep_samplers_within_the_clock(path, name, low, high):
    order = measured_order(path, name, 0.9, 0.1, counts=(64, 128, 256))
    assert low < order < high, f"{name} on the {path.name} path: order {order:.2f}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "name, low, high",
    [("euler", 0.9, 1.1), ("heun", 1.9, 2.1), ("dpm_solver_pp", 1.6, 2.1), ("unipc", 1.8, 2.2)],
)
def test_order_of_convergence_from_noise_to_data(path, name, low, high):
    """At both ends log-SNR is infinite and its steps do not shrink: for dpm_solver_pp errors fall as log(n) / n^2."""
    order = measured_order(path, name, 1.0, 0.0, counts=(160, 320, 640))
    assert low < order < high, f"{name} on the {path.name} path: order {order:.2f}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_single_data_point_is_hit_exactly(path, name, num_steps):
    """One step is enough: on the rectified path for all, on the cosine path for those that follow the data estimate."""
    x = jax.random.normal(jax.random.key(0), (2, 3))
    got = samplers.sample(
        gaussian_velocity(path, std=0.0), x, schedules.uniform(num_steps), sampler=builders(path)[name]
    )
    if path is flow.RECTIFIED or name in ("dpm_solver_pp", "unipc"):
        np.testing.assert_allclose(got, jnp.full_like(x, MEAN), atol=2e-6)
    elif num_steps == 1:
        assert jnp.abs(got - MEAN).max() > 0.1  # the path is curved


# The multistep samplers again, in plain NumPy, step by step from the papers' equations.

CURVES = {
    "rectified": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: np.cos(np.pi * t / 2), lambda t: np.sin(np.pi * t / 2)),
}


def numpy_data(path, x, t):
    alpha, sigma = (curve(t) for curve in CURVES[path])
    return MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def numpy_log_snr(path, t):
    alpha, sigma = (curve(t) for curve in CURVES[path])
    return np.log(alpha / sigma) if sigma > 0 else np.inf


def numpy_dpm_solver_pp(path, x, times):
    """Lu et al. 2022b, algorithm 2, with the step to sigma = 0 of first order."""
    alpha, sigma = CURVES[path]
    past = []
    for i in range(1, len(times)):
        past.append(numpy_data(path, x, times[i - 1]))
        h = numpy_log_snr(path, times[i]) - numpy_log_snr(path, times[i - 1])
        data = past[-1]
        if i > 1 and times[i] > 0:
            r = (numpy_log_snr(path, times[i - 1]) - numpy_log_snr(path, times[i - 2])) / h
            data = (1 + 1 / (2 * r)) * past[-1] - 1 / (2 * r) * past[-2]
        x = sigma(times[i]) / sigma(times[i - 1]) * x - alpha(times[i]) * np.expm1(-h) * data
    return x


def numpy_unified(path, x, times, i, data, new=None):
    """Zhao et al. 2023, for data prediction: UniP from times[i - 1] to times[i], or UniC, if `new` is D at times[i].

    data: D at times[i - 1], times[i - 2], ... as many as the order. The coefficients solve R(r) a B(h) = phi(h).
    """
    alpha, sigma = CURVES[path]
    l0 = numpy_log_snr(path, times[i - 1])
    h = numpy_log_snr(path, times[i]) - l0
    ratios = [(numpy_log_snr(path, times[i - 1 - m]) - l0) / h for m in range(1, len(data))]
    differences = [(d - data[0]) / r for d, r in zip(data[1:], ratios, strict=True)]
    if new is not None:
        ratios.append(1.0)
        differences.append(new - data[0])
    b_h = np.expm1(-h)
    correction = 0.0
    if len(ratios) == 1:
        correction = 0.5 * differences[0]  # with one difference any a_1 keeps the order, and 1 / 2 is used
    elif ratios:
        phi, factorial, right = b_h / -h - 1, 1, []
        for k in range(1, len(ratios) + 1):
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        matrix = np.stack([np.asarray(ratios) ** k for k in range(len(ratios))])
        correction = sum(a * d for a, d in zip(np.linalg.solve(matrix, right), differences, strict=True))
    return sigma(times[i]) / sigma(times[i - 1]) * x - alpha(times[i]) * b_h * (data[0] + correction)


def numpy_unipc(path, x, times):
    predicted, data = x, []  # x: the corrected state
    for i in range(1, len(times)):
        new = numpy_data(path, predicted, times[i - 1])
        if i > 1:
            x = numpy_unified(path, x, times, i - 1, data[:2], new)
        data.insert(0, new)
        predicted = numpy_unified(path, x, times, i, data[: 1 if times[i] == 0 else 2])
    return predicted


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("name, reference", [("dpm_solver_pp", numpy_dpm_solver_pp), ("unipc", numpy_unipc)])
@pytest.mark.parametrize("stop", [0.0, 0.05])
def test_multistep_samplers_equal_the_papers_equations(path, name, reference, stop):
    clock = np.linspace(0.97, stop, 9) ** 1.3  # unequal steps
    clock = 3 * clock / (1 + 2 * clock)
    with jax.enable_x64(True):
        x = np.linspace(-2.0, 2.0, 9)[None]
        got = samplers.sample(gaussian_velocity(path), jnp.asarray(x), clock, sampler=builders(path)[name])
        np.testing.assert_allclose(got, reference(path.name, x, clock), rtol=1e-11)


@pytest.mark.parametrize("steps, shift", foreign_wan_sampling.MARCHES)
def test_unipc_goes_the_way_of_diffusers(steps, shift):
    """Order 2, B(h) = e^h - 1, of first order at both ends: every state on the way, to float32's rounding."""
    assert (foreign_wan_sampling.MEAN, foreign_wan_sampling.STD) == (MEAN, STD)
    golden = foreign_wan_sampling.golden()["marches"][f"{steps},{shift}"]
    times = schedules.stops(steps, shift=shift, spacing="unipc").times
    noise = jnp.asarray(foreign_wan_sampling.march_noise())
    march = samplers.sample(gaussian_velocity(flow.RECTIFIED), noise, times, sampler=samplers.unipc(), return_path=True)
    np.testing.assert_allclose(march[1:].reshape(steps, -1), golden, atol=2e-6)


def test_the_golden_marches_are_what_diffusers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import make_wan_sampling

    for steps, shift in foreign_wan_sampling.MARCHES:
        golden = foreign_wan_sampling.golden()["marches"][f"{steps},{shift}"]
        np.testing.assert_allclose(make_wan_sampling.march(steps, shift), golden, atol=1e-6)


@pytest.mark.parametrize("name", ["heun", "unipc"])
def test_going_on_is_what_it_would_have_been_at_once(name):
    sampler, times = builders(flow.RECTIFIED)[name], schedules.shifted(6, shift=3.0)
    velocity, noise = gaussian_velocity(flow.RECTIFIED), jax.random.normal(jax.random.key(0), (2, 3))
    whole, steps = samplers.sample(velocity, noise, times, sampler=sampler), []
    x, state = samplers.go_on(velocity, noise, sampler.init(noise), times[:3], sampler=sampler, callback=steps.append)
    x, _ = samplers.go_on(velocity, x, state, times[2:], sampler=sampler, callback=steps.append, num_done=2)
    jax.effects_barrier()
    np.testing.assert_allclose(x, whole, atol=2e-6)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
def test_sample_is_the_loop_over_steps(name):
    sampler, times = builders(flow.RECTIFIED)[name], schedules.shifted(6, shift=3.0)
    velocity = gaussian_velocity(flow.RECTIFIED)
    noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    x, state, visited = noise, sampler.init(noise), [noise]
    step = jax.jit(lambda state, x, t, t_next: sampler.step(velocity, state, x, t, t_next))
    for t, t_next in itertools.pairwise(np.asarray(times)):
        x, state = step(state, x, t, t_next)
        visited.append(x)

    eager = samplers.sample(velocity, noise, times, sampler=sampler)
    jitted = jax.jit(lambda noise, times: samplers.sample(velocity, noise, times, sampler=sampler))(noise, times)
    march = samplers.sample(velocity, noise, times, sampler=sampler, return_path=True)
    np.testing.assert_allclose(eager, x, atol=2e-6)
    np.testing.assert_allclose(jitted, x, atol=2e-6)
    np.testing.assert_allclose(march, jnp.stack(visited), atol=2e-6)
    np.testing.assert_array_equal(march[0], noise)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_number_of_evaluations_is_as_promised(name, num_steps):
    sampler, times = builders(flow.RECTIFIED)[name], []

    def velocity(x, t):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return jnp.where(t > 0, -x / t, jnp.nan)  # a point mass at 0: undefined at t = 0

    steps = []
    x = samplers.sample(
        velocity, jnp.ones((1, 2)), schedules.uniform(num_steps), sampler=sampler, callback=steps.append
    )
    jax.effects_barrier()
    assert len(times) == sampler.num_evaluations(num_steps)
    assert sorted(steps) == list(range(1, num_steps + 1))
    assert min(times) > 0 and jnp.isfinite(x).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_whatever_was_trained_the_sample_is_the_same(path, prediction):
    velocity, objective = gaussian_velocity(path), flow.Objective(prediction, path)

    def network(x, t):
        parts = flow.estimate(velocity(x, t), x, t, objective=flow.Objective("velocity", path))
        return flow.target(parts.data, parts.noise, t, objective=objective)

    noise, times = jax.random.normal(jax.random.key(0), (2, 5)), schedules.uniform(20)
    wanted = samplers.sample(velocity, noise, times, sampler=samplers.unipc(path))
    got = samplers.sample(flow.velocity_field(network, objective=objective), noise, times, sampler=samplers.unipc(path))
    # All that is known of the data at t = 1 from epsilon is 0, instead of the mean: one step of twenty.
    np.testing.assert_allclose(got, wanted, atol=0.1 if prediction == "epsilon" else 1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
def test_samples_have_a_gradient(name):
    """Of the end with respect to the noise and to a parameter of the velocity, against finite differences."""
    times = schedules.shifted(4, shift=2.0)

    def end(noise, bias):
        velocity = gaussian_velocity(flow.RECTIFIED)
        x = samplers.sample(
            lambda x, t: velocity(x, t) + bias * jnp.sin(x), noise, times, sampler=builders(flow.RECTIFIED)[name]
        )
        return jnp.sum(x**2)

    check_grads(end, (jnp.asarray([[0.3, -1.2]]), jnp.asarray(0.2)), order=1, modes=["rev"], rtol=2e-2)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
def test_state_stays_float32_under_a_bfloat16_network(name):
    velocity = gaussian_velocity(flow.RECTIFIED)
    noise = jax.random.normal(jax.random.key(0), (2, 5), jnp.bfloat16)
    got = samplers.sample(
        lambda x, t: velocity(x, t).astype(jnp.bfloat16),
        noise,
        schedules.uniform(8),
        sampler=builders(flow.RECTIFIED)[name],
    )
    assert got.dtype == jnp.float32
    wanted = samplers.sample(
        velocity, noise.astype(jnp.float32), schedules.uniform(8), sampler=builders(flow.RECTIFIED)[name]
    )
    np.testing.assert_allclose(got, wanted, atol=0.03)


def test_errors_teach():
    with pytest.raises(ValueError, match="times.shape=\\(1,\\): expected \\(num_steps \\+ 1,\\)"):
        samplers.sample(lambda x, t: x, jnp.ones((1, 2)), jnp.ones(1), sampler=samplers.euler())
