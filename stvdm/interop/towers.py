# SPDX-License-Identifier: Apache-2.0
"""Published networks that read text and look at images for a generator, built and filled from the weights that their
authors gave out.

    text_BSE, mask_BS = towers.reader("google/umt5-xxl", max_tokens=512)(["a red ball bounces to the right"])
    image_BSE = towers.looker("Wan2.1-I2V-14B-480P-Diffusers/image_encoder")([image_HWC])

Each function takes a folder of safetensors, or the OWNER/NAME of one on the Hugging Face hub, builds the network that
the config.json in it describes or that the tensors' shapes imply, and fills it by a table of names. `mapping.into` says
what does not fit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stvdm import checkpoint, sharding
from stvdm.interop import mapping
from stvdm.models.clip import CLIP, ImageTower, TextTower, prepare
from stvdm.models.t5 import T5
from stvdm.models.tokenizers import BytePairTokenizer, PieceTokenizer

Tree = Any


def clip_text(place: epath.PathLike, *, max_tokens: int = 77, dtype: str = "float32") -> Reader:
    """CLIP's text tower alone, from a ``CLIPModel``, ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.

    Raises:
      ValueError: for weights of another network, pickles, or more tokens than it has positions for.
      FileNotFoundError: if weights or the tokenizer's files are not there.
    """
    folder = mapping.folder_of(place)
    config = mapping.settings(folder)
    text = config.get("text_config") or config
    model = clip_of({"text_config": text}).text.clone(embedding=None, dtype=dtype)
    if max_tokens > model.max_tokens:
        raise ValueError(f"max_tokens={max_tokens}: {place} reads at most {model.max_tokens}; use that, or fewer.")
    shapes = mapping.shapes_of(model, jnp.zeros((1, 2), int))
    source = _named_whole(mapping.read(folder), "text_model")
    params = mapping.into(shapes, source, CLIP_TEXT_RULES, dtype=jnp.dtype(dtype))
    words = next((place for place in (folder, folder.parent / "tokenizer") if (place / "vocab.json").exists()), folder)
    pad = 0 if text.get("pad_token_id") == 0 else None
    return Reader(model, params, BytePairTokenizer.read(words, max_tokens=max_tokens, pad=pad))


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
    return mapping.shapes_of(model, jnp.zeros((1, model.text.max_tokens), int), jnp.zeros((1, size, size, 3)))


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


def _named_whole(source: Mapping[str, np.ndarray], tower: str) -> dict[str, np.ndarray]:
    """A tower alone has been saved with and without the first word of its names; with it."""
    bare = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|final_layer_norm)\.")
    return {f"{tower}.{name}" if bare.match(name) else name: array for name, array in source.items()}


def _alone(tower: str, rest: str) -> mapping.Rules:
    """Of `CLIP_RULES` those of one tower, without the way to the shared space; the rest is left out."""
    inside = ((theirs, ours.removeprefix(f"{tower}/")) for theirs, ours in CLIP_RULES if ours.startswith(f"{tower}/"))
    return (*((theirs, ours) for theirs, ours in inside if "projection" not in ours), (rest, ""))


CLIP_TEXT_RULES = _alone("text", r"(text_projection|vision_model|visual_projection|logit_scale)\b.*")
CLIP_IMAGE_RULES = _alone("image", r"(visual_projection|text_model|text_projection|logit_scale)\b.*")


class Looker(NamedTuple):
    """A tower that looks at images for a generator, with its weights.

    looker = towers.looker("Wan2.1-I2V-14B-480P-Diffusers/image_encoder")
    image_BSE = looker([image_HWC])
    """

    model: ImageTower
    params: Tree

    def __call__(self, images: Sequence[np.ndarray]) -> jax.Array:
        """image_BSE, float32, of bytes (H, W, 3) of any size: states of the last layer but one, class first."""
        return self.look(prepare(images, self.model.image_size))

    def look(self, image_BHWC: Any) -> jax.Array:
        """The same of images that are `prepare`d, wherever they lie."""
        return _look(self.model, self.params, image_BHWC)

    def on(self, mesh: jax.sharding.Mesh) -> Looker:
        """The same with its weights split over a mesh."""
        size = self.model.image_size
        boxed = mapping.boxed_shapes_of(self.model, jnp.zeros((1, size, size, 3)))
        return self._replace(params=_split(self.params, boxed, mesh))


@functools.partial(jax.jit, static_argnums=0)
def _look(model: ImageTower, params: Tree, image_BHWC: jax.Array) -> jax.Array:
    return model.apply({"params": params}, image_BHWC).layers_BND[-2].astype(jnp.float32)


def looker(place: epath.PathLike, *, dtype: str = "float32") -> Looker:
    """CLIP's image tower alone, in transformers' layout or in that of Wan's authors.

    transformers: ``CLIPModel``, ``CLIPVisionModel`` or ``CLIPVisionModelWithProjection``, with its config.json. Wan:
    models_clip_open-clip-xlm-roberta-large-vit-huge-14, converted to safetensors; sizes are read off the tensors.
    Images are cut to a square, as diffusers does; the authors squeeze them into one.

    Args:
      place: a folder, a file, or the hub's OWNER/NAME.
      dtype: of the weights, and of products.

    Raises:
      ValueError: for weights of another network, or pickles.
      FileNotFoundError: if it is not there.
    """
    folder = mapping.folder_of(place)
    source, config = mapping.read(folder), mapping.settings(folder)
    if "visual.patch_embedding.weight" in source:
        source, config = _visual_as_transformers(source), _sizes_of_visual(source)
    source = _named_whole(source, "vision_model")
    model = clip_of({"vision_config": config.get("vision_config") or config}).image.clone(embedding=None, dtype=dtype)
    shapes = mapping.shapes_of(model, jnp.zeros((1, model.image_size, model.image_size, 3)))
    return Looker(model, mapping.into(shapes, source, CLIP_IMAGE_RULES, dtype=jnp.dtype(dtype)))


_VISUAL = {  # of Wan's authors, in transformers' words
    r"visual\.patch_embedding\.(\w+)": r"embeddings.patch_embedding.\1",
    r"visual\.cls_embedding": "embeddings.class_embedding",
    r"visual\.pos_embedding": "embeddings.position_embedding.weight",
    r"visual\.pre_norm\.(\w+)": r"pre_layrnorm.\1",
    r"visual\.post_norm\.(\w+)": r"post_layernorm.\1",
    r"visual\.transformer\.(\d+)\.norm(\d)\.(\w+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"visual\.transformer\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"visual\.transformer\.(\d+)\.mlp\.0\.(\w+)": r"encoder.layers.\1.mlp.fc1.\2",
    r"visual\.transformer\.(\d+)\.mlp\.2\.(\w+)": r"encoder.layers.\1.mlp.fc2.\2",
}


def _visual_as_transformers(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of Wan's authors under transformers' names: there queries, keys and values are one; no text, no head."""
    found: dict[str, np.ndarray] = {}
    for name, array in source.items():
        if joined := re.fullmatch(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(\w+)", name):
            for part, value in zip("qkv", np.split(array, 3), strict=True):
                found[f"encoder.layers.{joined[1]}.self_attn.{part}_proj.{joined[2]}"] = value
        elif not re.match(r"textual\.|log_scale|visual\.head", name):
            array = array.reshape(array.shape[-2:] if name.endswith("pos_embedding") else array.shape)
            array = array.ravel() if name.endswith("cls_embedding") else array
            found[next((m.expand(to) for at, to in _VISUAL.items() if (m := re.fullmatch(at, name))), name)] = array
    return found


def _sizes_of_visual(source: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the authors' code has for a tower of these tensors, in transformers' words."""
    width, _, patch, _ = source["visual.patch_embedding.weight"].shape
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(source["visual.pos_embedding"].shape[-2] - 1),
        "num_hidden_layers": sum(name.startswith("visual.") and name.endswith(".norm1.weight") for name in source),
        "num_attention_heads": HEADS.get(width, width // 64 or 1),
        "intermediate_size": len(source["visual.transformer.0.mlp.0.bias"]),
        "hidden_act": "gelu",
    }


HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # of ViT-S, B, L, H and g, by width


class Reader(NamedTuple):
    """A tower that reads captions for a generator, with its weights and its tokenizer.

    reader = towers.reader("google/umt5-xxl")
    text_BSE, mask_BS = reader(["a red ball bounces to the right"])
    """

    model: T5 | TextTower
    params: Tree
    tokenizer: PieceTokenizer | BytePairTokenizer
    known: Mapping[str, np.ndarray] = {}  # what it has read before: caption -> text_SE

    def __call__(self, captions: Sequence[str]) -> tuple[jax.Array | np.ndarray, np.ndarray]:
        """(text_BSE, mask_BS): states of the last layer, zero at padding; the mask is True where there is none."""
        tokens_BS, mask_BS = self.tokenizer(captions)
        if all(caption in self.known for caption in captions):
            return np.stack([self.known[caption] for caption in captions]), mask_BS
        if self.params is None:
            raise ValueError(f"this tower has let go of its weights, and knows but {', '.join(map(repr, self.known))}.")
        return read(self.model, self.params, tokens_BS, mask_BS), mask_BS

    def on(self, mesh: jax.sharding.Mesh | None = None) -> Reader:
        """The same with its weights split over a mesh, or on one device."""
        if mesh is None:
            return self._replace(params=jax.device_put(self.params))
        boxed = mapping.boxed_shapes_of(self.model, jnp.zeros((1, 2), int))
        return self._replace(params=_split(self.params, boxed, mesh))

    def only(self, captions: Sequence[str]) -> Reader:
        """The same that knows these captions, and no longer has its weights."""
        texts = [checkpoint.on_host(self([caption])[0])[0] for caption in captions]
        return self._replace(params=None, known=dict(zip(captions, texts, strict=True)))


def _split(params: Tree, boxed: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Weights as the boxes of a tower's shapes say."""

    def put(leaf: np.ndarray, where: jax.sharding.NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(put, params, sharding.shardings(boxed, mesh))


@functools.partial(jax.jit, static_argnums=0)
def read(model: T5 | TextTower, params: Tree, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """text_BSE of tokens, float32: states of the last layer, zero at padding."""
    return model.apply({"params": params}, tokens_BS, mask_BS).hidden_BND.astype(jnp.float32) * mask_BS[..., None]


def reader(place: epath.PathLike, *, max_tokens: int, dtype: str = "float32") -> Reader:
    """The tower of a folder or of the hub's OWNER/NAME, whatever its config.json says that it is: T5, UMT5 or CLIP.

    Args:
      max_tokens: S, to which captions are cut and padded.
      dtype: of the weights, and of products.

    Raises:
      ValueError: if it is none of these, or reads fewer tokens.
      FileNotFoundError: if it is not there.
    """
    folder = mapping.folder_of(place)
    kind = mapping.settings(folder).get("model_type", "umt5")
    if kind not in _READERS:
        raise ValueError(f"{place}: a tower of model_type {kind!r}, expected one of {', '.join(_READERS)}.")
    return _READERS[kind](folder, max_tokens=max_tokens, dtype=dtype)


def identity(place: epath.PathLike, *, max_tokens: int | None = None) -> dict[str, Any]:
    """What tells apart what towers have made: the digest of their weights, and where they cut captions if they do."""
    folder = mapping.folder_of(place)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                digest.update(chunk)
    return {"tower": digest.hexdigest()} | ({} if max_tokens is None else {"max_tokens": max_tokens})


def t5(
    place: epath.PathLike,
    *,
    tokenizer: epath.PathLike | None = None,
    max_tokens: int = 512,
    dtype: str = "float32",
) -> Reader:
    """The encoder of T5 or UMT5, in transformers' layout or in that of Wan's authors.

    transformers: ``T5EncoderModel``, ``UMT5EncoderModel``, or a whole T5, of which the decoder is left out; with its
    config.json. Wan: models_t5_umt5-xxl-enc-bf16, converted to safetensors; sizes are read off the tensors.

    Args:
      place: a folder, or a file.
      tokenizer: the folder of the tokenizer's files; None: found beside the weights, where both layouts have it.
      max_tokens: S, to which captions are cut and padded.
      dtype: of the weights, and of products. UMT5-XXL takes 22.7 GB in float32, and half of that in bfloat16, in which
        it was published and Wan runs it.

    Raises:
      ValueError: for weights of another network, or pickles.
      FileNotFoundError: if weights or the tokenizer's files are not there.
    """
    folder = mapping.folder_of(place)
    source = mapping.read(folder)
    model = t5_of(_sizes_of_t5(source) | mapping.settings(folder)).clone(dtype=dtype)
    words, again = source.get("shared.weight"), source.get("encoder.embed_tokens.weight")
    if words is not None and again is not None and np.array_equal(words, again):
        del source["encoder.embed_tokens.weight"]  # some files have the table under both its names
    params = mapping.into(t5_shapes(model), source, T5_RULES, dtype=jnp.dtype(dtype))
    if tokenizer is None:
        home = folder.parent if folder.is_file() else folder
        places = (home, home.parent / "tokenizer", home / "google" / "umt5-xxl")
        tokenizer = next((place for place in places if PieceTokenizer.is_in(place)), home)
    return Reader(model, params, PieceTokenizer.read(tokenizer, max_tokens=max_tokens))


def t5_of(config: Mapping[str, Any]) -> T5:
    """The encoder of a T5's or UMT5's config.json; what is not said there is as in transformers."""
    *gated, activation = config.get("feed_forward_proj", "relu").split("-")
    return T5(
        vocabulary_size=config.get("vocab_size", 32128),
        width=config.get("d_model", 512),
        num_layers=config.get("num_layers", 6),
        num_heads=config.get("num_heads", 8),
        head_width=config.get("d_kv", 64),
        mlp_width=config.get("d_ff", 2048),
        # "gated-gelu" has always meant the approximate one, which transformers calls "gelu_new" elsewhere.
        activation="gelu_tanh" if (gated and activation == "gelu") or activation == "gelu_new" else activation,
        gated=bool(gated),
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        tables="each" if config.get("model_type") == "umt5" else "first",
        epsilon=config.get("layer_norm_epsilon", 1e-6),
    )


def t5_shapes(model: T5) -> Tree:
    """Shapes of all its parameters."""
    return mapping.shapes_of(model, jnp.zeros((1, 2), int))


def _sizes_of_t5(source: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A config.json of the tensors of Wan's authors; {} of others, which have one."""
    if "token_embedding.weight" not in source:
        return {}
    words, distances = source["token_embedding.weight"], source["blocks.0.pos_embedding.embedding.weight"]
    return {
        "model_type": "umt5",
        "vocab_size": words.shape[0],
        "d_model": words.shape[1],
        "num_layers": sum(name.endswith(".norm1.weight") for name in source),
        "num_heads": distances.shape[1],
        "d_kv": len(source["blocks.0.attn.q.weight"]) // distances.shape[1],
        "d_ff": len(source["blocks.0.ffn.fc1.weight"]),
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": distances.shape[0],
    }


_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_T5_LAYER = r"encoder\.block\.(\d+)\.layer"
T5_RULES: mapping.Rules = (
    (r"shared\.weight|encoder\.embed_tokens\.weight", "words"),
    *((rf"{_T5_LAYER}\.0\.SelfAttention\.{o}\.(\w+)", rf"layer_\1/{path}/\2") for o, path in _ATTENTION.items()),
    (rf"{_T5_LAYER}\.0\.SelfAttention\.relative_attention_bias\.weight", r"distances_\1"),
    (rf"{_T5_LAYER}\.0\.layer_norm\.(\w+)", r"layer_\1/attention_norm/\2"),
    (rf"{_T5_LAYER}\.1\.layer_norm\.(\w+)", r"layer_\1/mlp_norm/\2"),
    (rf"{_T5_LAYER}\.1\.DenseReluDense\.wi_0\.(\w+)", r"layer_\1/mlp_gate/\2"),
    (rf"{_T5_LAYER}\.1\.DenseReluDense\.(?:wi|wi_1)\.(\w+)", r"layer_\1/mlp_in/\2"),
    (rf"{_T5_LAYER}\.1\.DenseReluDense\.wo\.(\w+)", r"layer_\1/mlp_out/\2"),
    (r"encoder\.final_layer_norm\.(\w+)", r"norm/\1"),
    (r"decoder\..*|lm_head\..*", ""),
    # Wan's authors
    (r"token_embedding\.weight", "words"),
    *((rf"blocks\.(\d+)\.attn\.{o}\.(\w+)", rf"layer_\1/{path}/\2") for o, path in _ATTENTION.items()),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", r"distances_\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"layer_\1/attention_norm/\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"layer_\1/mlp_norm/\2"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.(\w+)", r"layer_\1/mlp_gate/\2"),
    (r"blocks\.(\d+)\.ffn\.fc1\.(\w+)", r"layer_\1/mlp_in/\2"),
    (r"blocks\.(\d+)\.ffn\.fc2\.(\w+)", r"layer_\1/mlp_out/\2"),
    (r"norm\.(\w+)", r"norm/\1"),
)


_READERS = {"t5": t5, "umt5": t5, "clip": clip_text, "clip_text_model": clip_text}
