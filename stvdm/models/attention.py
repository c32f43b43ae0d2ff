# SPDX-License-Identifier: Apache-2.0
"""Attention over space and time, behind three functions: of video, of video and text together, of video to text.

    out = softmax(q kᵀ / √d) v,   the softmax over the keys that a query may see

What a token of the video sees is its pattern's business (`patterns.Pattern`). Layers that cycle through
("frame", "time") are *factorised* attention (ViViT, arXiv:2103.15691; Latte, arXiv:2401.03048): far fewer pairs, but
two layers before one place can hear of another place at another time.

    out_BNAd = attention(q_BNAd, k_BNAd, v_BNAd, grid=(5, 4, 4), pattern="frame")

Products are in the inputs' dtype with float32 sums; the softmax is float32. On a TPU the kernel is JAX's splash
attention, on an NVIDIA GPU cuDNN's where all tokens that meet see each other, elsewhere and for short sequences blocks
in plain XLA; `context_parallel` says what happens to clips that are split over a mesh.
"""

from __future__ import annotations

import math
import re

import jax

from stvdm import sharding
from stvdm.models.context_parallel import Text, attend
from stvdm.models.patterns import Pattern, Size3

TEXT_SEES_VIDEO = ("full", "window")


def attention(
    q_BNAd: jax.Array,
    k_BNAd: jax.Array,
    v_BNAd: jax.Array,
    *,
    grid: Size3,
    pattern: str = "full",
    window: Size3 | None = None,
) -> jax.Array:
    """Self-attention of video tokens under a pattern: out_BNAd.

    Args:
      grid: tokens along (time, height, width); their product is N.
      pattern: one of `patterns.PATTERNS`.
      window: for "window": how far a query sees along (time, height, width), in tokens; (0, 0, 0) is itself alone.

    Raises:
      ValueError: for an unknown pattern, a grid that does not hold N tokens, or a missing window.
    """
    rule = _rule(q_BNAd, grid, pattern, window)
    return attend(q_BNAd, (k_BNAd, v_BNAd), None, pattern=rule, backend=_backend(q_BNAd))[0]


def joint_attention(
    video_qkv: tuple[jax.Array, jax.Array, jax.Array],
    text_qkv: tuple[jax.Array, jax.Array, jax.Array],
    *,
    grid: Size3,
    pattern: str = "full",
    window: Size3 | None = None,
    text_mask_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Self-attention of video and text in one softmax: (out_BNAd, text_out_BSAd).

    Every video token sees all text beside what its pattern lets it see. Text sees the text and, in the patterns of
    `TEXT_SEES_VIDEO`, the whole video. In the others it sees text only: every frame sees the text, so a text that had
    seen all frames would carry news from one frame to another (in "block_causal" even from the future), and the
    pattern would no longer say what it promises.

    Args:
      video_qkv: queries, keys and values (B, N, A, d).
      text_qkv: queries, keys and values (B, S, A, d).
      text_mask_BS: True where a text token is real; None: all are.
      grid, pattern, window: as of `attention`.
    """
    (q_BNAd, k_BNAd, v_BNAd), (text_q, text_k, text_v) = video_qkv, text_qkv
    rule = _rule(q_BNAd, grid, pattern, window)
    text = Text(text_k, text_v, text_mask_BS, text_q, sees_video=pattern in TEXT_SEES_VIDEO)
    out, text_out = attend(q_BNAd, (k_BNAd, v_BNAd), text, pattern=rule, backend=_backend(q_BNAd))
    assert text_out is not None
    return out, text_out


def cross_attention(
    q_BNAd: jax.Array, k_BSAd: jax.Array, v_BSAd: jax.Array, mask_BS: jax.Array | None = None
) -> jax.Array:
    """Attention of N queries to S keys, True in the mask where a key is real: out_BNAd. No real key gives zeros."""
    return attend(q_BNAd, None, Text(k_BSAd, v_BSAd, mask_BS), backend=_backend(q_BNAd))[0]


def _rule(q_BNAd: jax.Array, grid: Size3, pattern: str, window: Size3 | None) -> Pattern:
    rule = Pattern(pattern, grid, window)
    if math.prod(grid) != q_BNAd.shape[1]:
        raise ValueError(
            f"grid={grid}: holds {math.prod(grid)} tokens, but there are {q_BNAd.shape[1]} queries; pass their grid."
        )
    return rule


def _backend(q_BNAd: jax.Array) -> str:
    """The kernel for the devices that the program is for, which need not be here."""
    platform = sharding.platform()
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and _suits_cudnn(q_BNAd):
        return "cudnn"
    return "xla"


def _suits_cudnn(q_BNAd: jax.Array) -> bool:
    """Whether cuDNN has a kernel for these queries on the GPUs here: NVIDIA's, from Ampere on."""
    capability = re.match(r"(\d+)\.", getattr(jax.local_devices()[0], "compute_capability", ""))
    width = q_BNAd.shape[-1]
    fits = q_BNAd.dtype in ("bfloat16", "float16") and width % 8 == 0 and width <= 128
    return fits and capability is not None and int(capability[1]) >= 8
