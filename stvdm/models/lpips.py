# SPDX-License-Identifier: Apache-2.0
"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): how unlike two images look, by features of AlexNet or VGG16 whose weight
was fitted to people's judgement.

    d(x, y) = sum over five layers l of the mean over places of  w_l · (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)²

    model, params = judges.lpips("lpips")                           # stvdm.interop.judges
    distance_B = model.apply({"params": params}, x_BHWC, y_BHWC)    # images in [-1, 1]

0 for equal images. It cannot see time: of a clip it is the mean over frames, so that flicker costs what it costs each
frame. Images much smaller than the 64 pixels it was fitted on leave the deep layers a single place.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from stvdm.sharding import partitioned

# Convolutions by their number in torchvision: (number, width, kernel, stride, padding); "pool"; "tap": a layer is read.
Step = tuple[int, int, int, int, int] | str
ALEX: tuple[Step, ...] = (
    *((0, 64, 11, 4, 2), "tap", "pool"),
    *((3, 192, 5, 1, 2), "tap", "pool"),
    *((6, 384, 3, 1, 1), "tap"),
    *((8, 256, 3, 1, 1), "tap"),
    *((10, 256, 3, 1, 1), "tap"),
)
VGG16: tuple[Step, ...] = (
    *((0, 64, 3, 1, 1), (2, 64, 3, 1, 1), "tap", "pool"),
    *((5, 128, 3, 1, 1), (7, 128, 3, 1, 1), "tap", "pool"),
    *((10, 256, 3, 1, 1), (12, 256, 3, 1, 1), (14, 256, 3, 1, 1), "tap", "pool"),
    *((17, 512, 3, 1, 1), (19, 512, 3, 1, 1), (21, 512, 3, 1, 1), "tap", "pool"),
    *((24, 512, 3, 1, 1), (26, 512, 3, 1, 1), (28, 512, 3, 1, 1), "tap"),
)
POOLS = {"alex": 3, "vgg": 2}  # windows, at stride 2
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the published code, for images in [-1, 1]


class LPIPS(nn.Module):
    """Pairs of images in [-1, 1], (B, H, W, 3), to their distance (B,)."""

    trunk: Sequence[Step] = ALEX
    pool: int = 3

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
        if x_BHWC.shape != y_BHWC.shape or x_BHWC.shape[-1] != 3:
            raise ValueError(f"images of {x_BHWC.shape} and {y_BHWC.shape}: expected pairs of (height, width, 3).")
        pair = (jnp.concatenate([x_BHWC, y_BHWC]) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        distance_B, number = jnp.zeros(len(x_BHWC)), 0
        for step in self.trunk:
            if isinstance(step, tuple):
                place, width, kernel, stride, padding = step
                init = partitioned(nn.initializers.lecun_normal(), None, None, None, "channels")
                conv = nn.Conv(
                    width, (kernel, kernel), (stride, stride), padding=padding, kernel_init=init, name=f"conv_{place}"
                )
                pair = nn.relu(conv(pair))
            elif step == "tap":
                x, y = jnp.split(_unit(pair), 2)
                ones = partitioned(nn.initializers.ones, None, None, "channels", None)
                weigh = nn.Conv(1, (1, 1), use_bias=False, kernel_init=ones, name=f"weight_{number}")
                distance_B += jnp.mean(weigh(jnp.square(x - y)), axis=(1, 2, 3))
                number += 1
            else:
                if min(pair.shape[1:3]) < self.pool:
                    raise ValueError(f"images of {x_BHWC.shape[1:3]}: too small for this network; use 32x32 or more.")
                pair = nn.max_pool(pair, (self.pool, self.pool), (2, 2), padding="VALID")
        return distance_B


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)) + 1e-10)
