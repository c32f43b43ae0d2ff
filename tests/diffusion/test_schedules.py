# SPDX-License-Identifier: Apache-2.0
"""Schedules against SD3's formulas, and against the lists of diffusers' schedulers."""

import foreign_wan_sampling
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.diffusion import flow, schedules


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_times_fall_from_start_to_zero(num_steps, shift, start):
    times = schedules.shifted(num_steps, shift=shift, start=start)
    assert times.dtype == jnp.float32 and times.shape == (num_steps + 1,)
    assert times[0] == np.float32(start) and times[-1] == 0.0
    assert (jnp.diff(times) < 0).all()


def test_uniform_is_shift_one():
    np.testing.assert_allclose(schedules.uniform(4), [1.0, 0.75, 0.5, 0.25, 0.0], atol=0)


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_shifted_is_uniform_before_the_shift(start):
    unshifted = flow.shift_time(schedules.shifted(10, shift=5.0, start=start), 1 / 5.0)
    np.testing.assert_allclose(jnp.diff(unshifted), jnp.diff(unshifted)[0], atol=1e-5)


def test_shift_for_tokens_is_the_square_root_of_the_ratio():
    """SD3, 5.3.2: from 256 x 256 to 1024 x 1024 pixels, 16 times the tokens, the formula gives 4."""
    assert schedules.shift_for_tokens(4096, base_tokens=256) == 4.0
    assert schedules.shift_for_tokens(256, base_tokens=256, base_shift=3.0) == 3.0
    product = schedules.shift_for_tokens(900, base_tokens=400) * schedules.shift_for_tokens(400, base_tokens=900)
    np.testing.assert_allclose(product, 1.0)


@pytest.mark.parametrize("steps, shift", foreign_wan_sampling.LISTS)
def test_stops_are_the_lists_of_diffusers(steps, shift):
    for name, golden in foreign_wan_sampling.golden()["lists"][f"{steps},{shift}"].items():
        times, told = (np.asarray(row) for row in schedules.stops(steps, shift=shift, spacing=name))
        assert times.dtype == told.dtype == np.float32 and len(times) == len(told) == steps + 1
        np.testing.assert_allclose(times, golden["sigmas"], rtol=2e-7, atol=0)  # a rounding at most
        np.testing.assert_allclose(told, [*np.divide(golden["timesteps"], 1000), 0], rtol=2e-7, atol=0)


def test_even_stops_are_shifted_times_of_which_the_network_is_told():
    times, told = schedules.stops(20, shift=3.0)
    np.testing.assert_array_equal(times, schedules.shifted(20, shift=3.0))
    np.testing.assert_array_equal(told, times)


def test_the_golden_lists_are_what_diffusers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import make_wan_sampling

    for steps, shift in foreign_wan_sampling.LISTS:
        assert make_wan_sampling.lists(steps, shift) == foreign_wan_sampling.golden()["lists"][f"{steps},{shift}"]


def test_errors_teach():
    with pytest.raises(ValueError, match="spacing='linear': expected one of even, unipc, euler"):
        schedules.stops(3, shift=1.0, spacing="linear")
    with pytest.raises(ValueError, match="num_steps=0: expected at least 1"):
        schedules.uniform(0)
    with pytest.raises(ValueError, match="start=1.5: expected a time in"):
        schedules.uniform(3, start=1.5)
    with pytest.raises(ValueError, match="shift=-1.0: expected a positive number"):
        schedules.shifted(3, shift=-1.0)
    with pytest.raises(ValueError, match="num_tokens=0, base_tokens=3, base_shift=1.0: expected positive"):
        schedules.shift_for_tokens(0, base_tokens=3)
