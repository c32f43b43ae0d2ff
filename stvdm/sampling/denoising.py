# SPDX-License-Identifier: Apache-2.0
"""From noise to latent: networks, guided, followed along a list of times.

    how = denoising.how_of(config.flow, config.sample)
    latent_Bthwz = denoising.denoise(models, params, noise_Bthwz, stops, prompt, null, how=how)

**Two networks may take turns** (Wan 2.2 A14B): one makes the steps that begin at the boundary or above it, in much
noise, the other those below. `denoise` then follows one after the other, each by a program of its own, with what the
sampler remembers handed over. A single program, whether it chose inside of its loop or had two, would hold the weights
of both throughout; these hold one's, and those that wait may lie where the caller put them. The price is a program more
to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stvdm import shapes
from stvdm.diffusion import flow, guidance, samplers
from stvdm.diffusion.schedules import Stops
from stvdm.models.dit import DiT
from stvdm.models.text_encoders import TextEncoder
from stvdm.models.unet import UNet
from stvdm.sampling import first_frame
from stvdm.sampling.first_frame import Given

Tree = Any
Words = tuple[Any, Any]  # (tokens_BS, mask_BS), or a tower's (text_BSE, mask_BS)

HIGH, LOW = "dit_high_noise", "dit_low_noise"  # in the parameters of two that take turns, in place of "dit"
NOTHING = Given()

SAMPLERS: dict[str, Callable[[flow.Path], samplers.Sampler]] = {
    "euler": lambda path: samplers.euler(),
    "heun": lambda path: samplers.heun(),
    "dpm++": samplers.dpm_solver_pp,
    "unipc": samplers.unipc,
}


class Models(NamedTuple):
    """The two networks that are trained together: a velocity of latents, and the text it listens to.

    Where a published tower reads the text there is no second one. Then "tokens" are what the tower made of them, a
    text_BSE, from here on: the tower is frozen, so it reads apart, before a step, or once for all.
    """

    dit: DiT | UNet
    text: TextEncoder | None

    def predict(
        self,
        params: Tree,
        x_Bthwz: jax.Array,
        time_B: jax.Array,
        text_BSE: jax.Array,
        mask_BS: jax.Array,
        given: Given = NOTHING,
    ) -> jax.Array:
        """What the network was trained to predict at x, with one time for each clip; what is known is at time 0."""
        time_BK, level_BN, image = time_B[:, None], None, {}
        if given.extra_Bthwz is not None:
            x_Bthwz = jnp.concatenate([x_Bthwz, given.extra_Bthwz.astype(x_Bthwz.dtype)], axis=-1)
        if given.image_BSE is not None:
            image = {"image_BSE": given.image_BSE}
        if given.known_B1hwz is not None:
            first_B = jnp.zeros_like(time_B)
            if given.is_known_B is not None:
                first_B = jnp.where(given.is_known_B, first_B, time_B)
            time_BK = jnp.stack([first_B, time_B], axis=1)
            t, h, w = shapes.token_grid(x_Bthwz.shape[1:4], self.dit.patch)
            level_BN = jnp.broadcast_to(jnp.arange(t * h * w) >= h * w, (len(time_B), t * h * w)).astype(jnp.int32)
        return self.dit.apply({"params": params["dit"]}, x_Bthwz, time_BK, level_BN, text_BSE, mask_BS, **image)

    def read(self, params: Tree, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """text_BSE of tokenized captions."""
        if self.text is None:
            return tokens_BS
        return self.text.apply({"params": params["text"]}, tokens_BS, mask_BS)


class Denoising(NamedTuple):
    """How to go from noise to latent: what `denoise` compiles for."""

    objective: flow.Objective
    sampler: str
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    boundary: float = 0.0  # of two networks: the first makes the steps from this time on
    guidance_low: float = 1.0  # of two networks: of the second


def how_of(flow_settings: Mapping[str, Any], sample_settings: Mapping[str, Any]) -> Denoising:
    """What `denoise` compiles for, from a config's ``flow`` and ``sample`` sections."""
    low, high = sample_settings["guidance_interval"]
    scale = float(sample_settings["guidance"])
    return Denoising(
        objective=objective(flow_settings),
        sampler=sample_settings["sampler"],
        guidance=scale,
        guidance_interval=(low, high),
        guidance_rescale=sample_settings["guidance_rescale"],
        boundary=float(sample_settings["boundary"]),
        guidance_low=float(sample_settings["guidance_low"]) or scale,
    )


def objective(settings: Mapping[str, Any]) -> flow.Objective:
    """What the network of a config's ``flow`` section predicts, and on which path."""
    return flow.Objective(settings["prediction"], flow.PATHS[settings["path"]])


def denoise(
    models: Models,
    params: Tree,
    noise_Bthwz: jax.Array,
    stops: Stops,
    prompt: Words,
    null: Words,
    *,
    how: Denoising,
    given: Given = NOTHING,
    callback: Callable[[int], None] | None = None,
) -> jax.Array:
    """The normalised latent_Bthwz that ``noise`` flows to.

    Args:
      params: {"dit", "text"}; no "text" where a tower reads; HIGH and LOW in place of "dit" where two take turns.
      stops: of `schedules.stops`, from 1 down to 0.
      prompt, null: the captions, and what guidance leads away from.
      given: what the network is given of an image; a known first frame is that of the latent, bit by bit.
      callback: called with the number of steps done, after each.

    Raises:
      ValueError: for two networks without a boundary.
    """
    x = noise_Bthwz.astype(jnp.float32)
    if given.known_B1hwz is not None:
        x = jnp.where(first_frame.is_known(given, x.shape[1]), given.known_B1hwz, x)
    state, num_done = None, 0
    for network, part, here in turns(params, stops, how):
        x, state = _follow(
            models, network, x, state, part, num_done, prompt, null, how=here, given=given, callback=callback
        )
        num_done += len(part.times) - 1
    return x


def turns(params: Tree, stops: Stops, how: Denoising) -> list[tuple[Tree, Stops, Denoising]]:
    """(params, stops, how) of each network that has steps to make, in their order; params have it as "dit".

    Raises:
      ValueError: for two networks without a boundary.
    """
    if HIGH not in params:
        return [(params, stops, how)]
    if not 0 < how.boundary < 1:
        raise ValueError(
            f"sample.boundary={how.boundary}: this model's two networks take turns, so expected the time, between 0 "
            "and 1, down to which the first one works; Wan 2.2 A14B has 0.875 for text alone, and 0.9 from images."
        )
    first = int(np.sum(np.asarray(stops.told)[:-1] >= np.float32(how.boundary)))
    others = {name: part for name, part in params.items() if name not in (HIGH, LOW)}
    ways = (
        (HIGH, slice(0, first + 1), how),
        (LOW, slice(first, None), how._replace(guidance=how.guidance_low)),
    )
    cut = [(others | {"dit": params[name]}, Stops(*(row[at] for row in stops)), here) for name, at, here in ways]
    return [turn for turn in cut if len(turn[1].times) > 1]


@functools.partial(jax.jit, static_argnames=("models", "how", "callback"))
def _follow(
    models: Models,
    params: Tree,
    x_Bthwz: jax.Array,
    state: Any,
    stops: Stops,
    num_done: int | jax.Array,
    prompt: Words,
    null: Words,
    *,
    how: Denoising,
    given: Given,
    callback: Callable[[int], None] | None,
) -> tuple[jax.Array, Any]:
    velocity = guided_velocity(models, params, prompt, null, how=how, stops=stops, given=given)
    sampler = SAMPLERS[how.sampler](how.objective.path)
    state = sampler.init(x_Bthwz) if state is None else state
    return samplers.go_on(velocity, x_Bthwz, state, stops.times, sampler=sampler, callback=callback, num_done=num_done)


def guided_velocity(
    models: Models,
    params: Tree,
    prompt: Words,
    null: Words,
    *,
    how: Denoising,
    stops: Stops,
    given: Given = NOTHING,
) -> flow.Velocity:
    """The velocity of one network that `denoise` follows: towards the prompts, away from ``null``; arguments as there.

    It is asked at times of ``stops`` alone.
    """
    first = given.known_B1hwz

    def pinned(velocity: flow.Velocity) -> flow.Velocity:
        if first is None:
            return velocity

        def at(x: jax.Array, t: jax.Array) -> jax.Array:
            is_known = first_frame.is_known(given, x.shape[1])
            return guidance.keep_known(velocity, jnp.where(is_known, first, 0.0), is_known)(x, t)

        return at

    velocities = []
    for tokens_BS, mask_BS in (prompt, null):
        text_BSE = models.read(params, tokens_BS, mask_BS)

        def predict(
            x: jax.Array, t: jax.Array, text_BSE: jax.Array = text_BSE, mask_BS: jax.Array = mask_BS
        ) -> jax.Array:
            told = stops.told[jnp.argmin(jnp.abs(stops.times - t))]
            return models.predict(params, x, jnp.full(x.shape[:1], told), text_BSE, mask_BS, given)

        # Before guidance too, whose rescale looks at all of a clip: no loss ever saw what a network says of the known.
        velocities.append(pinned(flow.velocity_field(predict, objective=how.objective)))
    guided = guidance.classifier_free(
        *velocities,
        scale=how.guidance,
        interval=how.guidance_interval,
        rescale=how.guidance_rescale,
        path=how.objective.path,
    )
    return pinned(guided)
