# SPDX-License-Identifier: Apache-2.0
"""Tiny Wan transformers and what goes into them, the same with PyTorch and without; weights are drawn from names.

Sizes along t, h and w differ, and all widths; a part of each text is zeros, as behind the end of a prompt.
wan_transformer.json has what diffusers makes of them, and names and shapes of the published sizes.
"""

import json
from pathlib import Path

import foreign
import numpy as np

FILE = Path(__file__).parent / "wan_transformer.json"

_TINY = dict(
    num_attention_heads=3,
    attention_head_dim=16,  # of which 8 values turn with the time, 4 with the height, 4 with the width
    in_channels=5,
    out_channels=5,
    text_dim=20,
    freq_dim=32,
    ffn_dim=80,
    num_layers=3,
)
CONFIGS = {  # of diffusers' WanTransformer3DModel
    "t2v": _TINY,
    "i2v": dict(_TINY, in_channels=11, image_dim=28, added_kv_proj_dim=48),
    "ti2v": dict(_TINY, in_channels=7, out_channels=7),
}
_14B = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
PUBLISHED = {  # what their config.json says beyond the class's defaults
    "t2v-1.3b": dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "t2v-14b": _14B,
    "i2v-14b": dict(_14B, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "i2v-a14b": dict(_14B, in_channels=36),
    "ti2v-5b": dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
}
GRID = (3, 4, 2)  # tokens along t, h, w
TIMES = np.array([984.375, 265.625], np.float32)  # of the two clips: thousandths that float32 holds


def inputs(case: str) -> dict[str, np.ndarray]:
    """latent_Bzthw, timestep (B,) or (B, N), text_BSE, and image_BSE where there is one; a probe of the output."""
    config = CONFIGS[case]
    t, h, w = GRID[0], 2 * GRID[1], 2 * GRID[2]
    num_words = 512 if case == "i2v" else 9  # to diffusers what comes before the last 512 is the image
    text_BSE = foreign.inputs("text", (2, num_words, 20))
    text_BSE[0, 6:], text_BSE[1, 3:] = 0, 0
    made = {
        "latent": foreign.inputs("latent", (2, config["in_channels"], t, h, w)),
        "timestep": TIMES,
        "text": text_BSE,
        "probe": foreign.inputs("probe", (2, config["out_channels"], t, h, w)),
    }
    if case == "i2v":
        made["image"] = foreign.inputs("image", (2, 7, 28))
    if case == "ti2v":  # the first latent frame is known
        known = np.arange(GRID[0] * GRID[1] * GRID[2]) < GRID[1] * GRID[2]
        made["timestep"] = np.where(known, np.float32(0), TIMES[:, None])
    return made


def folded(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names and shapes, those of all blocks in one line: "blocks.{30}.ffn.net.2.weight"."""
    found: dict[str, list[int]] = {}
    blocks = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")})
    assert blocks == list(range(len(blocks)))
    for name, shape in shapes.items():
        if not name.startswith("blocks."):
            found[name] = shape
        elif name.startswith("blocks.0."):
            rest = name.removeprefix("blocks.0.")
            assert all(shapes[f"blocks.{i}.{rest}"] == shape for i in blocks)
            found[f"blocks.{{{len(blocks)}}}.{rest}"] = shape
    assert unfolded(found) == shapes
    return found


def unfolded(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The inverse of `folded`."""
    found = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.{"):
            count, rest = name.removeprefix("blocks.{").split("}.", 1)
            found |= {f"blocks.{i}.{rest}": shape for i in range(int(count))}
        else:
            found[name] = shape
    return found


def golden() -> dict:
    return json.loads(FILE.read_text())
