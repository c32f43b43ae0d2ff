# SPDX-License-Identifier: Apache-2.0
"""Guidance: functions from velocities to a velocity.

    guided = u + scale (c - u)       c the velocity with the prompt, u without it

Classifier-free guidance: Ho & Salimans 2022 (2207.12598). Interval: Kynkäänniemi et al. 2024 (2404.07724). Rescale: Lin
et al. 2023 (2305.08891), section 3.4.

    guided = classifier_free(prompted, unprompted, scale=6.0, interval=(0.1, 0.9), rescale=0.7)
    pinned = keep_known(guided, known_Bthwz, mask_Bthw1)
    latent = samplers.sample(pinned, jnp.where(mask_Bthw1, known_Bthwz, noise), times, sampler=samplers.heun())
"""

import warnings

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stvdm.diffusion import flow
from stvdm.diffusion.flow import Array, Velocity


def classifier_free(
    conditional: Velocity,
    unconditional: Velocity,
    *,
    scale: ArrayLike,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    path: flow.Path = flow.RECTIFIED,
) -> Velocity:
    """The velocity pushed away from the unconditional one.

    Args:
      conditional, unconditional: velocities (x, t), with a scalar t.
      scale: 1 is the conditional velocity itself (a plain 1 never evaluates the other); larger follows the prompt more
        and varies less; (B,) for one scale per example.
      interval: times within which to guide; outside it only the conditional velocity is evaluated, which costs half.
      rescale: in [0, 1], how far the guided estimate of the data is brought back to the standard deviation, over each
        example, of the conditional one: against over-saturation at large scales. Of the data and not of the velocity,
        because a shrunken velocity would also leave noise behind.
      path: what the velocities move along; only `rescale` needs it.
    """
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"interval={interval}: expected 0 <= low < high <= 1, in time (1 is noise).")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale={rescale}: expected a share in [0, 1]; 0.7 is usual, 0 is off.")
    if isinstance(scale, int | float) and scale == 1:
        if rescale or (low, high) != (0.0, 1.0):
            warnings.warn("scale=1 is no guidance: interval and rescale have no effect.", stacklevel=2)
        return conditional

    def guided(x: Array, t: Array) -> Array:
        with_prompt, without = conditional(x, t), unconditional(x, t)
        velocity = without + flow.expand(scale, x) * (with_prompt - without)
        velocity = _match_contrast(velocity, with_prompt, x, t, rescale, path) if rescale else velocity
        return velocity.astype(with_prompt.dtype)

    if (low, high) == (0.0, 1.0):
        return guided
    return lambda x, t: jax.lax.cond((low <= t) & (t <= high), guided, conditional, x, t)


def keep_known(velocity: Velocity, known: Array, mask: Array) -> Velocity:
    """The velocity where `mask` (broadcast against x) is true is 0, and the network sees exactly `known` there.

    A sample started from `jnp.where(mask, known, noise)` therefore still holds `known` at its end, bit by bit, with
    every sampler of `samplers`: they leave a voxel of velocity zero where it is. The network should know that these
    voxels are at time 0, which is its closure's affair (time per token); nothing is noised and put back, as RePaint
    does for networks that can't be told.
    """
    mask = jnp.asarray(mask, bool)

    def pinned(x: Array, t: Array) -> Array:
        moving = velocity(jnp.where(mask, known, x).astype(x.dtype), t)
        return jnp.where(mask, jnp.zeros_like(moving), moving)

    return pinned


def _match_contrast(velocity: Array, reference: Array, x: Array, t: Array, rescale: float, path: flow.Path) -> Array:
    """`velocity`, its data estimate scaled, by the share `rescale`, to the standard deviation of `reference`'s."""
    objective = flow.Objective("velocity", path)
    axes = tuple(range(1, x.ndim))
    data = flow.estimate(velocity, x, t, objective=objective).data
    wanted = jnp.std(flow.estimate(reference, x, t, objective=objective).data, axes, keepdims=True)
    factor = wanted / jnp.maximum(jnp.std(data, axes, keepdims=True), 1e-6)
    change = rescale * (factor - 1.0) * data
    # Velocity is linear in (x, data), so a change of the data at fixed x changes it by the velocity of (0, change).
    return velocity + flow.estimate(change, jnp.zeros_like(x), t, objective=flow.Objective("x0", path)).velocity
