# SPDX-License-Identifier: Apache-2.0
"""From prompts to videos: one pipeline over an autoencoder, a text encoder and a spacetime transformer.

    pipeline = Pipeline.load()                                     # the bundled model; or a folder that training wrote
    result = pipeline.generate(["a red ball bounces to the right"], seed=0)
    result.videos                                                  # uint8 (n, T, H, W, 3)

All of a clip is denoised at once, as one object in space and time: noise_Bthwz, followed along the guided velocity by
`denoising.denoise`, gives the latent, which is streamed through the decoder. The noise of a video follows from its own
seed alone, and videos are made `batch_size` at a time in one compiled shape, so with the default of one a seed gives
the same bytes whatever else is asked for beside it. Clips may begin with an image: see `first_frame`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stvdm import checkpoint, shapes
from stvdm import config as base
from stvdm.diffusion import schedules
from stvdm.interop import towers
from stvdm.models import autoencoder3d, lora
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.dit import DiT
from stvdm.models.quantized import quantized
from stvdm.models.text_encoders import NUM_SPECIAL, TextEncoder, WordTokenizer
from stvdm.models.tokenizers import BytePairTokenizer, PieceTokenizer
from stvdm.models.unet import UNet
from stvdm.sampling import denoising, first_frame
from stvdm.sampling.denoising import SAMPLERS, Models

Tree = Any

NETWORKS: dict[str, Any] = {"dit": DiT, "unet": UNet}  # what a config's model.network says


def build(settings: Mapping[str, Any], *, latent_channels: int) -> Models:
    """The networks of a config's ``model`` and ``text`` sections."""
    text = dict(settings["text"])
    num_words, has_tower = NUM_SPECIAL + len(text.pop("words")), bool(text.get("tower"))
    for name in ("tower", "tower_dtype", "padding"):  # models of before there were towers do not say
        text.pop(name, None)
    model = {
        name: tuple(value) if isinstance(value, list) else value for name, value in dict(settings["model"]).items()
    }
    # Models of before these were settings have none.
    network, matmul = NETWORKS[str(model.pop("network", "dit"))], str(model.pop("matmul", ""))
    return Models(
        dit=quantized(network(latent_channels=latent_channels, text_width=text["width"], **model), matmul),
        text=None if has_tower else TextEncoder(vocabulary_size=num_words, **text),
    )


def reader_of(settings: Mapping[str, Any], place: epath.PathLike | None = None) -> towers.Reader | None:
    """The tower that reads captions for a model with this config; None if it has a small encoder of its own.

    Args:
      place: where the tower lies, if not where the config says.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is not as wide as the config says.
    """
    text = settings["text"]
    if not text.get("tower"):
        return None
    reader = towers.reader(place or text["tower"], max_tokens=text["max_tokens"], dtype=text["tower_dtype"])
    if reader.model.width != text["width"]:
        raise ValueError(
            f"text.width={text['width']}: the tower {str(place or text['tower'])!r} gives {reader.model.width}; set "
            f"text.width={reader.model.width}, or name another tower."
        )
    return reader


def looker_of(settings: Mapping[str, Any], place: epath.PathLike | None = None) -> towers.Looker | None:
    """The tower that looks at images for a model with this config; None if its network reads none, or none is named.

    Args:
      place: where the tower lies, if not where the config says.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is not as wide as the network expects.
    """
    width, image = settings["model"].get("image_width", 0), settings.get("image") or {}
    place = place or image.get("tower")
    if not width or not place:
        return None
    looker = towers.looker(place, dtype=image.get("tower_dtype", "bfloat16"))
    if looker.model.width != width:
        raise ValueError(
            f"model.image_width={width}: the tower {str(place)!r} gives {looker.model.width}; name another tower."
        )
    return looker


def read_captions(
    reader: towers.Reader, captions: Sequence[str], settings: Mapping[str, Any]
) -> tuple[jax.Array | np.ndarray, np.ndarray]:
    """(text_BSE, mask_BS) of captions as the model with this config takes them from its tower."""
    text_BSE, mask_BS = reader(captions)
    return text_BSE, looked_at(mask_BS, settings)


def looked_at(mask_BS: Any, settings: Mapping[str, Any]) -> Any:
    """Where a model with this config looks, of a tower's text that is real where the mask is True."""
    return mask_BS | (settings["text"]["padding"] == "zeros")


@dataclasses.dataclass(frozen=True)
class Result:
    """Videos, the normalised latents they were decoded from, and all that is needed to make them again."""

    videos: np.ndarray  # uint8 (n, T, H, W, 3)
    latents: np.ndarray  # float32 (n, t, h, w, z)
    prompts: list[str]  # one a video
    seeds: list[int]  # one a video
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model that can be sampled. ``params`` are {"autoencoder", "statistics", "dit", "text"}: the last but where a
    published tower reads the prompts; two networks that take turns in place of "dit", "dit_high_noise" and
    "dit_low_noise"."""

    autoencoder: Autoencoder
    models: Models
    tokenizer: WordTokenizer | BytePairTokenizer | PieceTokenizer
    params: Tree
    settings: dict[str, Any]  # the config it was trained with
    digest: str  # sha256 of its weights; with adapters, of that of each part and how much of it
    reader: towers.Reader | None = None
    looker: towers.Looker | None = None

    @classmethod
    def load(
        cls,
        path: epath.PathLike | None = None,
        *,
        tower: epath.PathLike | None = None,
        image_tower: epath.PathLike | None = None,
        adapters: Sequence[tuple[epath.PathLike, float]] = (),
    ) -> Pipeline:
        """The model in a folder: an exported one, or the run that exported it; without a path the bundled one.

        Args:
          tower: where the published tower lies that reads its prompts, if not where it lay in training.
          image_tower: the same of the one that looks at images, if its network reads them.
          adapters: folders of trained adapters, each with its weight. They stay beside the model's weights;
            `lora.merged` adds them up. A path of adapters alone is that of their base, with them.

        Raises:
          FileNotFoundError: if there is no model, or not its towers.
          ValueError: if the files are damaged, the model is an autoencoder alone, or adapters are for a network that it
            has not.
        """
        params, description = load_whole(bundled() if path is None else path)
        if description["kind"] == "lora":
            adapters, base = [(path or "", 1.0), *adapters], description["base"]
            try:
                params, description = load_whole(base)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path}: adapters, trained beside the model in {base!r}, which is not there; give that model "
                    "where it lies now, and these as `adapters` (`--checkpoint`, `--lora`)."
                ) from error
        if description["kind"] != "dit":
            remedy = {
                "autoencoder": "train a transformer on it with `stvdm train dit`, and give that folder.",
                "transformers": "import it with its autoencoder and its tower (`stvdm import --vae --tower`).",
            }.get(description["kind"], "give a trained or imported transformer.")
            raise ValueError(
                f"{path}: this is a model of kind {description['kind']!r}, which makes no videos by itself; {remedy}"
            )
        trained = [(adapters_of(place, description["sha256"]), weight) for place, weight in adapters]
        if trained:
            params = {**params, **lora.beside(transformers_of(params, trained), trained)}
            theirs = [(checkpoint.describe_model(model_folder(place))["sha256"], weight) for place, weight in adapters]
            parts = json.dumps([description["sha256"], *sorted(theirs)])
            description = {**description, "sha256": hashlib.sha256(parts.encode()).hexdigest()}
        reader = reader_of(description["config"], tower)
        looker = looker_of(description["config"], image_tower)
        return cls.of(params, description, reader=reader and reader.on(), looker=looker)

    @classmethod
    def of(
        cls,
        params: Tree,
        description: Mapping[str, Any],
        *,
        reader: towers.Reader | None = None,
        looker: towers.Looker | None = None,
    ) -> Pipeline:
        """The pipeline of weights and description as `checkpoint.load_model` gives them, and of the towers that it
        has."""
        settings = description["config"]
        coder = autoencoder_of(description["autoencoder"])
        words = WordTokenizer(tuple(settings["text"]["words"]), settings["text"]["max_tokens"])
        models = build(settings, latent_channels=coder.latent_channels)
        tokenizer = words if reader is None else reader.tokenizer
        return cls(coder, models, tokenizer, params, settings, description.get("sha256", ""), reader, looker)

    @property
    def networks(self) -> Tree:
        """Of its weights those that `denoising.denoise` takes."""
        names = ("dit", denoising.HIGH, denoising.LOW, "text")
        return {name: self.params[name] for name in names if name in self.params}

    def words(self, captions: Sequence[str]) -> tuple[Any, np.ndarray]:
        """What `denoising` takes of captions: (tokens_BS, mask_BS), or, read by a tower, (text_BSE, mask_BS)."""
        if self.reader is None:
            return self.tokenizer(captions)
        return read_captions(self.reader, captions, self.settings)

    @property
    def default_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the longest clips it was trained on."""
        return largest_clip(self.settings)

    @property
    def fps(self) -> float:
        return self.settings["data"]["fps"]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num: int = 1,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        negative: str | None = None,
        image: np.ndarray | first_frame.Given | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_low: float | None = None,
        sampler: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
        made: Callable[[Result], None] | None = None,
    ) -> Result:
        """Videos of the prompts, ``num`` of each, with the seeds seed, seed + 1, ...; what is None is as in training.

        Args:
          seeds: one seed for each prompt, in place of ``seed`` (and then ``num`` is 1).
          negative: a prompt that guidance leads away from.
          image: what all clips begin with, bytes (H, W, 3) of any size; cut to the sides of the clips. Or what the
            network is given of images, one for each of ``batch_size`` clips.
          guidance_low: of two networks that take turns, that of the second.
          batch_size: videos made side by side.
          progress: called with (steps done, steps in all), over all videos.
          made: called with the videos of each batch, as soon as they are decoded.

        Raises:
          ValueError: for a prompt with words the model never saw, a size it cannot make, an image that it cannot take
            or the lack of one, or another setting that means nothing.
        """
        # Models of before some were settings do not say them all.
        chosen = {**base.dit().sample.to_dict(), **self.settings["sample"]}
        asked = dict(steps=steps, guidance=guidance, sampler=sampler, negative=negative, guidance_low=guidance_low)
        chosen.update({name: value for name, value in asked.items() if value is not None})
        T, H, W = self.default_shape
        shape = (
            T if num_frames is None else num_frames,
            H if height is None else height,
            W if width is None else width,
        )
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: expected a list of sentences, so write [{prompts!r}].")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1 video.")
        if guidance_low is not None and denoising.HIGH not in self.params:
            warnings.warn(f"guidance_low={guidance_low} has no effect: this model has one network.", stacklevel=2)
        videos_to_make = [(prompt, seed + i) for prompt in prompts for i in range(num)]
        if seeds is not None:
            if (len(seeds), num) != (len(prompts), 1):
                raise ValueError(
                    f"{len(seeds)} seeds for {len(prompts)} prompts, num={num}: expected one for each, and num=1."
                )
            videos_to_make = list(zip(prompts, seeds, strict=True))
        self._check(prompts, [s for _, s in videos_to_make], chosen, num)
        latent_thw = self.autoencoder.latent_shape(shape, self.models.dit.patch)
        trained = [tuple(bucket[:3]) for bucket in self.settings["data"]["buckets"]]
        if shape not in trained:
            known = ", ".join(map(str, trained))
            warnings.warn(f"clips of {shape}: the model was trained on {known}, and may do worse.", stacklevel=2)

        stops = self.stops(chosen, latent_thw)
        how = denoising.how_of(self.settings["flow"], chosen)
        given = self._given(image, shape, batch_size)
        null = self.words([chosen["negative"]] * batch_size)
        settings = dict(
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in chosen.items()
                if name != "previews"
            },
            num_frames=shape[0],
            height=shape[1],
            width=shape[2],
            fps=self.fps,
            batch_size=batch_size,
            model_sha256=self.digest,
        )
        if isinstance(image, np.ndarray):
            settings["image_sha256"] = hashlib.sha256(image.tobytes()).hexdigest()
        total = chosen["steps"]
        results: list[Result] = []
        for start in range(0, len(videos_to_make), batch_size):
            part = videos_to_make[start : start + batch_size]
            padded = part + [part[-1]] * (batch_size - len(part))  # one compiled shape
            noise = jnp.stack([noise_of(s, (*latent_thw, self.autoencoder.latent_channels)) for _, s in padded])
            prompt = self.words([text for text, _ in padded])
            if progress is not None:
                before, everything = start * total, len(videos_to_make) * total
                _relay.listener = functools.partial(_tell, progress, before, len(part), everything)
            callback = None if progress is None else _relay
            denoised = denoising.denoise(
                self.models, self.networks, noise, stops, prompt, null, how=how, given=given, callback=callback
            )
            latent = checkpoint.on_host(denoised)  # in a training it may lie split over all processes
            videos, n = self.decode(latent), len(part)
            results.append(Result(videos[:n], latent[:n], [text for text, _ in part], [s for _, s in part], settings))
            if made is not None:
                made(results[-1])
        return Result(
            videos=np.concatenate([result.videos for result in results]),
            latents=np.concatenate([result.latents for result in results]),
            prompts=[prompt for prompt, _ in videos_to_make],
            seeds=[s for _, s in videos_to_make],
            settings=settings,
        )

    def stops(self, chosen: Mapping[str, Any], latent_thw: Sequence[int]) -> schedules.Stops:
        """Where it stops on its way to such latents, by the settings of a sample."""
        shift = chosen["shift"] or shift_of(latent_thw, self.autoencoder, self.settings)
        return schedules.stops(chosen["steps"], shift=shift, spacing=chosen["spacing"])

    def _given(
        self, image: np.ndarray | first_frame.Given | None, shape: tuple[int, int, int], batch_size: int
    ) -> first_frame.Given:
        if isinstance(image, first_frame.Given):
            return image
        if image is None:
            first_frame.check_needless(self.models.dit)
            return denoising.NOTHING

        def encode(video: jax.Array) -> jax.Array:
            chunks = autoencoder3d.stream_encode(self.autoencoder, self.params["autoencoder"], video)
            mean = jnp.concatenate([mean for mean, _ in chunks], axis=1)
            return autoencoder3d.normalise(mean, self.params["statistics"])

        return first_frame.given(
            image,
            shape,
            self.models.dit,
            encode=encode,
            temporal=self.autoencoder.temporal,
            look=self.looker,
            batch_size=batch_size,
        )

    def encode(self, video_BTHWC: np.ndarray | jax.Array) -> jax.Array:
        """The normalised latent of uint8 videos."""
        mean, _ = _encode(self.autoencoder, self.params["autoencoder"], to_model_range(video_BTHWC))
        return autoencoder3d.normalise(mean, self.params["statistics"])

    def decode(self, latent_Bthwz: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 videos of normalised latents, one latent frame at a time through the decoder."""
        latent = autoencoder3d.denormalise(jnp.asarray(latent_Bthwz), self.params["statistics"])
        chunks = autoencoder3d.stream_decode(self.autoencoder, self.params["autoencoder"], latent, chunk_latents=1)
        return np.concatenate([to_uint8(chunk) for chunk in chunks], axis=1)

    def _check(self, prompts: Sequence[str], seeds: Sequence[int], chosen: Mapping[str, Any], num: int) -> None:
        if not prompts:
            raise ValueError("prompts=[]: expected at least one sentence.")
        if num < 1:
            raise ValueError(f"num={num}: expected at least 1 video of each prompt.")
        if chosen["sampler"] not in SAMPLERS:
            raise ValueError(f"sampler={chosen['sampler']!r}: expected one of {', '.join(SAMPLERS)}.")
        if chosen["steps"] < 1:
            raise ValueError(f"steps={chosen['steps']}: expected at least 1 denoising step.")
        for name in ("guidance", "guidance_low"):
            if not (math.isfinite(chosen[name]) and chosen[name] >= 0):
                raise ValueError(f"{name}={chosen[name]}: expected a number of at least 0; 1 is no guidance.")
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed={seed}: expected a whole number from 0 to {2**32 - 1}.")
        for prompt in prompts:
            problem = self.tokenizer.problem(prompt)
            if problem:
                raise ValueError(problem)
        problem = chosen["negative"] and self.tokenizer.problem(chosen["negative"])
        if problem:
            raise ValueError(f"negative {problem}")
        if chosen["negative"] and chosen["guidance"] == 1 and chosen["guidance_low"] in (0, 1):
            warnings.warn(f"negative={chosen['negative']!r}: guidance=1 leads away from nothing.", stacklevel=3)


def load_whole(path: epath.PathLike) -> tuple[Tree, dict[str, Any]]:
    """(params, description) of the model in the folder of a run or of an export.

    A training of one of two networks that take turns left that one: the other is that of the model it started from.
    """
    params, description = checkpoint.load_model(model_folder(path))
    settings = description.get("config", {})
    if description["kind"] != "dit" or not settings.get("turn") or "dit" not in params:  # merged, it has both
        return params, description
    start, _ = load_whole(settings["start_from"])
    trained = params.pop("dit")
    both = {name: start[name] for name in (denoising.HIGH, denoising.LOW)}
    return {**params, **both, f"dit_{settings['turn']}": trained}, description


def transformers_of(params: Tree, adapters: lora.Weighted) -> Tree:
    """Of a model's weights those that adapters are for, or may be.

    Raises:
      ValueError: if some are for a network that it has not.
    """
    found = {name: params[name] for name in ("dit", denoising.HIGH, denoising.LOW) if name in params}
    for name in {name for tree, _ in adapters for name in tree}:
        if name not in found:
            raise ValueError(f"these adapters are for the network {name!r}, and this model has {', '.join(found)}.")
    return found


def adapters_of(path: epath.PathLike, base: str) -> Tree:
    """The adapters in the folder of a run or of an export, under the name of the network that they are for; a warning
    if they were trained beside other weights.

    Args:
      base: the digest of the weights that they are for now.

    Raises:
      ValueError: if it holds a model of another kind.
    """
    params, description = checkpoint.load_model(model_folder(path))
    if description["kind"] != "lora":
        raise ValueError(f"{path}: a model of kind {description['kind']!r}, expected adapters, 'lora'.")
    if description.get("base_sha256") not in (None, base):
        warnings.warn(
            f"{path}: these adapters were trained beside weights of sha256 {description['base_sha256'][:12]}..., "
            f"not beside {base[:12]}..., and may do other than there.",
            stacklevel=3,
        )
    return {description.get("network", "dit"): params["dit"]}


def autoencoder_of(model: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder with these settings (a config's ``model`` section, also as it comes back from JSON)."""
    return Autoencoder(**{name: tuple(value) if isinstance(value, list) else value for name, value in model.items()})


def largest_clip(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """(T, H, W) of the largest of a config's buckets."""
    T, H, W, *_ = max(settings["data"]["buckets"], key=lambda bucket: math.prod(bucket[:3]))
    return T, H, W


def shift_of(latent_thw: Sequence[int], coder: Autoencoder, settings: Mapping[str, Any]) -> float:
    """The shift of times by token count, for clips with such latents: what shift 0 stands for in a config.

    It is 1 for a clip of ``flow.base_tokens``, or of as many as the largest bucket has; more tokens lean to noise.
    """

    def tokens(thw: Sequence[int]) -> int:
        return math.prod(shapes.token_grid(tuple(thw), tuple(settings["model"]["patch"])))

    base = settings["flow"].get("base_tokens") or tokens(coder.latent_shape(largest_clip(settings)))
    return schedules.shift_for_tokens(tokens(latent_thw), base_tokens=base)


def to_model_range(video: np.ndarray | jax.Array) -> jax.Array:
    """Pixels as video in [-1, 1], on the device."""
    return jnp.asarray(video, jnp.float32) / 127.5 - 1


def to_uint8(video: np.ndarray | jax.Array) -> np.ndarray:
    """Video in [-1, 1] as pixels; what lies outside is clipped."""
    return checkpoint.on_host(jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8))


def noise_of(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """The noise that the clip of a seed begins as; ``shape`` is (t, h, w, z)."""
    return jax.random.normal(jax.random.key(seed), shape)


def bundled() -> epath.Path:
    """The folder of the model that comes with the package."""
    return epath.Path(str(importlib.resources.files("stvdm") / "bundled"))


def model_folder(path: epath.PathLike) -> epath.Path:
    """Where a path's model lies: the folder itself, or the ``model`` in a run's folder."""
    folder = epath.Path(path).expanduser()
    return folder / "model" if (folder / "model").exists() else folder


def _tell(progress: Callable[[int, int], None], made: int, num_videos: int, total: int, done: int) -> None:
    """Steps of one batch of videos, as steps of all of them."""
    progress(made + done * num_videos, total)


class _Relay:
    """Passes on the number of steps done. One object for all runs, since `denoise` compiles anew for each callback."""

    listener: Callable[[int], None]

    def __call__(self, done: int) -> None:
        self.listener(done)


_relay = _Relay()


@functools.partial(jax.jit, static_argnums=0)
def _encode(autoencoder: Autoencoder, params: Tree, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    return autoencoder.apply({"params": params}, video, method="encode")
