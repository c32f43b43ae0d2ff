# SPDX-License-Identifier: Apache-2.0
"""A large frame coded in overlapping tiles that are blended linearly.

    result = sum_i w_i tile_i / sum_i w_i,      w_i rising from 0 to 1 over the overlap

All tiles have one shape (the last of a row is moved back to end with the frame), so one compiled function serves them.
The sum lives in host memory: the device holds one tile.

    video = blend(lambda y, x, h, w: decode(latent[:, :, y:y+h, x:x+w]), (60, 104), tile=(32, 32), overlap=8, scale=8)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def blend(
    code: Callable[[int, int, int, int], jax.Array],
    size: tuple[int, int],
    *,
    tile: tuple[int, int],
    overlap: int,
    margin: int = 0,
    scale: int = 1,
) -> jax.Array:
    """An array (B, T, height * scale, width * scale, C) put together from tiles.

    Args:
      code: (y, x, h, w) -> the tile of h x w positions at (y, x), (B, T, h * scale, w * scale, C).
      size: height and width of the frame in positions.
      tile: height and width of a tile in positions; a frame smaller than it is one tile, returned as it is.
      overlap: positions that neighbouring tiles share.
      margin: positions along the inner borders of a tile that are thrown away before blending.
      scale: how much larger the result is than the positions.

    Raises:
      ValueError: unless 0 <= 2 * margin <= overlap < tile.
    """
    if not 0 <= 2 * margin <= overlap < min(tile):
        raise ValueError(f"tile={tile}, overlap={overlap}, margin={margin}: expected 2 margin <= overlap < tile.")
    h, w = (min(t, n) for t, n in zip(tile, size, strict=True))
    if (h, w) == size:
        return code(0, 0, h, w)
    total, weights = np.zeros(0), np.zeros((size[0] * scale, size[1] * scale, 1), np.float32)
    for y, x in itertools.product(_starts(size[0], h, overlap), _starts(size[1], w, overlap)):
        down = _ramp(y, h, size[0], overlap, margin, scale)
        across = _ramp(x, w, size[1], overlap, margin, scale)
        here = np.s_[y * scale : (y + h) * scale, x * scale : (x + w) * scale]
        weight = (down[:, None] * across)[..., None]
        part = np.asarray(code(y, x, h, w))
        if not total.size:
            total = np.zeros((*part.shape[:2], *weights.shape[:2], part.shape[-1]), part.dtype)
        total[:, :, *here] += part * weight
        weights[here] += weight
    return jnp.asarray(total / weights)


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin; the last is moved back to end with the frame, so that all have one compiled shape."""
    return [*range(0, size - tile, max(tile - overlap, 1)), size - tile]


def _ramp(start: int, tile: int, size: int, overlap: int, margin: int, scale: int) -> np.ndarray:
    """Weights along one side of a tile: 0 in the margin, rising over the rest of the overlap; 1 at the frame's ends."""
    place = np.arange(tile * scale) + 0.5
    rise = max((overlap - 2 * margin) * scale, 1)
    left = np.ones_like(place) if start == 0 else np.clip((place - margin * scale) / rise, 0, 1)
    right = np.ones_like(place) if start + tile == size else np.clip((place[::-1] - margin * scale) / rise, 0, 1)
    return np.minimum(left, right).astype(np.float32)
