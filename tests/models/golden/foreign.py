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
T5 = dict(
    vocab_size=67,
    d_model=24,
    d_kv=6,
    d_ff=40,
    num_layers=3,
    num_heads=5,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=20,
    feed_forward_proj="gated-gelu",
)
T5_KINDS = {  # what a folder's config.json says
    "umt5": T5 | dict(model_type="umt5"),
    "t5": T5 | dict(model_type="t5"),  # as v1.1
    "t5_first": T5 | dict(model_type="t5", feed_forward_proj="relu"),
}
T5_LENGTHS = (23, 9)  # real tokens of two captions; the longer reaches beyond the largest distance
VIDEOMAE = dict(
    image_size=15,
    patch_size=5,
    num_frames=4,
    tubelet_size=2,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=72,
)
I3D = dict(
    num_classes=11,
    stem=(5, 6, 7),
    blocks=(
        ("Mixed_3b", (2, 3, 4, 5, 6, 7)),
        ("Mixed_3c", (7, 6, 5, 4, 3, 2)),
        ("Mixed_4b", (3, 2, 6, 4, 5, 8)),
        ("Mixed_5b", (4, 5, 3, 2, 7, 6)),
        ("Mixed_5c", (8, 2, 3, 5, 4, 7)),
    ),
    last_pool=(2, 2, 3),
)
LPIPS_TRUNKS = {
    "alex": ((0, 4, 11, 4, 2), "tap", "pool", (3, 6, 5, 1, 2), "tap", "pool", (6, 7, 3, 1, 1), "tap"),
    "vgg": ((0, 4, 3, 1, 1), (2, 5, 3, 1, 1), "tap", "pool", (5, 6, 3, 1, 1), (7, 8, 3, 1, 1), "tap"),
}
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
    elif (len(shape) == 1 and name.endswith("weight")) or name.endswith("gamma"):
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


def t5_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of two captions."""
    random = np.random.default_rng(5)
    tokens = random.integers(3, T5["vocab_size"], (len(T5_LENGTHS), max(T5_LENGTHS)))
    mask = np.arange(max(T5_LENGTHS)) < np.asarray(T5_LENGTHS)[:, None]
    return np.where(mask, tokens, 0), mask


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


def pieces() -> list[tuple[str, float]]:
    """A unigram model in small, as T5's: padding, end, unknown, some letters, and what is likelier than its letters."""
    longer = {"▁a": -2.0, "▁red": -4.5, "▁ball": -4.0, "al": -3.5, "all": -3.9, "ball": -5.1, "▁b": -3.0, "▁to": -3.2}
    letters = {letter: -5.0 - 0.01 * i for i, letter in enumerate("▁abcdefghilnorstu'é1&")}
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters.items(), *longer.items()]


def num_parameters(shapes: dict) -> int:
    """How many values a nested dict of shapes holds."""
    return sum(num_parameters(leaf) if isinstance(leaf, dict) else math.prod(leaf.shape) for leaf in shapes.values())


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


def apart(one: object, other: object) -> float:
    """How far what is shown of two runs is apart, at worst, in parts of the size of each output; the rest is equal."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        assert one == other
        return 0.0
    assert one.keys() == other.keys()
    if "values" in one:
        assert (one["shape"], one["values"].keys()) == (other["shape"], other["values"].keys())
        gaps = [abs(value - other["values"][place]) for place, value in one["values"].items()]
        return max([*gaps, abs(one["mean"] - other["mean"])]) / other["size"]
    return max([0.0, *(apart(one[name], other[name]) for name in one)])
