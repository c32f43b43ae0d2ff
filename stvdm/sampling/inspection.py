# SPDX-License-Identifier: Apache-2.0
"""Looks inside a model that can be sampled: its latents, its tokens, what a patch attends to, the way from the noise.

    result = pipeline.generate(["a red ball bounces to the right"])
    steps = march(pipeline, result)                                            # what lay between noise and clip
    gaze = gaze_of(pipeline, result.latents[0], result.prompts[0], at=(8, 20, 12), time=0.3)
    overlay(pipeline, result.videos[0], gaze.video_LAthw[3, 0])                # layer 3, head 0, over the pixels
    latent_pictures(result.latents[0]).rgb                                     # principal components as colours

**Attention is read off, not computed again.** out = W v, row by row, whatever the pattern, the kernel, the positions
and the text do to W. So each attention of the model is run once more for every d keys, with unit vectors in place of
the values, and what comes out is W itself: in the model's precision, and exactly zero where a query may not look. That
costs N / d attentions a layer: for looking at short clips, not for the 32,760 tokens of long ones.

Letters beside those of `shapes`: L layers, Q chosen queries. What attention says of a model's reasons is disputed
(Jain and Wallace 2019, arXiv:1902.10186); it says where values are fetched from, and no more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stvdm import shapes
from stvdm.data import kinetic_scene
from stvdm.data.kinetic_scene import Scene
from stvdm.data.video import enlarge
from stvdm.diffusion import flow, samplers
from stvdm.diffusion.schedules import Stops
from stvdm.models.block import Attention
from stvdm.models.dit import DiT
from stvdm.models.text_encoders import NUM_SPECIAL, WordTokenizer
from stvdm.sampling import denoising
from stvdm.sampling import pipeline as sampling
from stvdm.sampling.denoising import Denoising, Models
from stvdm.sampling.pipeline import Pipeline, Result
from stvdm.shapes import Size3

Tree = Any


# --- attention -------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Attention of chosen tokens, float32; a row is what one token gives each other. Where text is in the sequence the
    rows of both together sum to 1, else those of each; where the time is a token, it has the rest of that sum."""

    video_LBQAN: jax.Array
    words_LBQAS: jax.Array


class Gaze(NamedTuple):
    """What one patch of a clip attends to, in every layer and head."""

    video_LAthw: np.ndarray  # of each token of the video
    words_LAS: np.ndarray  # of each of the words
    words: tuple[str, ...]  # of the prompt, after the "(start)" that every prompt begins with
    token: Size3  # the patch: its (frame, row, column) among the tokens


def gaze_of(
    pipeline: Pipeline,
    latent_thwz: np.ndarray,
    prompt: str,
    *,
    at: Size3,
    time: float = 0.3,
    seed: int = 0,
) -> Gaze:
    """What the patch at a pixel attends to, while the model looks at a clip under noise.

    Args:
      latent_thwz: normalised: of a `Result`, or of `Pipeline.encode`.
      at: (frame, y, x) of a pixel of the clip.
      time: the noise level in [0, 1]: what the model sees is alpha(time) latent + sigma(time) noise.
      seed: of the noise.

    Raises:
      ValueError: for a pixel outside of the clip, a time outside of [0, 1], words the model never saw, or a network
        that is no transformer.
    """
    geometry = geometry_of(pipeline)
    grid = shapes.token_grid(latent_thwz.shape[:3], geometry["patch"])
    video = pipeline.autoencoder.video_shape(latent_thwz.shape[:3])
    if not all(0 <= place < size for place, size in zip(at, video, strict=True)):
        raise ValueError(f"at={at}: expected (frame, y, x) of a pixel of a clip of {video}, counted from 0.")
    token = shapes.token_of_pixel(at, **geometry)
    query_Q = np.array([np.ravel_multi_index(token, grid)])
    found, words = weights_of(pipeline, latent_thwz, prompt, query_Q, time=time, seed=seed)
    num_layers, _, _, num_heads, _ = found.video_LBQAN.shape
    return Gaze(
        video_LAthw=np.asarray(found.video_LBQAN).reshape(num_layers, num_heads, *grid),
        words_LAS=np.asarray(found.words_LBQAS)[:, 0, 0, :, : len(words)],
        words=words,
        token=token,
    )


def weights_of(
    pipeline: Pipeline, latent_thwz: np.ndarray, prompt: str, query_Q: np.ndarray, *, time: float = 0.3, seed: int = 0
) -> tuple[Weights, tuple[str, ...]]:
    """Attention (B = 1) of the tokens of those numbers, and the words of the prompt; the rest is as of `gaze_of`."""
    if not 0 <= time <= 1:
        raise ValueError(f"time={time}: expected a noise level in [0, 1], 0 is data and 1 is noise.")
    if problem := pipeline.tokenizer.problem(prompt):
        raise ValueError(problem)
    if not isinstance(pipeline.tokenizer, WordTokenizer):
        raise ValueError(
            f"text.tower={pipeline.settings['text']['tower']!r}: a published tower's tokens are pieces, which it has "
            "mixed with their neighbours; expected a model with a small encoder, whose words can be named."
        )
    models, params = written_out(pipeline.models, pipeline.params)
    x = flow.interpolate(
        jnp.asarray(latent_thwz)[None],
        sampling.noise_of(seed, latent_thwz.shape)[None],
        time,
        path=denoising.objective(pipeline.settings["flow"]).path,
    )
    tokens_BS, mask_BS = pipeline.tokenizer([prompt])
    found = attention_weights(models, params, x, np.full(1, time, np.float32), tokens_BS, mask_BS, query_Q)
    words = [pipeline.tokenizer.words[number - NUM_SPECIAL] for number in tokens_BS[mask_BS][1:]]
    return found, ("(start)", *words)


@functools.partial(jax.jit, static_argnames="models")
def attention_weights(
    models: Models,
    params: Tree,
    x_Bthwz: jax.Array,
    time_B: jax.Array,
    tokens_BS: jax.Array,
    mask_BS: jax.Array,
    query_Q: jax.Array,
) -> Weights:
    """What the tokens numbered ``query_Q`` attend to, in every layer of a transformer whose layers are written out.

    Args:
      models, params: as `written_out` gives them.
      x_Bthwz: what the model looks at, at the noise levels ``time_B``.
      tokens_BS, mask_BS: of the captions.
    """
    seen: list[tuple[bool, jax.Array]] = []  # (is it attention to a text apart?, weights_BQAM)

    def intercept(next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not (isinstance(context.module, Attention) and context.method_name == "__call__"):
            return next_call(*args, **kwargs)
        attend, x_BND, *text = args

        def watched(q_BNAd: jax.Array, k_BMAd: jax.Array, v_BMAd: jax.Array) -> jax.Array:
            rows = _rows(functools.partial(attend, q_BNAd, k_BMAd), v_BMAd, query_Q)
            seen.append((any(part is not None for part in text), rows))
            return attend(q_BNAd, k_BMAd, v_BMAd)

        return next_call(watched, x_BND, *text, **kwargs)

    text_BSE = models.read(params, tokens_BS, mask_BS)
    with nn.intercept_methods(intercept):
        models.predict(params, x_Bthwz, time_B, text_BSE, mask_BS)
    video = jnp.stack([rows for is_apart, rows in seen if not is_apart])
    num_tokens = math.prod(shapes.token_grid(x_Bthwz.shape[1:4], models.dit.patch))
    apart = [rows for is_apart, rows in seen if is_apart]
    words = jnp.stack(apart) if apart else video[..., num_tokens:]  # text in the sequence follows the video
    return Weights(video[..., :num_tokens], words[..., : text_BSE.shape[1]])  # and the time, if a token, follows both


def _rows(attend: Callable[[jax.Array], jax.Array], v_BMAd: jax.Array, query_Q: jax.Array) -> jax.Array:
    """weights_BQAM of out = W v: with unit vectors for v, d keys at a time."""
    num_keys, width = v_BMAd.shape[1], v_BMAd.shape[-1]
    parts = []
    for first in range(0, num_keys, width):
        unit_Md = jnp.eye(num_keys, width, k=-first, dtype=v_BMAd.dtype)
        out_BNAd = attend(jnp.broadcast_to(unit_Md[:, None], v_BMAd.shape))
        parts.append(out_BNAd[:, query_Q])
    return jnp.concatenate(parts, axis=-1)[..., :num_keys].astype(jnp.float32)


def written_out(models: Models, params: Tree) -> tuple[Models, Tree]:
    """The same transformer with its layers one by one, so that each can be looked into; and its parameters for that.

    Raises:
      ValueError: for a network that is no transformer.
    """
    dit = models.dit
    if not isinstance(dit, DiT):
        raise ValueError(
            f"model.network: this is a {type(dit).__name__}, whose attention stays within a frame or a place; "
            "expected a transformer (model.network='dit')."
        )
    if "dit" not in params:
        raise ValueError("this model has two networks that take turns: put the one to look at as 'dit'.")
    own = dict(params["dit"])
    if dit.scan_layers:
        stacked = own.pop("layers")
        for i in range(dit.num_layers // len(dit.attention)):
            own[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return models._replace(dit=dit.clone(scan_layers=False, remat="nothing")), {**params, "dit": own}


def tokens_showing(pipeline: Pipeline, mask_THW: np.ndarray) -> np.ndarray:
    """bool (t, h, w) over the tokens: those with any of the marked pixels, e.g. of a thing."""
    grid = shapes.token_grid(pipeline.autoencoder.latent_shape(mask_THW.shape), geometry_of(pipeline)["patch"])
    marked = np.zeros(grid, bool)
    np.logical_or.at(marked, _token_of_each_pixel(pipeline, mask_THW.shape), mask_THW)
    return marked


def share_on(gaze: Gaze, tokens_thw: np.ndarray) -> tuple[np.ndarray, float]:
    """How much of what a patch gives to *other frames* falls on marked tokens: (share_LA, chance).

    Chance is the share of the marked among the tokens of those frames; a head that looks nowhere in particular has
    that. A head that gives other frames nothing, by its pattern, has nan.
    """
    other = np.arange(len(tokens_thw)) != gaze.token[0]
    given_LAthw, marked = gaze.video_LAthw[:, :, other], tokens_thw[other]
    whole = given_LAthw.sum(axis=(2, 3, 4))
    share_LA = np.divide(given_LAthw[..., marked].sum(axis=-1), whole, out=np.full_like(whole, np.nan), where=whole > 0)
    return share_LA, float(marked.mean())


class Following(NamedTuple):
    """Of what a thing's patch gives to other frames, where it falls; means over scenes, one number a layer and head."""

    same_LA: np.ndarray  # the share on the same thing
    others_LA: np.ndarray  # the share on other things, where there are any
    chance: float  # the share of those frames' tokens that the same thing covers
    elsewhere_LA: np.ndarray  # how much it gives to other frames at all


def following(pipeline: Pipeline, scenes: Sequence[Scene], *, time: float = 0.3) -> Following:
    """Which heads follow a thing through time: attention of the middle of each scene's first thing, halfway through.

    Clips are rendered and encoded as in training, scene i with the noise of seed i. A token shows a thing where the
    inner half of its radius touches the token's pixels; one that shows two things counts for the first alone.
    """
    T, H, W = pipeline.default_shape
    rows = []
    for seed, scene in enumerate(scenes):
        video_THWC = kinetic_scene.render(scene, T, H, W, pipeline.fps)
        truth = kinetic_scene.ground_truth(scene, T, H, W, pipeline.fps)
        y, x = np.mgrid[:H, :W]
        inside = [
            np.hypot(x - track[:, 0, None, None], y - track[:, 1, None, None]) <= radius[:, None, None] / 2
            for track, radius in zip(truth["tracks"], truth["radius"], strict=True)
        ]
        same_thw, *others = (tokens_showing(pipeline, mask_THW) for mask_THW in inside)
        others_thw = np.any(others, axis=0) & ~same_thw if others else np.zeros_like(same_thw)
        centre_x, centre_y = truth["tracks"][0, T // 2].round().astype(int)
        at = (T // 2, int(np.clip(centre_y, 0, H - 1)), int(np.clip(centre_x, 0, W - 1)))
        latent_thwz = np.asarray(pipeline.encode(video_THWC[None]))[0]
        gaze = gaze_of(pipeline, latent_thwz, scene.caption, at=at, time=time, seed=seed)
        (same_LA, chance), (others_LA, _) = (share_on(gaze, tokens) for tokens in (same_thw, others_thw))
        rows.append((same_LA, others_LA, chance, 1 - gaze.video_LAthw[:, :, gaze.token[0]].sum(axis=(2, 3))))
    same, other, chances, elsewhere = zip(*rows, strict=True)
    return Following(np.mean(same, 0), np.mean(other, 0), float(np.mean(chances)), np.mean(elsewhere, 0))


# --- the way from noise to clip --------------------------------------------------------------------------------------


class March(NamedTuple):
    """The way of one clip from its noise, in n steps; all latents are normalised."""

    times: np.ndarray  # (n + 1,): noise levels, from 1 to 0
    states: np.ndarray  # (n + 1, t, h, w, z): x at those times; the first is the noise, the last the clip
    data: np.ndarray  # (n, t, h, w, z): the clip that the model, at each state, expects to end in


def march(pipeline: Pipeline, result: Result, index: int = 0) -> March:
    """Makes a clip of a result again, and keeps what lay between; each step costs one evaluation more.

    ``data`` is x0 = (sigma' x - sigma v) / (alpha sigma' - sigma alpha') at each state, of the guided velocity. Without
    guidance it is the mean of all clips that could lie behind the noise, blurred early on; with it, pushed beyond.

    Raises:
      ValueError: for a clip that began with an image, or two networks that took turns.
    """
    models, settings = pipeline.models, result.settings
    if "image_sha256" in settings or "dit" not in pipeline.networks:
        raise ValueError("march: expected a clip of a prompt alone, and of one network.")
    shape = result.latents[index].shape
    stops = pipeline.stops(settings, shape[:3])
    states, data = _march(
        models,
        pipeline.networks,
        sampling.noise_of(result.seeds[index], shape)[None],
        stops,
        pipeline.words([result.prompts[index]]),
        pipeline.words([settings["negative"]]),
        how=denoising.how_of(pipeline.settings["flow"], settings),
    )
    return March(np.asarray(stops.times), np.asarray(states)[:, 0], np.asarray(data)[:, 0])


@functools.partial(jax.jit, static_argnames=("models", "how"))
def _march(
    models: Models,
    params: Tree,
    noise_Bthwz: jax.Array,
    stops: Stops,
    prompt: denoising.Words,
    null: denoising.Words,
    *,
    how: Denoising,
) -> tuple[jax.Array, jax.Array]:
    path = how.objective.path
    velocity = denoising.guided_velocity(models, params, prompt, null, how=how, stops=stops)
    states = samplers.sample(
        velocity, noise_Bthwz, stops.times, sampler=denoising.SAMPLERS[how.sampler](path), return_path=True
    )

    def expected(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, t = at
        return flow.estimate(velocity(x, t), x, t, objective=flow.Objective("velocity", path)).data

    return states, jax.lax.map(expected, (states[:-1], stops.times[:-1]))


# --- places ----------------------------------------------------------------------------------------------------------


def geometry_of(pipeline: Pipeline) -> dict[str, Any]:
    """How tokens lie in the pixels of a pipeline's clips: the arguments of `shapes.token_of_pixel` and its inverse."""
    coder = pipeline.autoencoder
    grouping = "causal" if coder.grouping == "causal" else "uniform"  # frame by frame is groups of one
    return dict(
        patch=tuple(pipeline.models.dit.patch), temporal=coder.temporal, spatial=coder.spatial, grouping=grouping
    )


def _token_of_each_pixel(pipeline: Pipeline, video: Sequence[int]) -> tuple[Any, Any, Any]:
    T, H, W = video
    frame, y, x = np.ogrid[:T, :H, :W]
    return shapes.token_of_pixel((frame, y, x), **geometry_of(pipeline))


# --- pictures --------------------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """Latents as colours; ``share`` is how much of their variance each of the three shows."""

    rgb: np.ndarray  # uint8 (..., 3)
    share: np.ndarray  # (3,)


def latent_pictures(latent: np.ndarray, *, channels: Sequence[int] | None = None) -> Pictures:
    """A latent (..., z) as pictures: its three principal components, or three of its channels, as red, green and blue.

    Grey is the mean, and all three share one scale, so that a distance of colours is one of latents; the outermost
    hundredth is clipped. Components are those of all positions together; the largest part of each is positive.

    Raises:
      ValueError: if there are fewer than three channels, or ``channels`` are not three of them.
    """
    z = latent.shape[-1]
    if z < 3 or (channels is not None and (len(channels) != 3 or not all(0 <= c < z for c in channels))):
        raise ValueError(f"channels={channels} of a latent with {z}: expected three, each from 0 to {z - 1}.")
    flat = np.asarray(latent, np.float64).reshape(-1, z)
    flat = flat - flat.mean(axis=0)
    if channels is None:
        _, _, components = np.linalg.svd(flat, full_matrices=False)
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
    else:
        components = np.eye(z)[list(channels)]
    shown = flat @ components[:3].T
    reach = max(float(np.percentile(np.abs(shown), 99)), 1e-12)
    rgb = np.clip(127.5 + 127.5 * shown / reach, 0, 255).round().astype(np.uint8)
    share = shown.var(axis=0) / max(float(flat.var(axis=0).sum()), 1e-12)
    return Pictures(rgb.reshape(*latent.shape[:-1], 3), share)


def overlay(
    pipeline: Pipeline,
    video_THWC: np.ndarray,
    weights_thw: np.ndarray,
    *,
    at: Size3 | None = None,
    min_side: int = 96,
) -> np.ndarray:
    """Weights of tokens in orange over the clip they stand for, in grey: uint8 (T, H', W', 3), enlarged.

    Full orange is the largest weight of the clip. The patch that the pixel ``at`` lies in is framed in green.
    """
    weights_THW = weights_thw[_token_of_each_pixel(pipeline, video_THWC.shape[:3])]
    strength = (weights_THW / max(float(weights_THW.max()), 1e-12))[..., None]
    grey = 0.6 * video_THWC.mean(axis=-1, keepdims=True)
    mixed = (1 - strength) * grey + strength * np.array([255.0, 140.0, 0.0])
    return _framed(pipeline, enlarge(mixed.round().astype(np.uint8), min_side), video_THWC.shape, at)


def token_borders(
    pipeline: Pipeline, video_THWC: np.ndarray, *, at: Size3 | None = None, min_side: int = 96
) -> np.ndarray:
    """The clip, enlarged, with the borders of its tokens in white; the patch that ``at`` lies in framed in green."""
    picture = enlarge(video_THWC, min_side).copy()
    factor = picture.shape[1] // video_THWC.shape[1]
    _, rows, columns = shapes.pixels_of_token((0, 0, 0), **geometry_of(pipeline))
    picture[:, :: rows.stop * factor] = picture[:, :, :: columns.stop * factor] = 255
    return _framed(pipeline, picture, video_THWC.shape, at)


def _framed(pipeline: Pipeline, picture: np.ndarray, video_shape: Sequence[int], at: Size3 | None) -> np.ndarray:
    if at is None:
        return picture
    factor = picture.shape[1] // video_shape[1]
    token = shapes.token_of_pixel(at, **geometry_of(pipeline))
    frames, rows, columns = shapes.pixels_of_token(token, **geometry_of(pipeline))
    top, bottom, left, right = (factor * edge for edge in (rows.start, rows.stop, columns.start, columns.stop))
    inside = picture[frames, top + 2 : bottom - 2, left + 2 : right - 2].copy()
    picture[frames, top:bottom, left:right] = (0, 255, 0)
    picture[frames, top + 2 : bottom - 2, left + 2 : right - 2] = inside
    return picture
