# SPDX-License-Identifier: Apache-2.0
"""Patches, times and places as vectors.

    patch    token = W patch + b, the patch a block of latent values across time and space
    time     (cos t ω, sin t ω) at geometrically spaced ω, for a noise level t in [0, 1]
    place    rotary: pairs of a head's values turn by angles proportional to the token's place along
             (time, height, width), so that <R(m) q, R(n) k> depends on m - n alone (RoFormer, arXiv:2104.09864)

Places are computed from the token grid, never looked up in a table of fixed length, so a model meets any
resolution, length and frame rate, and a clip may begin at any time:

    place_N3 = grid_places((5, 4, 4), offset=(5, 0, 0))     # the five latent frames that follow the first five
    turns = rotary_turns(place_N3, head_width=32)
    q_BNAd = rotate(q_BNAd, turns)
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm import shapes
from stvdm.models.linear import linear, zeros

Size3 = tuple[int, int, int]
Turns = tuple[jax.Array, jax.Array]  # (cos_Nd, sin_Nd), float32: both values of a pair hold its cosine, and -+ its sine

TIME_SCALE = 1000.0  # noise levels in [0, 1] are spread over [0, 1000], where the sinusoids tell them apart


class PatchEmbed(nn.Module):
    """latent_Bthwz -> tokens_BND: cuts spacetime patches and maps each to the model's width."""

    width: int
    patch: Size3
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latent_Bthwz: jax.Array) -> jax.Array:
        tokens_BNP = shapes.patchify(latent_Bthwz, self.patch)
        return linear(self.width, None, "width", dtype=self.dtype, name="linear")(tokens_BNP)


class PatchUnembed(nn.Module):
    """tokens_BND -> latent_Bthwz: the way back. Starts at zero unless told otherwise: a fresh model predicts zeros."""

    channels: int
    patch: Size3
    dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = zeros

    @nn.compact
    def __call__(self, tokens_BND: jax.Array, grid: Size3) -> jax.Array:
        pt, ph, pw = self.patch
        num_values = pt * ph * pw * self.channels
        to_patches = linear(num_values, "width", None, init=self.kernel_init, dtype=self.dtype, name="linear")
        return shapes.unpatchify(to_patches(tokens_BND), grid, self.patch)


def time_features(time: jax.Array, num_features: int = 256) -> jax.Array:
    """Sinusoids of noise levels in [0, 1]: float32, one dimension more than ``time``, cosines first.

    Frequencies fall geometrically from 1 to nearly 1/10000 per unit of 1000 t (DDPM's, arXiv:2006.11239).
    """
    if num_features % 2:
        raise ValueError(f"time_features={num_features}: cosines and sines come in pairs, so use an even number.")
    frequency = _frequencies(num_features // 2)
    angle = time.astype(jnp.float32)[..., None] * TIME_SCALE * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def grid_places(
    grid: Size3,
    *,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> jax.Array:
    """place_N3: (time, height, width) of each token, offset + scale * index, in float32.

    ``offset`` places a clip after another. ``scale`` stretches an axis: give time the ratio of training to actual
    frames per second, and equal places are equal seconds. Both may be traced arrays.
    """
    index_N3 = np.indices(grid).reshape(3, -1).T.astype(np.float32)
    return jnp.asarray(offset, jnp.float32) + jnp.asarray(scale, jnp.float32) * index_N3


def split_axes(width: int) -> Size3:
    """How ``width`` values are shared out to (time, height, width): pairs, thirds, the rest to time (as in Wan 2.1).

    >>> split_axes(128)
    (44, 42, 42)
    """
    if width % 2 or width < 2:
        raise ValueError(f"width={width}: places turn pairs of values, so use an even width (of a head, for rotary).")
    space = 2 * (width // 6)
    return width - 2 * space, space, space


def rotary_turns(place_NX: jax.Array, head_width: int, *, theta: float = 1e4) -> Turns:
    """The turns for `rotate`: pair i of an axis that has n pairs turns by place * theta^(-i/n).

    X is 3 for tokens of a clip, which share the head out by `split_axes`, or 1 for words.
    """
    angle_Nr = _angles(place_NX, head_width, theta)
    sin_Nr = jnp.sin(angle_Nr)
    cos_Nd = jnp.repeat(jnp.cos(angle_Nr), 2, axis=-1)
    return cos_Nd, jnp.stack([-sin_Nr, sin_Nr], axis=-1).reshape(cos_Nd.shape)


def rotate(x_BNAd: jax.Array, turns: Turns) -> jax.Array:
    """Turns neighbouring pairs (a, b) of each head to (a cos - b sin, a sin + b cos), in float32."""
    cos_N1d, sin_N1d = (x_Nd[:, None] for x_Nd in turns)
    swapped_BNAd = x_BNAd.reshape(*x_BNAd.shape[:-1], -1, 2)[..., ::-1].reshape(x_BNAd.shape)
    return (x_BNAd * cos_N1d + swapped_BNAd * sin_N1d).astype(x_BNAd.dtype)


def sincos_places(place_NX: jax.Array, width: int, *, theta: float = 1e4) -> jax.Array:
    """places_ND to add to tokens: the alternative to rotary, the same angles as cosines and sines (as in DiT)."""
    angle_Nr = _angles(place_NX, width, theta)
    return jnp.concatenate([jnp.cos(angle_Nr), jnp.sin(angle_Nr)], axis=-1)


def _angles(place_NX: jax.Array, width: int, theta: float) -> jax.Array:
    widths = split_axes(width) if place_NX.shape[1] == 3 else (width,)
    per_axis = [place_NX[:, axis, None] * _frequencies(n // 2, theta) for axis, n in enumerate(widths)]
    return jnp.concatenate(per_axis, axis=-1)


def _frequencies(count: int, theta: float = 1e4) -> np.ndarray:
    return (theta ** (-np.arange(count) / max(count, 1))).astype(np.float32)
