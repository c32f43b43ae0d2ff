# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2's transformers: their configs and their weights, in both formats, in and out.

    dit, params = wan.load("Wan2.1-T2V-1.3B-Diffusers/transformer", mesh=mesh)      # either format, onto a mesh
    wan.save("OUT", dit, weights.of_tree(params), "original", dtype="bfloat16")

Whole models, with what belongs to them, are `interop.wan_model`'s.

The model is `models.dit.DiT` itself, in "adaln_zero" and "cross". Its conventions are Wan's in all that numbers see:
neighbouring pairs turn, a head is shared out 44/42/42 of 128, a patch has its channels last on the way out, rows of
modulation are shift, scale, gate, and velocity is noise - data with 1 as noise. Thus what is left to cross is names,
the turn of kernels, a leading dimension of tables, and the patches on the way in, which are a convolution there.

Of time: theirs runs from 0 to 1000, ours from 0 to 1, and `models.embeddings` multiplies by as much.

Of text: Wan reads all 512 places, those behind the words' end as zeros. So its text_mask_BS is None, and text_BSE is 0
where a mask would be False.

| | diffusers | the authors' | here |
|---|---|---|---|
| a projection | ``blocks.0.attn1.to_q.weight`` | ``blocks.0.self_attn.q.weight`` | ``self_attention/query/kernel`` |
| norm before cross-attention | ``norm2`` | ``norm3`` | ``cross_norm`` |
| a transformer alone | ``transformer`` | the folder itself | ``dit`` |
| Wan 2.2 A14B's, at much noise | ``transformer`` | ``high_noise_model`` | ``dit_high_noise`` |
| at little | ``transformer_2`` | ``low_noise_model`` | ``dit_low_noise`` |

Sources: diffusers' WanTransformer3DModel; wan/modules/model.py of github.com/Wan-Video/Wan2.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from stvdm import sharding, tensor_files
from stvdm.interop import mapping, weights
from stvdm.interop.mapping import AS_IS, KERNEL, ROWS, Layout, Pair, Rule, pairs_of
from stvdm.models.block import EPSILON
from stvdm.models.dit import SIZES, DiT

Tree = Any
Format = Literal["diffusers", "original"]

MODELS: dict[str, dict[str, Any]] = {  # fields of DiT                                                     parameters
    "t2v-1.3b": dict(SIZES["wan-1.3b"], latent_channels=16, text_width=4096),  # 1.419 B
    "t2v-14b": dict(SIZES["wan-14b"], latent_channels=16, text_width=4096),  # 14.288 B; twice in Wan 2.2 T2V-A14B
    "i2v-14b": dict(SIZES["wan-14b"], latent_channels=16, extra_channels=20, text_width=4096, image_width=1280),
    "i2v-a14b": dict(
        SIZES["wan-14b"], latent_channels=16, extra_channels=20, text_width=4096
    ),  # twice, no image tokens
    "ti2v-5b": dict(SIZES["wan-5b"], latent_channels=48, text_width=4096),  # 5.000 B
}

_OUTSIDE = (  # ours, diffusers', the authors'
    ("patch/linear", "patch_embedding", "patch_embedding"),
    ("text_in", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text_out", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("time_in", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time_out", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time_modulation", "condition_embedder.time_proj", "time_projection.1"),
    ("image/norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image/linear_in", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image/linear_out", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("image/norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("head/linear", "proj_out", "head.head"),
)
_INSIDE = (  # of a block
    ("self_attention/query", "attn1.to_q", "self_attn.q"),
    ("self_attention/key", "attn1.to_k", "self_attn.k"),
    ("self_attention/value", "attn1.to_v", "self_attn.v"),
    ("self_attention/out", "attn1.to_out.0", "self_attn.o"),
    ("self_attention/query_norm", "attn1.norm_q", "self_attn.norm_q"),
    ("self_attention/key_norm", "attn1.norm_k", "self_attn.norm_k"),
    ("cross_norm", "norm2", "norm3"),
    ("cross_attention/query", "attn2.to_q", "cross_attn.q"),
    ("cross_attention/key", "attn2.to_k", "cross_attn.k"),
    ("cross_attention/value", "attn2.to_v", "cross_attn.v"),
    ("cross_attention/out", "attn2.to_out.0", "cross_attn.o"),
    ("cross_attention/query_norm", "attn2.norm_q", "cross_attn.norm_q"),
    ("cross_attention/key_norm", "attn2.norm_k", "cross_attn.norm_k"),
    ("cross_attention/image_key", "attn2.add_k_proj", "cross_attn.k_img"),
    ("cross_attention/image_value", "attn2.add_v_proj", "cross_attn.v_img"),
    ("cross_attention/image_key_norm", "attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("mlp_in", "ffn.net.0.proj", "ffn.0"),
    ("mlp_out", "ffn.net.2", "ffn.2"),
)
_TABLES = (("head_modulation", "scale_shift_table", "head.modulation"),)
_TABLES_INSIDE = (("modulation", "scale_shift_table", "modulation"),)
_WORDS = (("kernel", "weight", KERNEL), ("scale", "weight", AS_IS), ("bias", "bias", AS_IS))

STACKED = "layers"  # the scanned layers of a DiT
STEM = "diffusion_pytorch_model"  # of the files of weights, in both formats
IGNORED = r"blocks\.\d+\.attn2\.norm_added_q\.weight"  # in early files for diffusers; the queries have one norm


TURNS = {  # format -> folders of two transformers that take turns, and what they are here
    "diffusers": {"transformer": "dit_high_noise", "transformer_2": "dit_low_noise"},
    "original": {"high_noise_model": "dit_high_noise", "low_noise_model": "dit_low_noise"},
}


class Opened(NamedTuple):
    """A transformer in foreign files, all of whose tensors have been found right by their headers."""

    dit: DiT
    pairs: list[Pair]
    weights: weights.Weights


def folders_of(place: epath.PathLike) -> dict[str, epath.Path]:
    """Our name of each transformer in a folder, and where it lies: a transformer's own folder, or a whole model's.

    Raises:
      FileNotFoundError: if there is none.
    """
    folder = mapping.folder_of(place)
    for names in TURNS.values():
        if all((folder / name / "config.json").exists() for name in names):
            return {ours: folder / name for name, ours in names.items()}
    for alone in (folder / "transformer", folder):
        if (alone / "config.json").exists():
            return {"dit": alone}
    raise FileNotFoundError(
        f"{folder}: expected the folder of a Wan model or of its transformer, with a config.json; that of a model has "
        "transformer/ (and transformer_2/), or high_noise_model/ and low_noise_model/."
    )


def opened(folder: epath.PathLike, **fields: Any) -> Opened:
    """The transformer in a folder of config.json and safetensors, of either format; no weights are read yet.

    Args:
      fields: of the `DiT` that are the caller's choice: dtype, remat, scan_layers, attention, window.

    Raises:
      FileNotFoundError: if files are missing.
      ValueError: listing all tensors that are missing, left over or of another shape; or for damaged files, pickles,
        settings that no DiT has.
    """
    folder = epath.Path(folder).expanduser()
    source, config = weights.Weights(folder), mapping.settings(folder)
    if not config:
        raise FileNotFoundError(f"{folder}: expected the config.json of the transformer beside its weights.")
    dit = DiT(**(fields_of(config, source.shapes) | fields))
    found = pairs(dit, format_of(source.shapes))
    mapping.agree(found, source.shapes, ignored=IGNORED)
    return Opened(dit, found, source)


def load(
    folder: epath.PathLike, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike = jnp.float32, **fields: Any
) -> tuple[DiT, Tree]:
    """The transformer in a folder, and its parameters: on a mesh, or in the host's memory.

    Args:
      mesh: of `sharding.make_mesh`; the host then holds one tensor at a time.
      dtype: of the parameters.
      fields: as of `opened`, which says what is raised.
    """
    source = opened(folder, **fields)
    boxed = shapes_of(source.dit)
    placed = None if mesh is None else sharding.shardings(boxed, mesh)
    part = weights.of_theirs(source.pairs, source.weights.read)
    return source.dit, weights.fill(nn.unbox(boxed), part, stacked=STACKED, shardings=placed, dtype=dtype)


def save(
    folder: epath.PathLike,
    dit: DiT,
    part: weights.Part,
    to: Format,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors, as the folder of a transformer has them; all processes call it together.

    Args:
      part: where the parameters come from, of `weights.of_tree` or `weights.of_file`.
      dtype: of the weights in the files.

    Raises:
      ValueError: listing the fields of a DiT that is not of Wan's shape.
    """
    config = config_of(dit, to)
    tensors = weights.theirs(pairs(dit, to), part)
    tensor_files.write(folder, tensors, stem=STEM, dtype=dtype, shard_bytes=shard_bytes)
    if jax.process_index() == 0:
        (epath.Path(folder).expanduser() / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fields_of(config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of the `DiT` that a config.json describes, of either format.

    Args:
      config: what is in it. What it does not say is as in diffusers' class, or in the authors'.
      found: the names and shapes of the weights beside it, which tell the two formats, and in the authors' whether
        there are image tokens.

    Raises:
      ValueError: listing the settings that no DiT here has.
    """
    if format_of(found) == "original":
        image = found.get("img_emb.proj.0.weight", (0,))
        says = {
            "width": config.get("dim", 2048),
            "num_heads": config.get("num_heads", 16),
            "num_layers": config.get("num_layers", 32),
            "mlp_width": config.get("ffn_dim", 8192),
            "in": config.get("in_dim", 16),
            "out": config.get("out_dim", 16),
            "text_width": config.get("text_dim", 4096),
            "time_features": config.get("freq_dim", 256),
            "image_width": image[0],
        }
    else:
        heads = config.get("num_attention_heads", 40)
        says = {
            "width": heads * config.get("attention_head_dim", 128),
            "num_heads": heads,
            "num_layers": config.get("num_layers", 40),
            "mlp_width": config.get("ffn_dim", 13824),
            "in": config.get("in_channels", 16),
            "out": config.get("out_channels", 16) or config.get("in_channels", 16),
            "text_width": config.get("text_dim", 4096),
            "time_features": config.get("freq_dim", 256),
            "image_width": config.get("image_dim") or 0,
        }
    fixed = {  # setting -> what it may be
        "cross_attn_norm": (True,),
        "qk_norm": (True, "rms_norm_across_heads"),
        "eps": (1e-6,),
        "pos_embed_seq_len": (None,),
        "window_size": ([-1, -1], (-1, -1)),
    }
    problems = [
        f"{name}={config[name]!r}: expected {allowed[0]!r}"
        for name, allowed in fixed.items()
        if name in config and config[name] not in allowed
    ]
    if problems:
        raise ValueError("a DiT cannot be this transformer:\n  - " + "\n  - ".join(problems))
    latent_channels = says.pop("out")
    return dict(
        says,
        latent_channels=latent_channels,
        extra_channels=says.pop("in") - latent_channels,
        patch=tuple(config.get("patch_size", (1, 2, 2))),
    )


def config_of(dit: DiT, to: Format) -> dict[str, Any]:
    """The config.json of a model: the inverse of `fields_of`.

    Raises:
      ValueError: listing the fields of a DiT that is not of Wan's shape.
    """
    fixed: dict[str, tuple[Any, ...]] = {
        "text_path": ("cross",),
        "time_path": ("adaln_zero", "adaln"),
        "positions": ("rotary",),
        "qk_norm": (True,),
        "rope_theta": (1e4,),
    }
    problems = [
        f"{name}={getattr(dit, name)!r}: expected {' or '.join(map(repr, allowed))}"
        for name, allowed in fixed.items()
        if getattr(dit, name) not in allowed
    ]
    if set(dit.attention) != {"full"}:
        problems.append(f"attention={dit.attention}: expected ('full',)")
    if problems:
        raise ValueError(
            "this transformer is not of Wan's shape, so it has no such format:\n  - " + "\n  - ".join(problems)
        )
    channels = dit.latent_channels + dit.extra_channels
    if to == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": dit.width if dit.image_width else None,
            "attention_head_dim": dit.width // dit.num_heads,
            "cross_attn_norm": True,
            "eps": EPSILON,
            "ffn_dim": dit.mlp_width,
            "freq_dim": dit.time_features,
            "image_dim": dit.image_width or None,
            "in_channels": channels,
            "num_attention_heads": dit.num_heads,
            "num_layers": dit.num_layers,
            "out_channels": dit.latent_channels,
            "patch_size": list(dit.patch),
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": dit.text_width,
        }
    return {
        "_class_name": "WanModel",
        "dim": dit.width,
        "eps": EPSILON,
        "ffn_dim": dit.mlp_width,
        "freq_dim": dit.time_features,
        "in_dim": channels,
        "model_type": "i2v" if dit.extra_channels else "ti2v" if dit.latent_channels == 48 else "t2v",
        "num_heads": dit.num_heads,
        "num_layers": dit.num_layers,
        "out_dim": dit.latent_channels,
        "text_dim": dit.text_width,
        "text_len": 512,
    }


def format_of(names: Mapping[str, Any]) -> Format:
    """Whose names these are."""
    return "original" if "head.modulation" in names else "diffusers"


def shapes_of(dit: DiT) -> Tree:
    """Shapes of all parameters."""
    latent_Bthwz = jnp.zeros((1, *dit.patch, dit.latent_channels + dit.extra_channels))
    text_BSE = jnp.zeros((1, 1, dit.text_width))
    image_BSE = jnp.zeros((1, 1, dit.image_width)) if dit.image_width else None
    inputs = (latent_Bthwz, jnp.zeros((1, 1)), None, text_BSE)
    return jax.eval_shape(lambda: dit.init(jax.random.key(0), *inputs, image_BSE=image_BSE)["params"])


def pairs(dit: DiT, form: Format) -> list[Pair]:
    """Every tensor of a format, and the parameter that it is.

    Raises:
      ValueError: naming parameters that the format has no place for.
    """
    which = {"diffusers": 1, "original": 2}[form]
    patches = _patches(dit.patch)
    rules = []
    for tables, names, prefix, foreign in (
        (_TABLES, _OUTSIDE, "", ""),
        (_TABLES_INSIDE, _INSIDE, r"layers_(\d+)/block_0/", r"blocks.\1."),
    ):
        rules += [Rule(prefix + row[0], foreign + row[which], ROWS) for row in tables]
        for row in names:
            for ours, theirs, layout in _WORDS:
                lies = patches if (row[0], ours) == ("patch/linear", "kernel") else layout
                rules.append(Rule(f"{prefix}{row[0]}/{ours}", f"{foreign}{row[which]}.{theirs}", lies))
    return pairs_of(nn.unbox(shapes_of(dit)), rules, stacked=STACKED)


def own_fields(dit: DiT) -> dict[str, Any]:
    """What `fields_of` says of a model, which is all that tells it from others of Wan's shape."""
    names = ("width", "num_heads", "num_layers", "mlp_width", "text_width", "image_width", "time_features")
    return {name: getattr(dit, name) for name in (*names, "latent_channels", "extra_channels", "patch")}


def _patches(patch: tuple[int, int, int]) -> Layout:
    """A convolution over patches (D, z, pt, ph, pw), as the product (pt ph pw z, D) that it is."""
    return Layout(
        lambda x: np.transpose(x, (2, 3, 4, 1, 0)).reshape(-1, x.shape[0]),
        lambda x: np.transpose(x.reshape(*patch, -1, x.shape[-1]), (4, 3, 0, 1, 2)),
    )
