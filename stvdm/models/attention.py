# SPDX-License-Identifier: Apache-2.0
"""Attention over space and time: which tokens of a clip may look at which, behind one function.

    out = softmax(q kᵀ / √d) v,   the softmax over the keys that a query may see

Tokens lie on a grid (time, height, width) and are numbered in that order. A pattern says what a query sees:

    full          every token of the clip
    frame         the tokens of its own latent frame      (images side by side: the control without time)
    time          the tokens at its own place, at all times
    window        the tokens within reach along time, height and width
    block_causal  the tokens of its own and of earlier latent frames

Layers that cycle through ("frame", "time") are *factorised* attention (ViViT, arXiv:2103.15691; Latte,
arXiv:2401.03048): far fewer pairs, but two layers before one place can hear of another place at another time.

    out_BNAd = attention(q_BNAd, k_BNAd, v_BNAd, grid=(5, 4, 4), pattern="frame")
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PATTERNS = ("full", "frame", "time", "window", "block_causal")
TEXT_SEES_VIDEO = ("full", "window")

Size3 = tuple[int, int, int]
Keys = tuple[jax.Array, jax.Array, jax.Array | None]  # (k, v, mask): one set of things to look at


def attention(
    q_BNAd: jax.Array,
    k_BNAd: jax.Array,
    v_BNAd: jax.Array,
    *,
    grid: Size3,
    pattern: str = "full",
    window: Size3 | None = None,
    text_kv: tuple[jax.Array, jax.Array] | None = None,
    text_mask_BS: jax.Array | None = None,
) -> jax.Array:
    """Self-attention of video tokens under a pattern: out_BNAd.

    "frame" and "time" fold what is apart into groups and so cost what they should. "window" and "block_causal"
    mask the full product: right, but no cheaper; skipping their empty blocks comes with the kernel backends.

    Args:
      grid: tokens along (time, height, width); their product is N.
      pattern: one of `PATTERNS`.
      window: for "window": how far a query sees along (time, height, width), in tokens; (0, 0, 0) is itself alone.
      text_kv: keys and values (B, S, A, d) of text that every video token sees too, in the same softmax.
      text_mask_BS: True where a text token is real; None: all are.

    Raises:
      ValueError: for an unknown pattern, a grid that does not hold N tokens, or a missing window.
    """
    check_pattern(pattern)
    B, N, A, d = q_BNAd.shape
    frames, height, width = grid
    if math.prod(grid) != N:
        raise ValueError(f"grid={grid}: holds {math.prod(grid)} tokens, but there are {N} queries; pass their grid.")

    # Tokens that never meet go to different groups G; each group is a small full attention of its own.
    def group(x_BNAd: jax.Array) -> jax.Array:
        if pattern == "frame":
            return x_BNAd.reshape(B, frames, height * width, A, d)
        if pattern == "time":
            return x_BNAd.reshape(B, frames, height * width, A, d).swapaxes(1, 2)
        return x_BNAd.reshape(B, 1, N, A, d)

    mask_NN = None
    if pattern == "window":
        mask_NN = _within(grid, window)
    elif pattern == "block_causal":
        frame_N = jnp.arange(N) // (height * width)
        mask_NN = frame_N[:, None] >= frame_N[None, :]

    seen: list[Keys] = [(group(k_BNAd), group(v_BNAd), mask_NN)]
    if text_kv is not None:
        seen.append(_everywhere(*text_kv, text_mask_BS))
    out = _softmax_attention(group(q_BNAd), seen)
    if pattern == "time":
        out = out.swapaxes(1, 2)
    return checkpoint_name(out.reshape(B, N, A, d), "attention")


def text_attention(
    q_BSAd: jax.Array,
    text_kv: tuple[jax.Array, jax.Array],
    video_kv: tuple[jax.Array, jax.Array],
    *,
    pattern: str = "full",
    text_mask_BS: jax.Array | None = None,
) -> jax.Array:
    """What text tokens gather in a joint layer: out_BSAd.

    They see the text and, in the patterns of `TEXT_SEES_VIDEO`, the whole video. In the others they see text only:
    every frame sees the text, so a text that had seen all frames would carry news from one frame to another (in
    "block_causal" even from the future), and the pattern would no longer say what it promises.
    """
    check_pattern(pattern)
    seen = [_everywhere(*text_kv, text_mask_BS)]
    if pattern in TEXT_SEES_VIDEO:
        seen.append(_everywhere(*video_kv, None))
    return checkpoint_name(_softmax_attention(q_BSAd[:, None], seen)[:, 0], "attention")


def cross_attention(
    q_BNAd: jax.Array, k_BSAd: jax.Array, v_BSAd: jax.Array, mask_BS: jax.Array | None = None
) -> jax.Array:
    """Attention of N queries to S keys, True in the mask where a key is real: out_BNAd. No real key gives zeros."""
    out_BGNAd = _softmax_attention(q_BNAd[:, None], [_everywhere(k_BSAd, v_BSAd, mask_BS)])
    return checkpoint_name(out_BGNAd[:, 0], "attention")


def check_pattern(pattern: str) -> None:
    """Raises a ValueError that names near matches if this is not one of `PATTERNS`."""
    if pattern not in PATTERNS:
        near = difflib.get_close_matches(pattern, PATTERNS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PATTERNS)}."
        if pattern == "factorised":
            hint = 'factorised attention is the cycle of layers attention=("frame", "time").'
        raise ValueError(f"attention pattern={pattern!r}: {hint}")


def _within(grid: Size3, window: Size3 | None) -> jax.Array:
    """mask_NN: True where two tokens lie within reach of each other along all three axes."""
    if window is None or len(window) != 3 or min(window) < 0:
        raise ValueError(
            f"window={window}: pattern 'window' needs its reach along (time, height, width), "
            "three numbers of at least 0, e.g. (1, 4, 4)."
        )
    place_3N = jnp.indices(grid).reshape(3, -1)
    distance_3NN = jnp.abs(place_3N[:, :, None] - place_3N[:, None, :])
    return (distance_3NN <= jnp.asarray(window)[:, None, None]).all(axis=0)


def _everywhere(k_BSAd: jax.Array, v_BSAd: jax.Array, mask_BS: jax.Array | None) -> Keys:
    """Keys and values that every group sees, as one group; a mask gets dimensions for groups, heads and queries."""
    return k_BSAd[:, None], v_BSAd[:, None], None if mask_BS is None else mask_BS[:, None, None, None, :]


def _softmax_attention(q_BGnAd: jax.Array, seen: Sequence[Keys]) -> jax.Array:
    """Each query's softmax-weighted mean over all keys of all sets in ``seen``: out_BGnAd.

    A set is (k_BGmAd, v_BGmAd, mask), where G may be 1 (all groups see the same) and the mask broadcasts against
    (B, G, A, n, m). Sets are never concatenated: one may be as long as the video and another shared by all groups.

    This is the one place where faster backends belong: a kernel gives each set's mean and its log-sum-exp, and
    those merge as below. Products are in the inputs' dtype with float32 sums; the softmax is float32.
    """
    # Heads before tokens, once and in the open: XLA's batched products on CPU are twice as fast that way.
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q_BGAnd, scale = q_BGnAd.swapaxes(2, 3), q_BGnAd.shape[-1] ** -0.5
    logits = []
    for k_BGmAd, _, mask in seen:
        x = dot("BGAnd,BGAmd->BGAnm", q_BGAnd, k_BGmAd.swapaxes(2, 3))
        logits.append(x if mask is None else jnp.where(mask, x, -jnp.inf))

    # A row without any key has a maximum of -inf and a sum of 0: both are replaced, so that it gives 0 and not NaN.
    largest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    total, out_BGAnd = jnp.float32(0), jnp.float32(0)
    for x, (_, v_BGmAd, _) in zip(logits, seen, strict=True):
        weight = jnp.exp((x - largest) * scale)  # scaled here, in one pass with the exponential
        total += weight.sum(axis=-1, keepdims=True)
        out_BGAnd += dot("BGAnm,BGAmd->BGAnd", weight.astype(v_BGmAd.dtype), v_BGmAd.swapaxes(2, 3))
    out_BGAnd /= jnp.where(total > 0, total, 1.0)
    return out_BGAnd.swapaxes(2, 3).astype(q_BGnAd.dtype)
