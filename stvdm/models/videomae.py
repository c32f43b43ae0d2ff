# SPDX-License-Identifier: Apache-2.0
"""VideoMAE's encoder (Tong et al. 2022, arXiv:2203.12602; v2: Wang et al. 2023, arXiv:2303.16727): a plain transformer
over blocks of 2 frames x 16 x 16 pixels, taught to fill in what is hidden.

    tokens = blocks W + b + sines of their place in the row of all;   hidden = Layers(tokens)
    features = LayerNorm(mean of hidden)

    model, params = judges.videomae("videomae")                              # stvdm.interop.judges
    features_BD = model.apply({"params": params}, prepare(video_BTHWC)).features_BD

Its features are what the content-debiased Frechet video distance looks at (Ge et al. 2024, arXiv:2404.12391), there of
ViT-g, tuned on Something-Something v2, where motion is what matters. It cannot see beyond 16 frames, nor detail that is
lost at 224 pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm.models.transformer import Layers, norm
from stvdm.sharding import partitioned


class Seen(NamedTuple):
    """features_BD: of a clip. hidden_BND: of its tokens, as transformers' last_hidden_state."""

    features_BD: jax.Array
    hidden_BND: jax.Array


class VideoMAE(nn.Module):
    """Clips as `prepare` makes them to `Seen`; sizes are those of ViT-B unless said.

    norm_first: whether the norm comes before the mean over tokens, as in a network that was not tuned to classify.
    """

    num_frames: int = 16
    image_size: int = 224
    tubelet: int = 2  # frames of one token
    patch: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu"
    epsilon: float = 1e-12
    norm_first: bool = False
    last_epsilon: float = 1e-5
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> Seen:
        expected = (self.num_frames, self.image_size, self.image_size)
        if video_BTHWC.shape[1:4] != expected:
            raise ValueError(
                f"clips of (frames, height, width)={video_BTHWC.shape[1:4]}: expected {expected}; `prepare` them."
            )
        block = (self.tubelet, self.patch, self.patch)
        kernel = partitioned(nn.initializers.lecun_normal(), None, None, None, None, "width")
        x = nn.Conv(self.width, block, block, padding="VALID", dtype=self.dtype, kernel_init=kernel, name="patches")(
            video_BTHWC
        )
        x_BND = x.reshape(x.shape[0], -1, self.width).astype(jnp.float32)
        layers = Layers(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            activation=self.activation,
            epsilon=self.epsilon,
            key_bias=False,
            dtype=self.dtype,
            name="layers",
        )
        hidden_BND = layers(x_BND + sines(x_BND.shape[1], self.width))[-1]
        last = norm("norm", self.last_epsilon)
        if self.norm_first:
            hidden_BND = last(hidden_BND)
            return Seen(hidden_BND.mean(axis=1), hidden_BND)
        return Seen(last(hidden_BND.mean(axis=1)), hidden_BND)


def sines(num: int, width: int) -> np.ndarray:
    """(num, width): sin and cos by turns of place / 10000^(2i / width), as Vaswani et al. 2017 have them."""
    turns = np.arange(num)[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)
    return np.where(np.arange(width) % 2, np.cos(turns), np.sin(turns)).astype(np.float32)


def prepare(video_BTHWC: Any, *, num_frames: int = 16, size: int = 224) -> jax.Array:
    """Bytes to [0, 1] at ``size`` x ``size``, each of the first ``num_frames`` frames stretched bilinearly.

    So does the published code of the content-debiased distance: the colours are not normalised further, though the
    network's training did so.

    Raises:
      ValueError: for clips with fewer frames.
    """
    B, T, _, _, C = video_BTHWC.shape
    if num_frames > T:
        raise ValueError(f"clips of {T} frames: VideoMAE looks at {num_frames}, so make longer ones.")
    x = jnp.asarray(video_BTHWC[:, :num_frames]).astype(jnp.float32) / 255
    return jax.image.resize(x, (B, num_frames, size, size, C), "linear", antialias=False)
