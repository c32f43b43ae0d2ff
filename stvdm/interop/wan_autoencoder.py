# SPDX-License-Identifier: Apache-2.0
"""Wan's autoencoders, of 2.1 (4x8x8) and of 2.2's 5B model (4x16x16), under either of their names, in and out.

    model, params, statistics = wan_autoencoder.load("Wan2.1-T2V-1.3B-Diffusers")
    tensors = wan_autoencoder.exported(model, params, "original")

They are `Autoencoder`s; between theirs and ours lie names and layouts, and no arithmetic. `pairs` has both, for
diffusers' ``AutoencoderKLWan`` and for the original checkpoints (Wan2.1_VAE.pth, Wan2.2_VAE.pth, saved as safetensors).
Of layouts: kernels are (out, in, *space), and those that see one frame have no axis for time; gains of norms have axes
of size 1 behind their channels; a square of pixels that became channels runs over (channel, column, row), here over
(row, column, channel).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from stvdm import tensor_files
from stvdm.interop import mapping, weights
from stvdm.interop.mapping import Pair
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.tensor_files import Shape

Tree = Any
Layout = Literal["diffusers", "original"]

WAN_2_1 = Autoencoder()
WAN_2_2 = Autoencoder(
    latent_channels=48,
    width=160,
    unshuffle=2,
    shortcuts=True,
    last_shortcut=True,
    upsampling_halves=False,
    decoder_width=256,
)
# What their authors normalise latents by (wan/modules/vae.py of Wan 2.1, vae2_2.py of Wan 2.2), by latent channels.
_MEANS = {
    16: """-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497
        0.2503 -0.2921""",
    48: """-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098
        0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567
        -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957
        0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667""",
}
_DEVIATIONS = {
    16: """2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251
        1.9160""",
    48: """0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454
        0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999
        0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444
        0.4089 0.7468 0.7744""",
}


class Loaded(NamedTuple):
    """An autoencoder with its weights, and its latents' {"mean_z", "std_z"}."""

    model: Autoencoder
    params: Tree
    statistics: dict[str, np.ndarray]


class Opened(NamedTuple):
    """An autoencoder in foreign files, all of whose tensors have been found right by their headers."""

    model: Autoencoder
    pairs: list[Pair]
    source: weights.Weights
    statistics: dict[str, np.ndarray]

    @property
    def part(self) -> weights.Part:
        return weights.of_theirs(self.pairs, self.source.read)


def opened(place: epath.PathLike) -> Opened:
    """The autoencoder in a safetensors file, a folder of them, or the ``vae`` of a model; nothing is read yet.

    Its sizes are those of the config.json of diffusers beside it; without one, those of Wan 2.1 or 2.2.

    Raises:
      ValueError: for weights of another network, sizes that are not Wan's, or pickles.
      FileNotFoundError: if there are no weights.
    """
    path = epath.Path(place).expanduser()
    path = path / "vae" if (path / "vae").is_dir() else path
    source = weights.Weights(path)
    config = mapping.settings(path if path.is_dir() else path.parent)
    model = model_of(config) if "base_dim" in config else _published(source.shapes)
    found = pairs(model, layout_of(source.shapes))
    mapping.agree(found, source.shapes)
    return Opened(model, found, source, statistics_of(config, model.latent_channels))


def load(place: epath.PathLike) -> Loaded:
    """The autoencoder that `opened` finds, in the host's memory."""
    source = opened(place)
    return Loaded(source.model, weights.fill(shapes(source.model), source.part), source.statistics)


def save(
    folder: epath.PathLike,
    model: Autoencoder,
    part: weights.Part,
    statistics: Mapping[str, np.ndarray],
    layout: Layout,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> None:
    """Writes config.json and safetensors, as diffusers' folder of a ``vae`` has them, or under the authors' names.

    Raises:
      ValueError: if the network has what Wan's has not.
    """
    config, stem = config_of(model, statistics), stem_of(model, layout)
    tensor_files.write(folder, weights.theirs(pairs(model, layout), part), stem=stem, dtype=dtype)
    if jax.process_index() == 0:
        (epath.Path(folder).expanduser() / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stem_of(model: Autoencoder, layout: Layout) -> str:
    """Of the files of weights."""
    return "diffusion_pytorch_model" if layout == "diffusers" else f"Wan2.{2 if model.shortcuts else 1}_VAE"


# ---- sizes ----------------------------------------------------------------------------------------------------------


def model_of(config: Mapping[str, Any]) -> Autoencoder:
    """The network of the config.json of an ``AutoencoderKLWan``; what is not said there is as in Wan 2.1.

    Raises:
      ValueError: if it has what no published Wan has.
    """
    residual, patch = config.get("is_residual", False), config.get("patch_size") or 1
    multipliers = tuple(config.get("dim_mult", (1, 2, 4, 4)))
    width, pixels = config.get("base_dim", 96), 3 * patch**2
    decoder_width = config.get("decoder_base_dim") or width
    for name, expected in (
        ("attn_scales", []),
        ("dim_mult", [1, *multipliers[1:]]),
        ("in_channels", pixels),
        ("out_channels", pixels),
    ):
        got = config.get(name, expected)
        if (list(got) if isinstance(got, tuple) else got) != expected:
            raise ValueError(f"{name}={got!r}: expected {expected!r}, which all published autoencoders of Wan have.")
    return Autoencoder(
        latent_channels=config.get("z_dim", 16),
        width=width,
        multipliers=multipliers,
        num_res_blocks=config.get("num_res_blocks", 2),
        spatial_down=(True,) * (len(multipliers) - 1),
        temporal_down=tuple(config.get("temperal_downsample", (False, True, True))),  # so spelt
        unshuffle=patch,
        shortcuts=residual,
        last_shortcut=residual,
        upsampling_halves=not residual,
        decoder_width=0 if decoder_width == width else decoder_width,
    )


def config_of(model: Autoencoder, statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config.json of diffusers for this network: the inverse of `model_of` and `statistics_of`.

    Raises:
      ValueError: if the network has what Wan's has not.
    """
    residual = model.shortcuts
    wanted = model.copy(
        spatial_down=(True,) * len(model.temporal_down),
        convolution="full",
        grouping="causal",
        last_shortcut=residual,
        upsampling_halves=not residual,
        middle_attention=True,
        video_channels=3,
        multipliers=(1, *model.multipliers[1:]),
    )
    problems = [
        f"{name}={_plain(getattr(model, name))!r}, expected {_plain(getattr(wanted, name))!r}"
        for name in wanted.__dataclass_fields__
        if name not in ("parent", "name") and _plain(getattr(model, name)) != _plain(getattr(wanted, name))
    ]
    if problems:
        raise ValueError("this autoencoder has not Wan's shape, so nobody's code would load it: " + "; ".join(problems))
    pixels = 3 * model.unshuffle**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": model.width,
        "decoder_base_dim": model.decoder_width or model.width,
        "z_dim": model.latent_channels,
        "dim_mult": list(model.multipliers),
        "num_res_blocks": model.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(model.temporal_down),
        "dropout": 0.0,
        "is_residual": residual,
        "in_channels": pixels,
        "out_channels": pixels,
        "patch_size": model.unshuffle if model.unshuffle > 1 else None,
        "scale_factor_temporal": model.temporal,
        "scale_factor_spatial": model.spatial,
        "latents_mean": _decimals(statistics["mean_z"]),
        "latents_std": _decimals(statistics["std_z"]),
    }


def statistics_of(config: Mapping[str, Any], latent_channels: int) -> dict[str, np.ndarray]:
    """{"mean_z", "std_z"} that a config.json says, else those published for so many latent channels."""
    found = {}
    for ours, theirs, published in (("mean_z", "latents_mean", _MEANS), ("std_z", "latents_std", _DEVIATIONS)):
        values = config.get(theirs) or [float(word) for word in published.get(latent_channels, "").split()]
        if len(values) != latent_channels:
            raise ValueError(
                f"{theirs} has {len(values)} entries, expected one for each of {latent_channels} channels."
            )
        found[ours] = np.asarray(values, np.float32)
    return found


def _published(found: Mapping[str, Shape]) -> Autoencoder:
    sizes = {model.latent_channels: model for model in (WAN_2_1, WAN_2_2)}
    last = next((found[name][0] for name in ("conv2.bias", "post_quant_conv.bias") if name in found), None)
    if last not in sizes:
        raise ValueError(
            "there is no config.json of AutoencoderKLWan beside these weights, and they are neither Wan 2.1's nor "
            f"2.2's: expected conv2.bias of {' or '.join(map(str, sizes))} values, got "
            f"{'none' if last is None else last}."
        )
    return sizes[last]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _decimals(values: np.ndarray) -> list[float]:
    """Float32 values as the shortest decimals that mean them, as they were written."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]


# ---- weights --------------------------------------------------------------------------------------------------------


def layout_of(names: Mapping[str, Any]) -> Layout:
    """Whose names these are."""
    return "original" if "conv1.weight" in names else "diffusers"


def pairs(model: Autoencoder, layout: Layout) -> list[Pair]:
    """Every tensor of a layout, and the parameter that it is; no memory is needed."""

    def one(path: str, shape: Shape) -> Pair:
        lies = mapping.Layout(lambda x: _to_ours(model, path, x), lambda x: _to_theirs(model, path, x))
        there = lies.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
        return Pair(_name(model, layout, path), there, path, None, lies)

    return [one(path, leaf.shape) for path, leaf in traverse_util.flatten_dict(shapes(model), sep="/").items()]


def imported(model: Autoencoder, source: Mapping[str, np.ndarray]) -> Tree:
    """Its parameters, of tensors under either layout's names; `mapping.agree` says what does not fit."""
    found = pairs(model, layout_of(source))
    mapping.agree(found, {name: array.shape for name, array in source.items()})
    return weights.fill(shapes(model), weights.of_theirs(found, source.__getitem__))


def exported(model: Autoencoder, params: Tree, layout: Layout) -> dict[str, np.ndarray]:
    """The parameters under a layout's names: the inverse of `imported`."""
    part = weights.of_tree(params)
    return {
        pair.theirs: np.ascontiguousarray(pair.layout.to_theirs(part(pair.ours, None))) for pair in pairs(model, layout)
    }


@functools.cache
def shapes(model: Autoencoder) -> Tree:
    """Shapes of all its parameters."""
    video = jax.ShapeDtypeStruct((1, 1, model.spatial, model.spatial, model.video_channels), jnp.float32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), video))["params"]


# Our layers and their names in the layouts. "{i}" is a stage, "{j}" a block of it, "{n}" a block counted through all.
_LAYERS: dict[str, dict[Layout, str]] = {
    "quant": {"diffusers": "quant_conv", "original": "conv1"},
    "post_quant": {"diffusers": "post_quant_conv", "original": "conv2"},
    "conv_in": {"diffusers": "conv_in", "original": "conv1"},
    "middle/block_0": {"diffusers": "mid_block.resnets.0", "original": "middle.0"},
    "middle/attention": {"diffusers": "mid_block.attentions.0", "original": "middle.1"},
    "middle/block_1": {"diffusers": "mid_block.resnets.1", "original": "middle.2"},
    "norm_out": {"diffusers": "norm_out", "original": "head.0"},
    "conv_out": {"diffusers": "conv_out", "original": "head.2"},
    "norm_0": {"diffusers": "norm1", "original": "residual.0"},
    "conv_0": {"diffusers": "conv1", "original": "residual.2"},
    "norm_1": {"diffusers": "norm2", "original": "residual.3"},
    "conv_1": {"diffusers": "conv2", "original": "residual.6"},
    "shortcut": {"diffusers": "conv_shortcut", "original": "shortcut"},
    "norm": {"diffusers": "norm", "original": "norm"},
    "qkv": {"diffusers": "to_qkv", "original": "to_qkv"},
    "out": {"diffusers": "proj", "original": "proj"},
    "space": {"diffusers": "resample.1", "original": "resample.1"},
    "time": {"diffusers": "time_conv", "original": "time_conv"},
}
_STAGES: dict[tuple[Layout, bool, str], tuple[str, str]] = {  # a stage's blocks; what changes its size behind them
    # (layout, with shortcuts, half)
    ("diffusers", False, "encoder"): ("down_blocks.{n}", "down_blocks.{n}"),
    ("diffusers", True, "encoder"): ("down_blocks.{i}.resnets.{j}", "down_blocks.{i}.downsampler"),
    ("diffusers", False, "decoder"): ("up_blocks.{i}.resnets.{j}", "up_blocks.{i}.upsamplers.0"),
    ("diffusers", True, "decoder"): ("up_blocks.{i}.resnets.{j}", "up_blocks.{i}.upsampler"),
    ("original", False, "encoder"): ("downsamples.{n}", "downsamples.{n}"),
    ("original", True, "encoder"): ("downsamples.{i}.downsamples.{j}", "downsamples.{i}.downsamples.{j}"),
    ("original", False, "decoder"): ("upsamples.{n}", "upsamples.{n}"),
    ("original", True, "decoder"): ("upsamples.{i}.upsamples.{j}", "upsamples.{i}.upsamples.{j}"),
}
_PATH = re.compile(
    r"(?:(?P<half>encoder|decoder)/)?"
    r"(?:stage_(?P<i>\d+)/(?:block_(?P<j>\d+)/)?|(?P<middle>middle/\w+)/)?"
    r"(?P<layer>\w+)/(?P<leaf>kernel|bias|gamma)"
)


def _name(model: Autoencoder, layout: Layout, path: str) -> str:
    found = _PATH.fullmatch(path)
    assert found, path
    half, i, j = found["half"], found["i"], found["j"]
    words = [half] if half else []
    if i is not None:
        num_blocks = model.num_res_blocks + (half == "decoder")
        place = num_blocks if j is None else int(j)
        form = _STAGES[layout, model.shortcuts, half][j is None]
        words.append(form.format(i=i, j=place, n=int(i) * (num_blocks + 1) + place))
    elif found["middle"]:
        words.append(_LAYERS[found["middle"]][layout])
    return ".".join([*words, _LAYERS[found["layer"]][layout], found["leaf"].replace("kernel", "weight")])


_OF_ONE_FRAME = ("/space/kernel", "/qkv/kernel", "/out/kernel")


def _to_ours(model: Autoencoder, path: str, array: np.ndarray) -> np.ndarray:
    """A tensor of theirs as our parameter."""
    if path.endswith("/gamma"):
        return array.reshape(-1)
    if path.endswith(_OF_ONE_FRAME):
        array = array[:, :, None]
    axis = _axis_of_pixels(path)
    if axis is not None:
        array = np.take(array, _order(model), axis)
    return mapping.turned(array) if path.endswith("/kernel") else array


def _to_theirs(model: Autoencoder, path: str, array: Any) -> np.ndarray:
    """The inverse of `_to_ours`."""
    array = np.asarray(array)
    if path.endswith("/gamma"):
        return array.reshape(-1, *(1,) * (2 if path.endswith("attention/norm/gamma") else 3))
    if path.endswith("/kernel"):
        array = np.transpose(array, (4, 3, 0, 1, 2))
    if path.endswith(_OF_ONE_FRAME):
        return array[:, :, 0]
    axis = _axis_of_pixels(path)
    return array if axis is None else np.take(array, np.argsort(_order(model)), axis)


def _axis_of_pixels(path: str) -> int | None:
    """The axis of a tensor of theirs that runs over the pixels of a square."""
    return {"encoder/conv_in/kernel": 1, "decoder/conv_out/kernel": 0, "decoder/conv_out/bias": 0}.get(path)


def _order(model: Autoencoder) -> np.ndarray:
    """Which of their channels each of ours is, in a square of pixels."""
    theirs = np.arange(model.video_channels * model.unshuffle**2)
    return theirs.reshape(model.video_channels, model.unshuffle, model.unshuffle).transpose(2, 1, 0).reshape(-1)
