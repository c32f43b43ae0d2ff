# SPDX-License-Identifier: Apache-2.0
"""What a step of the transformer is given: captions as it reads them, latents, what is known of first frames; and what
previews are made of.

    captions_of, images_of = captions_reader(config, reader, mesh), images_reader(config, mesh)
    read = batch_reader(config, coder)
    rows = next(batches)                                                          # as the loader gives them
    batch = {**to_mesh(latents, mesh), **captions_of(rows), **images_of(rows)}    # on the mesh, before each step
    batch = read(frozen_weights(config, coder_params), batch)                     # as the loss takes it, in the step
    given = beginning(config, batch, key)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvdm import checkpoint, shapes
from stvdm.data.loader import Loader
from stvdm.data.records import read_metadata
from stvdm.interop import towers
from stvdm.models import autoencoder3d
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.clip import prepare
from stvdm.models.text_encoders import WordTokenizer
from stvdm.sampling import first_frame, pipeline
from stvdm.train import state as state_lib

Tree = Any
Captions = tuple[Any, Any]  # (tokens_BS, mask_BS), or a tower's (text_BSE, mask_BS)

IMAGE_TOKENS = 257  # of an image, by the tower of Wan 2.1: CLIP ViT-H/14 at 224
NUM_PREVIEWS = 4  # held-out captions that are sampled where the config names no prompts


def stored(config: ConfigDict) -> list[tuple[str, dict[str, Any]]]:
    """(folder, its metadata) of the latents that are read ready-made; none where the step encodes videos."""
    folders = (config.data.path, config.data.validation_path)
    return [(path, read_metadata(path)) for path in folders if config.data.source == "latents" and path]


def words_tokenizer(config: ConfigDict) -> WordTokenizer:
    """That of the small text encoder, which reads captions where no tower does."""
    return WordTokenizer(tuple(config.text.words), config.text.max_tokens)


def no_caption(config: ConfigDict) -> Captions:
    """The empty caption, for which some are dropped; of a tower, which is not at hand, one of its shape."""
    S, E = config.text.max_tokens, config.text.width
    if config.text.tower:
        return np.zeros((1, S, E), np.float32), np.ones((1, S), bool)
    return words_tokenizer(config)([""])


def captions_reader(config: ConfigDict, reader: towers.Reader | None, mesh: Mesh) -> Callable[[Tree], Tree]:
    """(batch as the loader gives it) -> "tokens" and "mask" on the mesh.

    Of a tower: what lies beside the latents, or, where nothing does, what it reads now.

    Raises:
      ValueError: if what lies there is of another tower, or of captions that were cut elsewhere.
    """
    settings = config.to_dict()

    def words(batch: Tree) -> Tree:
        tokens_BS, mask_BS = tokenizer(batch["caption"])
        return state_lib.to_mesh({"tokens": tokens_BS, "mask": mask_BS}, mesh)

    def read_before(batch: Tree) -> Tree:
        text_BSE = np.zeros((len(batch["text"]), config.text.max_tokens, config.text.width), np.float32)
        mask_BS = np.zeros(text_BSE.shape[:2], bool)
        for text_SE, mask_S, found in zip(text_BSE, mask_BS, batch["text"], strict=True):
            text_SE[: len(found)], mask_S[: len(found)] = found, True
        return state_lib.to_mesh({"tokens": text_BSE, "mask": pipeline.looked_at(mask_BS, settings)}, mesh)

    def read_now(batch: Tree) -> Tree:
        assert reader is not None
        put = words(batch)
        return {
            "tokens": towers.read(reader.model, reader.params, put["tokens"], put["mask"]),
            "mask": pipeline.looked_at(put["mask"], settings),
        }

    if reader is None:
        tokenizer: Any = words_tokenizer(config)
        return words
    tokenizer = reader.tokenizer
    read_by = [(path, found["about"].get("text")) for path, found in stored(config)]
    if not any(there for _, there in read_by):
        return read_now
    here = towers.identity(config.text.tower, max_tokens=config.text.max_tokens)
    for path, there in read_by:
        if there != here:
            raise ValueError(
                f"{path}: its text was read by {there}, expected {here}; run `stvdm preprocess` again with this "
                "config, or name the tower that read it and its text.max_tokens."
            )
    return read_before


def begins_with_image(config: ConfigDict) -> bool:
    """Whether the network is given a clip's own first frame."""
    return config.image.share > 0 or bool(first_frame.parts_of(config.model))


def frozen_weights(config: ConfigDict, coder_params: Tree) -> Tree:
    """What a step reads of an autoencoder: of latents that are ready, their statistics alone."""
    names = ("statistics",) if config.data.source == "latents" else ("autoencoder", "statistics")
    return {name: coder_params[name] for name in names}


def batch_reader(config: ConfigDict, coder: Autoencoder) -> Callable[[Tree, Tree], Tree]:
    """(autoencoder's params, batch) -> the batch as the loss takes it.

    "latent" is the normalised one, of "video" or, where it is ready, of the raw one. For a network that begins with an
    image there are "extra" channels, of the latent of the first frame and grey ones, and "image", its tokens.
    """
    parts, ready = first_frame.parts_of(config.model), config.data.source == "latents"
    latents = ["latent", *(name for name in parts if name == "image_latent")]

    def read(params: Tree, batch: Tree) -> Tree:
        if ready:
            raw = {name: batch[name] for name in latents}
        else:
            clips = {"latent": pipeline.to_model_range(batch["video"])}
            if "image_latent" in latents:
                clips["image_latent"] = first_frame.followed_by_grey(clips["latent"], batch["video"].shape[1])
            encode = functools.partial(coder.apply, {"params": params["autoencoder"]}, method="encode")
            raw = {name: encode(clip)[0] for name, clip in clips.items()}
        made: Tree = {name: autoencoder3d.normalise(latent, params["statistics"]) for name, latent in raw.items()}
        if "image_latent" in latents:
            made["extra"] = first_frame.beside(made.pop("image_latent"), coder.temporal)
        if "image_tokens" in parts:
            made["image"] = batch["image_tokens"]
        return {name: batch[name] for name in ("tokens", "mask")} | made

    return read


def beginning(config: ConfigDict, batch: Tree, key: jax.Array | None = None) -> first_frame.Given:
    """What the network is given of the first frames of a batch as `batch_reader` makes it.

    Args:
      key: draws of which clips the first latent frame is known, where it may be; None: of all.
    """
    latent, known = batch["latent"], first_frame.Given(batch.get("extra"), batch.get("image"))
    if not config.image.share or latent.shape[1] == 1:  # of an image nothing would be left to make
        return known
    is_known_B = None if key is None else jax.random.bernoulli(key, config.image.share, latent.shape[:1])
    return known._replace(known_B1hwz=latent[:, :1], is_known_B=is_known_B)


def images_reader(config: ConfigDict, mesh: Mesh) -> Callable[[Tree], Tree]:
    """(batch as the loader gives it) -> "image_latent" and "image_tokens" on the mesh, as far as it takes them.

    They lie beside latents that are ready; of videos a tower makes the tokens now, and the step the latent.

    Raises:
      ValueError: if they do not lie there, or another tower made the tokens.
    """
    takes = list(first_frame.parts_of(config.model))
    if not takes:
        return lambda batch: {}
    if config.data.source != "latents":
        looker = pipeline.looker_of(config.to_dict())
        if looker is None:
            return lambda batch: {}
        at = looker.on(mesh)

        def look_now(batch: Tree) -> Tree:
            images = prepare(batch["video"][:, 0], at.model.image_size)
            return {"image_tokens": at.look(state_lib.to_mesh({"images": images}, mesh)["images"])}

        return look_now
    here = towers.identity(config.image.tower) if "image_tokens" in takes else None  # reads all of its weights
    for path, found in stored(config):
        if missing := [name for name in takes if name not in found["schema"]]:
            raise ValueError(
                f"{path}: no {' and no '.join(missing)} beside the latents, expected them for a network that begins "
                "with an image; run `stvdm preprocess` again with this config."
            )
        if here and found["about"].get("image") != here:
            raise ValueError(
                f"{path}: its images were looked at by {found['about'].get('image')}, expected {here}; run `stvdm "
                "preprocess` again with this config, or name the tower that looked at them."
            )
    return lambda batch: state_lib.to_mesh({name: batch[name] for name in takes}, mesh)


def image_rows(config: ConfigDict, coder: Autoencoder, video: shapes.Size3) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and types, for one clip, of what `images_reader` puts beside it; for a plan."""
    parts = first_frame.parts_of(config.model)
    rows: dict[str, tuple[tuple[int, ...], Any]] = {}
    if "image_latent" in parts and config.data.source == "latents":
        rows["image_latent"] = ((*coder.latent_shape(video), coder.latent_channels), jnp.float32)
    if "image_tokens" in parts:
        rows["image_tokens"] = ((IMAGE_TOKENS, parts["image_tokens"]), jnp.float32)
    return rows


def check_buckets(config: ConfigDict, coder: Autoencoder) -> None:
    """Refuses clips that this autoencoder and the patches of this config do not divide.

    Raises:
      ValueError: naming the first of them.
    """
    for T, H, W, *_ in config.data.buckets:
        try:
            coder.latent_shape((T, H, W), tuple(config.model.patch))
        except ValueError as error:
            raise ValueError(f"data.buckets {(T, H, W)}: {error}") from error


def check_latents(config: ConfigDict, coder_description: dict[str, Any]) -> None:
    """Refuses latents that another autoencoder made.

    Raises:
      ValueError: if the weights that encoded them are not those that would decode them.
    """
    here = coder_description["sha256"]
    for path, found in stored(config):
        made_by = found["about"].get("autoencoder")
        if made_by not in (None, here):
            raise ValueError(
                f"{path}: latents of an autoencoder with sha256 {made_by[:12]}..., expected that of "
                f"autoencoder={config.autoencoder!r}, {here[:12]}...; run `stvdm preprocess` again, or name the "
                "autoencoder that made them."
            )


class Previews(NamedTuple):
    """What is sampled on the way."""

    prompts: list[str]
    rows: list[int]  # of the first batch of held-out clips: with whose first frames they begin, if with any


def previews_of(config: ConfigDict, tokenizer: Any, held_out: Loader, mesh: Mesh) -> Previews:
    """The prompts of the config, or captions of held-out clips: where clips begin with an image, each with its own.

    Of one network of two that take turns there are none.

    Raises:
      ValueError: if the config's cannot be read with this vocabulary.
    """
    captions: list[str] = []
    if config.turn:
        return Previews([], [])
    if begins_with_image(config):
        numbers = state_lib.to_mesh({"index": held_out.batch_at(0)["index"].astype(np.int32)}, mesh)["index"]
        captions = [held_out.caption_of(int(number)) for number in checkpoint.on_host(numbers)]
    elif not config.sample.previews:
        captions = list(dict.fromkeys(itertools.islice(held_out.captions(), 64)))
    if config.sample.negative and (problem := tokenizer.problem(config.sample.negative)):
        raise ValueError(f"sample.negative: {problem} Give another, or none: --config.sample.negative=")
    if config.sample.previews:
        for prompt in config.sample.previews:
            problem = tokenizer.problem(prompt)
            if problem:
                raise ValueError(
                    f"sample.previews: {problem} Give other prompts, or none to see held-out captions: "
                    "--config.sample.previews='()'"
                )
        prompts = list(config.sample.previews)
        return Previews(prompts, [i % max(1, len(captions)) for i in range(len(prompts))])
    rows = [i for i, caption in enumerate(captions) if not tokenizer.problem(caption)][:NUM_PREVIEWS]
    return Previews([captions[i] for i in rows], rows)
