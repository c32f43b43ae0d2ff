# SPDX-License-Identifier: Apache-2.0
"""The legend of shapes, and all arithmetic between video, latent and tokens.

Array names end in their dimensions, one letter each, everywhere in this repository:

    B        batch                       N   video tokens            A   attention heads
    T H W C  frames, height, width,      S   text tokens             d   width of one head
             channels of a video         D   model width             F   MLP width
    t h w z  the same of its latent      E   text width              P   values of one patch
                                         K   distinct noise levels of a clip

So ``video_BTHWC`` is a batch of videos and ``q_BNAd`` are queries. Two groupings of time exist:

    causal    the first frame is coded alone, the others in groups:   t = 1 + (T - 1) / temporal
    uniform   all frames are coded in groups:                         t = T / temporal

    >>> latent_shape((120, 512, 512), temporal=4, spatial=8, grouping="uniform")
    (30, 64, 64)
    >>> token_grid((30, 64, 64), (1, 2, 2))
    (30, 32, 32)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

Grouping = Literal["causal", "uniform"]
Size3 = tuple[int, int, int]  # (time, height, width)
Place = tuple[Any, Any, Any]  # the same of one place, or arrays of many


def latent_shape(
    video: Size3, *, temporal: int, spatial: int, grouping: Grouping = "causal", patch: Size3 = (1, 1, 1)
) -> Size3:
    """(t, h, w) of the latent of a video of (T, H, W), compressed ``temporal`` and ``spatial`` fold.

    Raises:
      ValueError: if the video does not divide into whole latents, or these into patches; the message names sizes that
        do.
    """
    _check_sides(video, spatial=spatial, patch=patch)
    frames, height, width = video
    if grouping == "causal":
        if frames < 1 or (frames - 1) % temporal:
            raise ValueError(
                f"num_frames={frames}: time is compressed by {temporal} and the first frame kept alone, "
                f"so use {temporal}k+1, e.g. {_neighbours(frames, temporal, 1)}."
            )
        latent_frames = 1 + (frames - 1) // temporal
    elif grouping == "uniform":
        if frames < temporal or frames % temporal:
            raise ValueError(
                f"num_frames={frames}: time is compressed by {temporal} in equal groups, so use {temporal}k, "
                f"e.g. {_neighbours(frames, temporal, 0)}."
            )
        latent_frames = frames // temporal
    else:
        raise ValueError(f"grouping={grouping!r}: expected 'causal' or 'uniform'.")
    latent = latent_frames, height // spatial, width // spatial
    token_grid(latent, patch)
    return latent


def video_shape(latent: Size3, *, temporal: int, spatial: int, grouping: Grouping = "causal") -> Size3:
    """(T, H, W) of the video that a latent of (t, h, w) decodes to: the inverse of `latent_shape`."""
    frames, height, width = latent
    num_frames = 1 + (frames - 1) * temporal if grouping == "causal" else frames * temporal
    return num_frames, height * spatial, width * spatial


def token_grid(latent: Sequence[int], patch: Size3) -> Size3:
    """Tokens along (time, height, width) of a latent cut into patches; their product is N.

    Raises:
      ValueError: if a patch does not divide the latent.
    """
    if any(p < 1 or size < p or size % p for size, p in zip(latent, patch, strict=True)):
        raise ValueError(
            f"latent (t, h, w)={tuple(latent)} is not a whole number of patches {patch}: "
            "change the frames, height or width of the clip, or the patch."
        )
    t, h, w = (size // p for size, p in zip(latent, patch, strict=True))
    return t, h, w


def patchify(latent_Bthwz: jax.Array, patch: Size3) -> jax.Array:
    """Cuts a latent into spacetime patches: tokens_BNP, in (time, height, width) order.

    Inside a patch the channel comes last: P = pt * ph * pw * z. A patch as large as the latent gives one token.
    """
    nt, nh, nw = token_grid(latent_Bthwz.shape[1:4], patch)
    (pt, ph, pw), z = patch, latent_Bthwz.shape[-1]
    cut = latent_Bthwz.reshape(-1, nt, pt, nh, ph, nw, pw, z).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return cut.reshape(-1, nt * nh * nw, pt * ph * pw * z)


def unpatchify(tokens_BNP: jax.Array, grid: Size3, patch: Size3) -> jax.Array:
    """Puts patches back into a latent_Bthwz: the inverse of `patchify`. ``grid`` is that of `token_grid`."""
    (nt, nh, nw), (pt, ph, pw) = grid, patch
    z = tokens_BNP.shape[-1] // (pt * ph * pw)
    cut = tokens_BNP.reshape(-1, nt, nh, nw, pt, ph, pw, z).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return cut.reshape(-1, nt * pt, nh * ph, nw * pw, z)


def token_of_pixel(pixel: Place, *, patch: Size3, temporal: int, spatial: int, grouping: Grouping = "causal") -> Place:
    """(frame, row, column) of the token that stands for a pixel (frame, y, x) of the video, all counted from 0.

    Works on arrays of numbers too: ``tokens_thw[token_of_pixel(tuple(numpy.ogrid[:T, :H, :W]), ...)]`` gives every
    pixel the value of its token.
    """
    frame, y, x = pixel
    latent_frame = (frame + temporal - 1) // temporal if grouping == "causal" else frame // temporal
    return latent_frame // patch[0], y // (spatial * patch[1]), x // (spatial * patch[2])


def pixels_of_token(
    token: Size3, *, patch: Size3, temporal: int, spatial: int, grouping: Grouping = "causal"
) -> tuple[slice, slice, slice]:
    """The (frames, rows, columns) of pixels that a token stands for: those whose `token_of_pixel` it is.

    It is their place, and not all that the token knows of: the networks around it look further.
    """
    first, stop = token[0] * patch[0], (token[0] + 1) * patch[0]
    if grouping == "causal":
        frames = slice(max(0, 1 + (first - 1) * temporal), 1 + (stop - 1) * temporal)
    else:
        frames = slice(first * temporal, stop * temporal)
    rows, columns = (
        slice(place * spatial * size, (place + 1) * spatial * size)
        for place, size in zip(token[1:], patch[1:], strict=True)
    )
    return frames, rows, columns


def space_to_depth(video_BTHWC: jax.Array, factor: int) -> jax.Array:
    """Pixel-unshuffle: each factor x factor square of pixels becomes one position with factor² C channels."""
    B, T, H, W, C = video_BTHWC.shape
    cut = video_BTHWC.reshape(B, T, H // factor, factor, W // factor, factor, C).transpose(0, 1, 2, 4, 3, 5, 6)
    return cut.reshape(B, T, H // factor, W // factor, factor * factor * C)


def depth_to_space(video_BTHWC: jax.Array, factor: int) -> jax.Array:
    """Pixel-shuffle: the inverse of `space_to_depth`."""
    B, T, H, W, C = video_BTHWC.shape
    cut = video_BTHWC.reshape(B, T, H, W, factor, factor, C // factor**2).transpose(0, 1, 2, 4, 3, 5, 6)
    return cut.reshape(B, T, H * factor, W * factor, C // factor**2)


def attention_pairs(grid: Size3, pattern: str = "full", *, window: Size3 | None = None) -> int:
    """Query-key pairs of one attention layer over a token grid.

    ``full``: N². ``frame``: each frame alone, t (hw)². ``time``: each place alone, hw t². ``factorised``: both,
    one layer of each. ``block_causal``: a frame sees itself and those before it. ``window``: what lies within
    ``window`` along each axis, of n places with reach r: n (2r + 1) - r (r + 1), and n² where r >= n - 1.
    """
    if pattern == "window" and window is not None:
        reach = [min(r, n - 1) for r, n in zip(window, grid, strict=True)]
        return math.prod(n * (2 * r + 1) - r * (r + 1) for r, n in zip(reach, grid, strict=True))
    t, n = grid[0], grid[1] * grid[2]
    pairs = {
        "full": (t * n) ** 2,
        "frame": t * n**2,
        "time": n * t**2,
        "factorised": t * n**2 + n * t**2,
        "block_causal": n**2 * t * (t + 1) // 2,
    }
    if pattern not in pairs:
        raise ValueError(f"pattern={pattern!r}: expected one of {sorted(pairs)}.")
    return pairs[pattern]


def compression_ratio(video: Size3, latent: Size3, *, latent_channels: int, video_channels: int = 3) -> float:
    """How many values of the video stand behind one value of the latent."""
    return math.prod(video) * video_channels / (math.prod(latent) * latent_channels)


def _check_sides(video: Size3, *, spatial: int, patch: Size3) -> None:
    """Raises ValueError, naming sizes that would do, for sides that are not whole patches of the compressed video."""
    for name, size, p in zip(("height", "width"), video[1:], patch[1:], strict=True):
        unit = spatial * p
        if size < unit or size % unit:
            cut, of = (f" and cut into patches {patch}", unit) if p > 1 else ("", "it")
            raise ValueError(
                f"{name}={size}: space is compressed by {spatial}{cut}, so use a multiple of {of}, "
                f"e.g. {_neighbours(size, unit, 0)}."
            )


def _neighbours(size: int, step: int, offset: int) -> str:
    """The valid sizes (multiples of ``step`` plus ``offset``) just below and above ``size``, for a message."""
    below = (size - offset) // step * step + offset
    smallest = offset or step
    return " or ".join(str(n) for n in (below, below + step) if n >= smallest)
