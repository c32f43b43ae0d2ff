# SPDX-License-Identifier: Apache-2.0
"""I3D (Carreira & Zisserman 2017, arXiv:1705.07750): Inception-v1 with its kernels inflated over time; its logits on
Kinetics-400 are what the Frechet video distance looks at (Unterthiner et al. 2018, arXiv:1812.01717).

    unit = relu(norm(conv(x)));   convolutions and pools are padded as "SAME": inputs / stride, rounded up, come out
    stem: 7x7x7 /2 · pool 1x3x3 /(1,2,2) · 1x1x1 · 3x3x3 · pool · 2 blocks · pool 3x3x3 /2 · 5 blocks · pool 2x2x2 /2 ·
    2 blocks · mean over 2x7x7 · 1x1x1 to logits · mean over time

    model, params = judges.i3d("i3d")                                       # stvdm.interop.judges
    features_BD = model.apply({"params": params}, prepare(video_BTHWC))     # 400 of each clip

It cannot see much of time: what Kinetics' actions are is seen in single frames, so that the distance forgives broken
motion sooner than a little blur (Ge et al. 2024, arXiv:2404.12391). Weights are used as they are: norms stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from stvdm.models.causal_conv import Triple
from stvdm.sharding import partitioned

# Output channels of a block's branches: 1x1; 1x1 before 3x3; 3x3; the same again, thinner; 1x1 after the pool. Table of
# GoogLeNet (Szegedy et al. 2014, arXiv:1409.4842, table 1).
BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOL_BEFORE: dict[str, tuple[Triple, Triple]] = {  # block -> window and stride of the pool before it
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
SIZE = 224  # pixels along height and width
LEAST_FRAMES = 9  # so that 2 are left for the last mean


class I3D(nn.Module):
    """Clips in [-1, 1] of `SIZE` x `SIZE` and at least 9 frames to logits (B, num_classes)."""

    num_classes: int = 400
    stem: tuple[int, int, int] = (64, 64, 192)
    blocks: Sequence[tuple[str, tuple[int, ...]]] = tuple(BLOCKS.items())
    last_pool: Triple = (2, 7, 7)

    @nn.compact
    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = Unit(self.stem[0], (7, 7, 7), (2, 2, 2), name="Conv3d_1a_7x7")(video_BTHWC)
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit(self.stem[1], name="Conv3d_2b_1x1")(x)
        x = Unit(self.stem[2], (3, 3, 3), name="Conv3d_2c_3x3")(x)
        for name, widths in self.blocks:
            if name in _POOL_BEFORE:
                x = _pool(x, *_POOL_BEFORE[name])
            x = Block(tuple(widths), name=name)(x)
        if any(have < need for have, need in zip(x.shape[1:4], self.last_pool, strict=True)):
            raise ValueError(
                f"clips of (frames, height, width)={video_BTHWC.shape[1:4]}: I3D is left with {x.shape[1:4]} of them, "
                f"expected at least {self.last_pool}; use {SIZE}x{SIZE} pixels and {LEAST_FRAMES} frames or more."
            )
        x = nn.avg_pool(x, self.last_pool, padding="VALID")
        kernel = partitioned(nn.initializers.lecun_normal(), None, None, None, None, "channels")
        logits = nn.Conv(self.num_classes, (1, 1, 1), kernel_init=kernel, name="logits")(x)
        return logits.mean(axis=(1, 2, 3))


class Block(nn.Module):
    """Four branches over the same input, side by side in channels."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.widths
        return jnp.concatenate(
            [
                Unit(w[0], name="b0")(x),
                Unit(w[2], (3, 3, 3), name="b1b")(Unit(w[1], name="b1a")(x)),
                Unit(w[4], (3, 3, 3), name="b2b")(Unit(w[3], name="b2a")(x)),
                Unit(w[5], name="b3b")(_pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            axis=-1,
        )


class Unit(nn.Module):
    """relu(norm(conv(x))), the norm by running averages: (x - mean) / √(var + 0.001) scale + bias."""

    width: int
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.lecun_normal(), None, None, None, None, "channels")
        conv = nn.Conv(
            self.width, self.kernel, self.stride, padding="SAME", use_bias=False, kernel_init=init, name="conv"
        )
        return nn.relu(Norm(name="bn")(conv(x)))


class Norm(nn.Module):
    """Batch norm as it stands after training."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        mean, var, scale, bias = (
            jnp.asarray(self.param(name, partitioned(init, "channels"), (x.shape[-1],)))
            for name, init in (("mean", zeros), ("var", ones), ("scale", ones), ("bias", zeros))
        )
        return (x - mean) * (lax.rsqrt(var + 1e-3) * scale) + bias


def prepare(video_BTHWC: Any, size: int = SIZE) -> jax.Array:
    """Bytes to [-1, 1] at ``size`` x ``size``, each frame stretched to it bilinearly without smoothing.

    So does the PyTorch code that FVD is reported by today (F.interpolate, align_corners=False); TensorFlow's first FVD
    placed pixels half a pixel apart from this, and its numbers differ a little.
    """
    B, T, _, _, C = video_BTHWC.shape
    x = jnp.asarray(video_BTHWC).astype(jnp.float32)
    return jax.image.resize(x, (B, T, size, size, C), "linear", antialias=False) / 127.5 - 1


def _pool(x: jax.Array, window: Triple, stride: Triple) -> jax.Array:
    """The largest of each window; the padding never wins."""
    return nn.max_pool(x, window, stride, padding="SAME")
