# SPDX-License-Identifier: Apache-2.0
"""Motion from pixels by block matching: where each small square of a frame went, and the frame halfway between two.

    flow(p) = argmin_d  sum over a window around p of |frame_t(q) - frame_{t+1}(q + d)|,      |d_x|, |d_y| <= reach

Full search over whole pixels, of the mean of the channels (Jain & Jain 1981,
https://doi.org/10.1109/TCOM.1981.1094950). Squares of ``block`` pixels
move as one; each is judged by itself and its eight neighbours, and of displacements that fit alike the shortest is
taken. The frame in between is found from its own squares: of motion through each (p - d/2 before, p + d/2 after) the
best, and the mean of its two ends, so that there are no holes.

It stands in for the networks that VBench takes (RAFT, AMT-S): no weights, no learning, motion up to ``reach``.

    vbench.dynamic_degree(flow(video_THWC))
    vbench.motion_smoothness(video_THWC, between)

Cannot see: motion farther than ``reach``, or of things smaller than a window; turning and growing, but as shifts. Where
nothing has texture it says 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

BLOCK = 4  # pixels


def flow(video_THWC: np.ndarray, *, block: int = BLOCK, reach: int | None = None) -> np.ndarray:
    """Pixels (x, y) that each place moves from a frame to the next, float32 (T - 1, H, W, 2).

    Args:
      video_THWC: of any real type.
      block: pixels, the side of a square.
      reach: pixels, the farthest displacement along an axis; None: an eighth of the height.

    Raises:
      ValueError: for a clip of fewer than 2 frames, or of frames that are not whole squares.
    """
    grey_THW = _grey(video_THWC, block)
    if len(grey_THW) < 2:
        raise ValueError(f"num_frames={len(grey_THW)}: motion is from a frame to the next, so use at least 2 frames.")
    found = _search(grey_THW[:-1], grey_THW[1:], _displacements(reach, grey_THW.shape[1]), block=block, halfway=False)
    return _spread(np.asarray(found), block)[..., ::-1].astype(np.float32)


def between(one_HWC: np.ndarray, other_HWC: np.ndarray, *, block: int = BLOCK, reach: int | None = None) -> np.ndarray:
    """The frame halfway between two, float32 (H, W, C), in their units.

    Args:
      block: as `flow`.
      reach: pixels, the farthest displacement from the one to the other; None: an eighth of the height.

    Raises:
      ValueError: for frames of different shapes, or that are not whole squares.
    """
    if one_HWC.shape != other_HWC.shape:
        raise ValueError(f"frames of shapes {one_HWC.shape} and {other_HWC.shape}: expected two of one shape.")
    one, other = _grey(one_HWC[None], block), _grey(other_HWC[None], block)
    H, W = one.shape[1:]
    found = _search(one, other, _displacements(reach, H), block=block, halfway=True)
    (d_HW2,) = _spread(np.asarray(found), block)
    rows_columns = np.moveaxis(np.mgrid[:H, :W], 0, -1)

    def taken(frame_HWC: np.ndarray, shift_HW2: np.ndarray) -> np.ndarray:
        at = np.clip(rows_columns + shift_HW2, 0, (H - 1, W - 1))
        return np.asarray(frame_HWC, np.float32)[at[..., 0], at[..., 1]]

    return (taken(one_HWC, -(d_HW2 // 2)) + taken(other_HWC, d_HW2 - d_HW2 // 2)) / 2


@functools.partial(jax.jit, static_argnames=("block", "halfway"))
def _search(
    one_NHW: ArrayLike, other_NHW: ArrayLike, displacements: ArrayLike, *, block: int, halfway: bool
) -> jax.Array:
    """The displacement (y, x) of each square that fits best, and first among equals; (n, H / block, W / block, 2).

    ``halfway``: of the squares of the frame in between, in place of those of ``one``.
    """
    n, H, W = jnp.shape(one_NHW)
    edge = H // 2  # beyond the edge the edge goes on
    one, other = (jnp.pad(x, ((0, 0), (edge, edge), (edge, edge)), mode="edge") for x in (one_NHW, other_NHW))

    rows, columns = _windows(H, block), _windows(W, block)

    def seen(padded: jax.Array, d: jax.Array) -> jax.Array:
        """What is at p + d."""
        return lax.dynamic_slice(padded, (0, edge + d[0], edge + d[1]), (n, H, W))

    def consider(so_far: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, best = so_far
        back = d // 2 if halfway else jnp.zeros_like(d)
        difference = jnp.abs(seen(one, -back) - seen(other, d - back))
        cost = jnp.einsum("yh,nhw,xw->nyx", rows, difference, columns, precision=lax.Precision.HIGHEST)
        better = cost < least
        return (jnp.where(better, cost, least), jnp.where(better[..., None], d, best)), None

    shape = (n, H // block, W // block)
    displacements = jnp.asarray(displacements)
    start = jnp.full(shape, jnp.inf), jnp.zeros((*shape, 2), displacements.dtype)
    return lax.scan(consider, start, displacements)[0][1]


def _windows(size: int, block: int) -> np.ndarray:
    """(size / block, size): which pixels of a row count for which square, its own and its neighbours'."""
    squares, of_pixel = np.arange(size // block), np.arange(size) // block
    return (np.abs(squares[:, None] - of_pixel) <= 1).astype(np.float32)


def _displacements(reach: int | None, height: int) -> np.ndarray:
    """All (y, x) within reach, the shortest first, int32 (n, 2).

    Raises:
      ValueError: for a reach that is none, or more than half the height.
    """
    farthest = max(1, height // 8) if reach is None else reach
    if not 1 <= farthest <= height // 2:
        raise ValueError(f"reach={reach}: expected 1 to {height // 2} pixels, half the height of the frames.")
    steps = range(-farthest, farthest + 1)
    return np.asarray(sorted(((y, x) for y in steps for x in steps), key=lambda d: d[0] ** 2 + d[1] ** 2), np.int32)


def _spread(squares: np.ndarray, block: int) -> np.ndarray:
    """What is said of squares, of each of their pixels."""
    return squares.repeat(block, axis=1).repeat(block, axis=2)


def _grey(video_THWC: np.ndarray, block: int) -> np.ndarray:
    video = np.asarray(video_THWC)
    if video.ndim != 4 or video.shape[1] % block or video.shape[2] % block:
        raise ValueError(
            f"video of shape {video.shape}: expected (frames, height, width, channels), with frames of whole squares "
            f"of {block} pixels, so pass another block, or crop."
        )
    return video.mean(-1, dtype=np.float32)
