# SPDX-License-Identifier: Apache-2.0
"""Small random networks under foreign names, the same with PyTorch and without: weights are drawn from their names.

Every size differs from every other, and every tensor is random, biases, norms and running averages too: so nothing that
is swapped, turned or left out goes unseen. towers.json holds names, shapes, and what the references make of them.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "towers.json"

CLIP = dict(
    text_config=dict(
        vocab_size=520,
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=19,
        bos_token_id=518,
        eos_token_id=519,
        pad_token_id=519,
    ),
    vision_config=dict(
        hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, image_size=15, patch_size=5
    ),
    projection_dim=20,
)
CAPTIONS = (
    "a red ball bounces to the right",
    "",
    "It's  SNOWING: 2024's 12 \u00e9t\u00e9 caf\u00e9s, \u03a3\u039f\u03a6\u039f\u03a3, \u6771\u4eac!? "
    "(don't) \U0001f680\u00bd x\u0301y",
    "a <|startoftext|> in the middle\tof 'really' long lines that go on and on",
)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a name: of order one at the output of its layer, gains around 1, variances above 0."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    values = random.normal(size=shape)
    if name.endswith("running_var"):
        values = np.exp(0.3 * values)
    elif name == "logit_scale":
        values = np.asarray(1.7)
    elif len(shape) == 1 and name.endswith("weight"):
        values = 1 + 0.2 * values
    elif len(shape) >= 2 and not name.endswith("embedding.weight"):
        values = values / math.sqrt(math.prod(shape[1:]))
    else:
        values = 0.5 * values
    return np.asarray(values, np.float32)


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


def inputs(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def picture(height: int, width: int) -> np.ndarray:
    """A picture with coarse and fine structure, as bytes."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(height * width).integers(0, 60, (height, width, 3))
    waves = [np.sin(x / 3), np.cos(y / 5 + x / 7), np.sin((x * y) / 90)]
    return (np.stack(waves, -1) * 90 + 97 + noise).clip(0, 255).astype(np.uint8)


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary in small: all bytes, all bytes that end a word, four merges, the start and the end."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = [("a", "l"), ("al", "l</w>"), ("t", "h"), ("o", "n</w>"), ("i", "n"), ("r", "i")]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}, merges


def golden() -> dict:
    return json.loads(FILE.read_text())


def shown(array: np.ndarray, most: int = 24) -> dict:
    """An array in a few numbers: its size, and values spread over it."""
    flat = np.asarray(array, np.float64).ravel()
    places = np.unique(np.linspace(0, flat.size - 1, most).astype(int))
    return {
        "shape": list(np.shape(array)),
        "mean": float(flat.mean()),
        "size": float(np.sqrt(np.square(flat).mean())),
        "values": {str(i): float(np.float32(flat[i])) for i in places},
    }


def error(array: np.ndarray, expected: dict) -> float:
    """How far an array is from what is shown of the reference, at worst, in parts of the size of its values."""
    assert list(np.shape(array)) == expected["shape"], (np.shape(array), expected["shape"])
    flat = np.asarray(array, np.float64).ravel()
    apart = [abs(flat[int(i)] - value) for i, value in expected["values"].items()]
    apart += [abs(flat.mean() - expected["mean"]), abs(np.sqrt(np.square(flat).mean()) - expected["size"])]
    return max(apart) / expected["size"]
