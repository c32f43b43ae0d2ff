# SPDX-License-Identifier: Apache-2.0
"""Samplers: a sampler is one `step` along a velocity, as an optax optimiser is; `sample` owns the only loop.

| sampler         | order | evaluations for n steps | source                                                       |
|-----------------|-------|-------------------------|--------------------------------------------------------------|
| `euler`         | 1     | n                       | DDIM on the rectified path                                   |
| `heun`          | 2     | 2 n - 1                 | Karras et al. 2022 (2206.00364), algorithm 1                 |
| `dpm_solver_pp` | 2     | n                       | Lu et al. 2022 (2211.01095), algorithm 2: DPM-Solver++(2M)   |
| `unipc`         | 2     | n                       | Zhao et al. 2023 (2302.04867): UniPC-2, B(h) = e^h - 1       |

The last two are exponential integrators. With l = log(alpha / sigma), and D the estimate of the data, the flow is

    x_next = (sigma_next / sigma) x + sigma_next * integral of e^l D dl      from l to l_next,

exactly, and they put a polynomial in l through past values for D. The orders are measured from noise to data by
tests/diffusion/test_samplers.py; strictly inside the clock, where l is finite, `unipc` has order 3.

    latent = sample(velocity, noise, schedules.shifted(50, shift=3.0), sampler=unipc())
    march = sample(velocity, noise, times, sampler=heun(), return_path=True)       # (steps + 1, B, t, h, w, z)
    x, state = go_on(velocity, noise, unipc().init(noise), times[:9], sampler=unipc())            # some of the steps
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stvdm.diffusion import flow
from stvdm.diffusion.flow import Array, Path, Velocity

State = Any


class Sampler(NamedTuple):
    """How to go from one time to the next, with a memory between steps.

    A voxel whose velocity is exactly zero stays as it is, bit by bit.
    """

    init: Callable[[Array], State]  # x -> state
    step: Callable[[Velocity, State, Array, Array, Array], tuple[Array, State]]  # velocity, state, x, t, t_next
    num_evaluations: Callable[[int], int]  # of the velocity, in so many steps that end in t = 0


def sample(
    velocity: Velocity,
    noise: Array,
    times: Array,
    *,
    sampler: Sampler,
    callback: Callable[[int], None] | None = None,
    return_path: bool = False,
) -> Array:
    """Follow dx/dt = velocity(x, t) from `noise` at times[0] to times[-1].

    Args:
      velocity: any network, guided and pinned as you like.
      noise: x at times[0], (B, ...); the state is at least float32 whatever the network computes in.
      times: (num_steps + 1,), from `schedules`.
      sampler: one of those below.
      callback: called on the host with the number of steps done, after each; for progress.
      return_path: also the states on the way.

    Returns:
      x at times[-1]; with return_path all of (num_steps + 1, B, ...), from the noise to x. Can be jitted and, for the
      arguments of the velocity and for the noise, reverse-differentiated.
    """
    times = jnp.asarray(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times.shape={times.shape}: expected (num_steps + 1,), e.g. schedules.uniform(50).")
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    x, _, visited = _steps(velocity, noise, sampler.init(noise), times, sampler, callback, 0, keep=return_path)
    return jnp.concatenate([noise[None], visited]) if return_path else x


def go_on(
    velocity: Velocity,
    x: Array,
    state: State,
    times: Array,
    *,
    sampler: Sampler,
    callback: Callable[[int], None] | None = None,
    num_done: Array | int = 0,
) -> tuple[Array, State]:
    """What `sample` does from a point on the way: (x, state) at times[-1], of those at times[0].

    With the state that a sampler left, one velocity can be followed for some steps and then another.

    Args:
      state: what the sampler remembers of the steps before; ``sampler.init(x)`` if there are none.
      num_done: steps done before, which the callback counts along.
    """
    x, state, _ = _steps(velocity, x, state, jnp.asarray(times), sampler, callback, num_done, keep=False)
    return x, state


def _steps(
    velocity: Velocity,
    x: Array,
    state: State,
    times: Array,
    sampler: Sampler,
    callback: Callable[[int], None] | None,
    num_done: Array | int,
    *,
    keep: bool,
) -> tuple[Array, State, Any]:
    """(x, state) at times[-1], and with ``keep`` all x behind the first."""
    times = times.astype(x.dtype)

    def step(carry: tuple[Array, State], interval: tuple[Array, Array, Array]) -> tuple[tuple[Array, State], Any]:
        t, t_next, done = interval
        x, state = sampler.step(velocity, carry[1], carry[0], t, t_next)
        if callback is not None:
            jax.debug.callback(lambda done: callback(int(done)), done)
        return (x, state), x if keep else None

    intervals = (times[:-1], times[1:], num_done + jnp.arange(1, times.shape[0]))
    (x, state), visited = jax.lax.scan(step, (x, state), intervals)
    return x, state, visited


def euler() -> Sampler:
    """x + (t_next - t) v. Exact in one step where paths are straight."""

    def step(velocity: Velocity, state: State, x: Array, t: Array, t_next: Array) -> tuple[Array, State]:
        return x + (t_next - t) * velocity(x, t).astype(x.dtype), state

    return Sampler(init=lambda x: (), step=step, num_evaluations=lambda num_steps: num_steps)


def heun() -> Sampler:
    """The mean of the velocities at both ends of an Euler step.

    The step to t = 0 is Euler's: many velocities are 0 / 0 there, and one first-order step leaves the order of the
    whole at 2.
    """

    def step(velocity: Velocity, state: State, x: Array, t: Array, t_next: Array) -> tuple[Array, State]:
        here = velocity(x, t).astype(x.dtype)
        there = jax.lax.cond(
            t_next > 0,
            lambda: velocity(x + (t_next - t) * here, t_next).astype(x.dtype),
            lambda: here,
        )
        return x + (t_next - t) * (here + there) / 2, state

    return Sampler(init=lambda x: (), step=step, num_evaluations=lambda num_steps: 2 * num_steps - 1)


class _PastData(NamedTuple):
    data: Array  # D at the previous time
    log_snr: Array  # l at the previous time; -inf before the first step: a past infinitely far away tells no slope


def dpm_solver_pp(path: Path = flow.RECTIFIED) -> Sampler:
    """DPM-Solver++(2M): D extrapolated linearly in l from the last two values.

    The first step and the step to t = 0 are of first order (D constant); the latter lands on D itself.
    """

    def init(x: Array) -> _PastData:
        return _PastData(jnp.zeros_like(x), jnp.asarray(-jnp.inf, x.dtype))

    def step(velocity: Velocity, past: _PastData, x: Array, t: Array, t_next: Array) -> tuple[Array, _PastData]:
        v, data = _velocity_and_data(velocity, x, t, path)
        gain, _, ratio = _coefficients(path, past.log_snr, t, t_next)
        x_next = path.sigma(t_next) / path.sigma(t) * x + gain * (data + ratio / 2 * (data - past.data))
        return _at_rest(v, x, x_next), _PastData(data, path.log_snr(t))

    return Sampler(init=init, step=step, num_evaluations=lambda num_steps: num_steps)


class _Correction(NamedTuple):
    data: Array  # D at the previous time
    slope: Array  # D at the previous time less D at the one before
    log_snr: Array  # l at the previous time
    gain_new: Array  # what the corrector will add for each unit that D has changed since,
    gain_slope: Array  # and for each unit of `slope`


def unipc(path: Path = flow.RECTIFIED) -> Sampler:
    """UniPC-2 with B(h) = e^h - 1: predicts like `dpm_solver_pp`, and corrects that when D at the new point is known.

    The corrector integrates the parabola through D at the new time (u = 1), the previous one (u = 0) and the one before
    (u = -1 / ratio), where u = (l - l_0) / h; the mean of u^k under the weight e^(h u) is

        m_k = 1 / (1 - e^-h) - k m_(k-1) / h,      m_0 = 1.

    Corrected and predicted x share all but these terms, so the correction is added to x as it is, and costs no
    evaluation: D was needed there anyway (and is not evaluated again after it, as in the paper). With no D before the
    previous one, the corrector is the trapezoid, weight 1 / 2. What was predicted for t = 0 is not corrected.
    """

    def init(x: Array) -> _Correction:
        zero = jnp.zeros((), x.dtype)
        return _Correction(jnp.zeros_like(x), jnp.zeros_like(x), jnp.asarray(-jnp.inf, x.dtype), zero, zero)

    def step(velocity: Velocity, past: _Correction, x: Array, t: Array, t_next: Array) -> tuple[Array, _Correction]:
        v, data = _velocity_and_data(velocity, x, t, path)
        corrected = x + past.gain_new * (data - past.data) + past.gain_slope * past.slope
        slope = data - past.data

        gain, h, ratio = _coefficients(path, past.log_snr, t, t_next)
        x_next = path.sigma(t_next) / path.sigma(t) * corrected + gain * (data + ratio / 2 * slope)

        saturation = 1 / -jnp.expm1(-h)
        mean = saturation - 1 / h
        mean_square = saturation - 2 * mean / h
        weight_slope = ratio * (mean - mean_square) / (1 + ratio)
        weight_new = jnp.where(ratio > 0, mean - weight_slope, 0.5)
        gain_slope = gain * ratio * (weight_slope - 0.5)  # less what the predictor has put in
        past = _Correction(data, slope, path.log_snr(t), gain * weight_new, gain_slope)
        return _at_rest(v, x, x_next), past

    return Sampler(init=init, step=step, num_evaluations=lambda num_steps: num_steps)


def _velocity_and_data(velocity: Velocity, x: Array, t: Array, path: Path) -> tuple[Array, Array]:
    v = velocity(x, t).astype(x.dtype)
    return v, flow.estimate(v, x, t, objective=flow.Objective("velocity", path)).data


def _coefficients(path: Path, past_log_snr: Array, t: Array, t_next: Array) -> tuple[Array, Array, Array]:
    """(gain, h, ratio) of an exponential step: gain = alpha_next (1 - e^-h), h = l_next - l, ratio = h / (l - l_past).

    The gain is written without logarithms, so that it also holds at both ends of the clock, where h is infinite. The
    ratio is 0 where there is no past value, or any of the three times is infinitely far in l: then there is no slope.
    """
    log_snr = path.log_snr(t)
    gain = path.alpha(t_next) - path.alpha(t) * path.sigma(t_next) / path.sigma(t)
    h = path.log_snr(t_next) - log_snr
    ratio = h / (log_snr - past_log_snr)
    return gain, h, jnp.where(jnp.isfinite(ratio), ratio, 0)


def _at_rest(v: Array, x: Array, x_next: Array) -> Array:
    """x_next, but x where the velocity is exactly zero: what `guidance.keep_known` leans on.

    Euler does so by itself; a recombination of x and D only to rounding, and not at all where the path makes D differ.
    """
    return jnp.where(v == 0, x, x_next)
