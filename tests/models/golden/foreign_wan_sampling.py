# SPDX-License-Identifier: Apache-2.0
"""Tiny Wan models of every kind and what they are sampled from, the same with PyTorch and without.

wan_sampling.json has what diffusers' schedulers and pipelines make of them.
"""

import json
from pathlib import Path

import foreign
import foreign_wan
import foreign_wan_autoencoder
import numpy as np

FILE = Path(__file__).parent / "wan_sampling.json"

LISTS = ((1, 5.0), (2, 1.0), (4, 3.0), (20, 8.0), (30, 0.5), (40, 12.0), (50, 3.0), (50, 5.0))  # (steps, shift)
MARCHES = ((1, 5.0), (2, 3.0), (3, 1.0), (9, 5.0))
MEAN, STD = 0.7, 0.4  # of Gaussian data, whose velocity is known

_TINY = foreign_wan.CONFIGS["t2v"]
_IMAGE = dict(_TINY, in_channels=14, num_layers=2)  # 5 of noise, 4 of the mask, 5 of the image's latent
KINDS = {  # of diffusers' transformer (or two), of the autoencoder, and what else the pipeline is told
    "t2v": dict(config=dict(_TINY, num_layers=2), coder="2.1", boundary=None),
    "t2v-a14b": dict(config=dict(_TINY, num_layers=2), coder="2.1", boundary=0.875),
    "i2v": dict(config=dict(_IMAGE, image_dim=32, added_kv_proj_dim=48), coder="2.1", boundary=None),
    "i2v-a14b": dict(config=_IMAGE, coder="2.1", boundary=0.9),
    "ti2v": dict(config=dict(foreign_wan.CONFIGS["ti2v"], num_layers=2), coder="2.2", boundary=None),
}
SETTINGS = dict(steps=4, shift=3.0, guidance=2.5, guidance_low=1.5)
FRAMES, LATENT = 9, (3, 4, 6)  # T, and t, h, w


def side(kind: str) -> tuple[int, int]:
    """Height and width of the clips of a kind."""
    spatial = foreign_wan_autoencoder.SIZES[KINDS[kind]["coder"]].get("scale_factor_spatial", 8)
    return LATENT[1] * spatial, LATENT[2] * spatial


def noise(kind: str) -> np.ndarray:
    """Two latents, channels last."""
    return foreign.inputs("noise", (2, *LATENT, KINDS[kind]["config"]["out_channels"]))


def texts(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Of two prompts, and of what guidance leads away from."""
    num_words = 512 if kind == "i2v" else 9  # to diffusers what comes before the last 512 is the image
    prompt, negative = (foreign.inputs(name, (2, num_words, 20)) for name in ("prompt", "negative"))
    prompt[0, 6:], prompt[1, 3:], negative[:, 4:] = 0, 0, 0
    return prompt, negative


def image(kind: str) -> np.ndarray | None:
    """What the clips of a kind begin with."""
    return None if kind.startswith("t2v") else foreign.picture(*side(kind))


def second(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights of the transformer that works at little noise."""
    return {name: foreign.drawn(f"second.{name}", tuple(shape)) for name, shape in shapes.items()}


def march_noise() -> np.ndarray:
    return foreign.inputs("march", (2, 3, 2))


def golden() -> dict:
    return json.loads(FILE.read_text())
