# SPDX-License-Identifier: Apache-2.0
"""Guidance against its definition, and what it does not evaluate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.diffusion import flow, guidance, samplers, schedules

PATHS = [flow.RECTIFIED, flow.COSINE]


def conditional(x, t):
    return jnp.sin(3.0 * x) + t


def unconditional(x, t):
    return 0.5 * x - t


def state():
    return jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2))


def counted(velocity):
    """The velocity, and a list that grows by one with each real evaluation (also under jit, scan and cond)."""
    calls = []

    def counting(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return velocity(x, t)

    return counting, calls


def data_std(velocity, x, t, path):
    data = flow.estimate(velocity, x, t, objective=flow.Objective("velocity", path)).data
    return jnp.std(data, (1, 2, 3, 4))


def test_scale_one_is_the_conditional_itself():
    assert guidance.classifier_free(conditional, unconditional, scale=1.0) is conditional
    with pytest.warns(UserWarning, match="no effect"):
        assert guidance.classifier_free(conditional, unconditional, scale=1, rescale=0.5) is conditional


def test_guided_velocity_is_linear_in_the_scale():
    x, t = state(), jnp.asarray(0.4)
    c, u = conditional(x, t), unconditional(x, t)
    for scale in (0.0, 3.0, jnp.asarray(1.0)):
        guided = guidance.classifier_free(conditional, unconditional, scale=scale)(x, t)
        np.testing.assert_allclose(guided, u + scale * (c - u), atol=1e-6)


def test_scale_may_differ_between_examples():
    x, t = state(), jnp.asarray(0.4)
    each = guidance.classifier_free(conditional, unconditional, scale=jnp.asarray([1.0, 2.0, 6.0]))(x, t)
    for i, scale in enumerate([1.0, 2.0, 6.0]):
        alone = guidance.classifier_free(conditional, unconditional, scale=jnp.asarray(scale))(x, t)
        np.testing.assert_allclose(each[i], alone[i], atol=1e-6)


def test_outside_the_interval_only_the_conditional_is_evaluated():
    x = state()
    counting, calls = counted(unconditional)
    always = guidance.classifier_free(conditional, unconditional, scale=4.0)
    guided = jax.jit(guidance.classifier_free(conditional, counting, scale=4.0, interval=(0.25, 0.75)))
    for t, inside in [
        (1.0, False),
        (0.76, False),
        (0.75, True),
        (0.5, True),
        (0.25, True),
        (0.24, False),
        (0.0, False),
    ]:
        calls.clear()
        got = guided(x, jnp.asarray(t))
        jax.effects_barrier()
        np.testing.assert_allclose(got, (always if inside else conditional)(x, t), atol=1e-6)
        assert len(calls) == inside


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("t", [0.02, 0.5, 0.95])
def test_rescale_gives_the_data_the_contrast_of_the_conditional(path, t):
    x, t = state(), jnp.asarray(t)
    wanted, plain = (
        data_std(velocity(x, t), x, t, path)
        for velocity in (conditional, guidance.classifier_free(conditional, unconditional, scale=5.0))
    )
    stds = {}
    for rescale in (0.0, 0.7, 1.0):
        guided = guidance.classifier_free(conditional, unconditional, scale=5.0, rescale=rescale, path=path)
        stds[rescale] = data_std(guided(x, t), x, t, path)
    np.testing.assert_allclose(stds[1.0], wanted, rtol=1e-3)
    np.testing.assert_allclose(stds[0.0], plain, rtol=1e-4)
    np.testing.assert_allclose(stds[0.7], 0.7 * wanted + 0.3 * plain, rtol=1e-3)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_rescale_leaves_the_noise_consistent(path):
    """The rescaled velocity still explains x: x = alpha data + sigma noise, with the data scaled by one number."""
    x, t = state(), jnp.asarray(0.5)
    objective = flow.Objective("velocity", path)
    plain = guidance.classifier_free(conditional, unconditional, scale=5.0)
    guided = guidance.classifier_free(conditional, unconditional, scale=5.0, rescale=1.0, path=path)
    before, after = (flow.estimate(velocity(x, t), x, t, objective=objective) for velocity in (plain, guided))
    np.testing.assert_allclose(flow.interpolate(after.data, after.noise, t, path=path), x, atol=1e-5)
    ratio = after.data / before.data
    np.testing.assert_allclose(
        ratio, jnp.broadcast_to(jnp.median(ratio, (1, 2, 3, 4), keepdims=True), x.shape), rtol=1e-2
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp", "unipc"])
def test_known_voxels_end_bit_by_bit_as_they_began(name, path):
    noise = state()
    known = 0.3 * jax.random.normal(jax.random.key(1), noise.shape)
    mask = jnp.zeros((3, 2, 4, 4, 1), bool).at[:, 0].set(True).at[1, 1, :2].set(True)
    sampler = getattr(samplers, name)(*([path] if name in ("dpm_solver_pp", "unipc") else []))
    seen = []

    def network(x, t):
        jax.debug.callback(lambda x: seen.append(x), x)
        return jnp.sin(3.0 * x) + x.mean()

    pinned = guidance.keep_known(network, known, mask)
    start = jnp.where(mask, known, noise)
    x = jax.jit(lambda x: samplers.sample(pinned, x, schedules.shifted(7, shift=3.0), sampler=sampler))(start)
    jax.effects_barrier()
    everywhere = jnp.broadcast_to(mask, x.shape)
    np.testing.assert_array_equal(x[everywhere], known[everywhere])
    assert jnp.all(x[~everywhere] != start[~everywhere])
    assert len(seen) == sampler.num_evaluations(7)
    for shown in seen:
        np.testing.assert_array_equal(shown[everywhere], known[everywhere])


def test_network_sees_the_known_even_if_the_start_forgot_it():
    x, known = state(), jnp.full((3, 2, 4, 4, 2), 5.0)
    mask = jnp.zeros((3, 2, 1, 1, 1), bool).at[:, 0].set(True)
    velocity = guidance.keep_known(lambda x, t: x + x[:, :1], known, mask)(x, jnp.asarray(0.5))
    assert not velocity[:, 0].any()
    np.testing.assert_array_equal(velocity[:, 1], x[:, 1] + 5.0)


def test_errors_teach():
    with pytest.raises(ValueError, match="interval=\\(0.9, 0.1\\): expected 0 <= low < high <= 1"):
        guidance.classifier_free(conditional, unconditional, scale=3.0, interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="rescale=7: expected a share"):
        guidance.classifier_free(conditional, unconditional, scale=3.0, rescale=7)
