# SPDX-License-Identifier: Apache-2.0
"""Wan's autoencoders in small, the same with PyTorch and without: sizes, inputs, and where what they make is kept.

Height, width and time differ, and all widths that may. Shortcuts (2.2) need widths that divide each other.
"""

import hashlib
import json
import math
from pathlib import Path

import foreign
import numpy as np

FILE = Path(__file__).parent / "wan_autoencoder.json"
FRAMES = (1, 5, 9)
SIZES = {
    "2.1": dict(
        base_dim=4,
        z_dim=5,
        dim_mult=[1, 2, 3, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4, 0.5],
        latents_std=[1.5, 2.5, 0.5, 3.5, 4.5],
    ),
    "2.2": dict(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=7,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7],
        latents_std=[1.5, 2.5, 0.5, 3.5, 4.5, 5.5, 6.5],
    ),
}
FULL = {
    "2.1": {},
    "2.2": dict(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    ),
}


def inputs(version: str, frames: int) -> dict[str, np.ndarray]:
    """A batch of two clips, of latents, and the weights of the sums whose gradients are taken; channels last."""
    z, spatial = SIZES[version]["z_dim"], SIZES[version].get("scale_factor_spatial", 8)
    t, h, w = 1 + (frames - 1) // 4, 2, 3
    shapes = {
        "video": (2, frames, h * spatial, w * spatial, 3),
        "latent": (2, t, h, w, z),
        "weights_encode": (2, t, h, w, 2 * z),
        "weights_decode": (2, frames, h * spatial, w * spatial, 3),
    }
    return {name: foreign.inputs(f"{name} {version}", shape) for name, shape in shapes.items()}


def digest(shapes: dict[str, list[int]]) -> str:
    """Of names and shapes, in any order."""
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def total(shapes: dict[str, list[int]]) -> int:
    """Of all values."""
    return sum(math.prod(shape) for shape in shapes.values())
