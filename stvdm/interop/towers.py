# SPDX-License-Identifier: Apache-2.0
"""Published networks that judge images and clips, built and filled from the weights that their authors gave out.

    model, params, tokenizer = towers.clip("openai/clip-vit-base-patch32")

Each function takes a folder of safetensors, or the OWNER/NAME of one on the Hugging Face hub, builds the network that
the config.json in it describes, and fills it by a table of names. `mapping.into` says what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stvdm.interop import mapping
from stvdm.models.clip import CLIP, ImageTower, TextTower
from stvdm.models.tokenizers import BytePairTokenizer

Tree = Any


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
    model = clip_of(config)
    params = mapping.into(clip_shapes(model), mapping.read(folder), CLIP_RULES)
    pad = config.get("text_config", {}).get("pad_token_id")
    tokenizer = BytePairTokenizer.read(
        folder, max_tokens=model.text.max_tokens, pad=0 if pad == 0 else None
    )  # OpenAI's config says 1, which it does not pad with
    return Clip(model, params, tokenizer)


def clip_of(config: Mapping[str, Any]) -> CLIP:
    """The network of a ``CLIPModel``'s config.json; what is not said there is as in CLIP ViT-B/32."""
    text, image = config.get("text_config") or {}, config.get("vision_config") or {}
    embedding = config.get("projection_dim", 512)
    words = text.get("vocab_size", 49408)
    end = text.get("eos_token_id", words - 1)
    return CLIP(
        text=TextTower(
            vocabulary_size=words,
            max_tokens=text.get("max_position_embeddings", 77),
            **_layers(text, width=512, mlp_width=2048, num_heads=8),
            embedding=embedding,
            end_token=words - 1 if end == 2 else end,  # 2 is what old configs say and do not mean: the end is the last
        ),
        image=ImageTower(
            image_size=image.get("image_size", 224),
            patch=image.get("patch_size", 32),
            **_layers(image, width=768, mlp_width=3072, num_heads=12),
            embedding=embedding,
        ),
    )


def clip_shapes(model: CLIP) -> Tree:
    """Shapes of all its parameters."""
    size = model.image.image_size
    return _shapes(model, jnp.zeros((1, model.text.max_tokens), int), jnp.zeros((1, size, size, 3)))


def _layers(section: Mapping[str, Any], *, width: int, mlp_width: int, num_heads: int) -> dict[str, Any]:
    return dict(
        width=section.get("hidden_size", width),
        num_layers=section.get("num_hidden_layers", 12),
        num_heads=section.get("num_attention_heads", num_heads),
        mlp_width=section.get("intermediate_size", mlp_width),
        activation=section.get("hidden_act", "quick_gelu"),
        epsilon=section.get("layer_norm_eps", 1e-5),
    )


def _clip_layers(tower: str, ours: str) -> list[tuple[str, str]]:
    names = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "out",
        "mlp.fc1": "mlp_in",
        "mlp.fc2": "mlp_out",
        "layer_norm1": "attention_norm",
        "layer_norm2": "mlp_norm",
    }
    return [
        (rf"{tower}\.encoder\.layers\.(\d+)\.{name}\.(\w+)", rf"{ours}/layers/layer_\1/{path}/\2")
        for name, path in names.items()
    ]


CLIP_RULES: mapping.Rules = (
    (r"logit_scale", "log_scale"),
    (r"text_model\.embeddings\.token_embedding\.weight", "text/words"),
    (r"text_model\.embeddings\.position_embedding\.weight", "text/positions"),
    *_clip_layers("text_model", "text"),
    (r"text_model\.final_layer_norm\.(\w+)", r"text/norm/\1"),
    (r"text_projection\.(\w+)", r"text/projection/\1"),
    (r"vision_model\.embeddings\.class_embedding", "image/class"),
    (r"vision_model\.embeddings\.patch_embedding\.(\w+)", r"image/patches/\1"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "image/positions"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"image/first_norm/\1"),  # so spelt
    *_clip_layers("vision_model", "image"),
    (r"vision_model\.post_layernorm\.(\w+)", r"image/norm/\1"),
    (r"visual_projection\.(\w+)", r"image/projection/\1"),
)


def num_parameters(shapes: Tree) -> int:
    """How many values a tree of shapes holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _shapes(model: nn.Module, *inputs: jax.Array, **options: Any) -> Tree:
    return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options)["params"]))
