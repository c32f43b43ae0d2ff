# SPDX-License-Identifier: Apache-2.0
"""Base configs, with every key, its unit and its meaning; `load`, which reads one of `configs/`; `validate`, which
reports all problems at once.

A config is a story: a function in ``configs/`` that edits one of these bases and returns it.

    def get_config(variant: str = "full") -> ConfigDict:
        config = base.dit()
        config.model.width = 1024
        return config
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from stvdm import shapes


def autoencoder() -> ConfigDict:
    """Base config of `stvdm.train.autoencoder`."""
    config = _common()
    config.kind = "autoencoder"
    config.model = _autoencoder_model()
    config.loss = _section(
        absolute=1.0,  # weight of |x - x'|, averaged over values
        squared=0.0,  # weight of (x - x')², averaged over values
        kl=1e-6,  # weight of KL(q(z|x) | N(0, 1)), averaged over latent values
        perceptual=0.0,  # weight of the distance between features of a network with fixed random weights
        adversarial=0.0,  # weight of the discriminator's verdict, balanced by gradient norms
        adversarial_start=0,  # steps before the discriminator's verdict counts
    )
    config.statistics_batches = 32  # training batches behind the per-channel latent mean and deviation
    return config.lock()


def dit() -> ConfigDict:
    """Base config of `stvdm.train.dit`."""
    config = _common()
    config.kind = "dit"
    config.autoencoder = ""  # folder of a trained autoencoder: its run, or its exported model
    config.start_from = ""  # folder of a trained model to start from; weights that it does not have start fresh
    config.turn = ""  # of two networks in `start_from` that take turns, the one to train: high_noise, low_noise
    config.train_only = ""  # a regular expression: the weights that are trained, by their path in the model's file
    config.lora = _section(  # low-rank adapters, trained beside the weights of `start_from`, which stay as they are
        rank=0,  # 0: none, the weights themselves are trained
        targets="attention|mlp",  # a regular expression: the transformer's linear layers that get one, by their path
        scale=1.0,  # of what they add: what files call alpha / rank
    )
    config.model = _section(
        network="dit",  # a spacetime transformer; `unet` has the keys of the other kind
        patch=(1, 2, 2),  # latent positions along time, height, width in one token
        width=384,  # D
        num_layers=12,
        num_heads=6,  # A; D / A is the head width d
        mlp_width=1536,  # F
        extra_channels=0,  # of an image's latent and mask, beside the noisy latent's, of a network that begins with one
        image_width=0,  # of the tokens of an image that are read beside the text; 0: none
        attention=("full",),  # patterns, cycled over layers: full, frame, time, window, block_causal
        window=(1, 4, 4),  # reach of 'window' attention in tokens: time, height, width
        text_path="cross",  # how text enters: 'cross' attention; in self-attention, by the video's weights ('joint') or
        # by its own ('dual')
        time_path="adaln_zero",  # how time does: modulating, 'adaln_zero' or 'adaln'; a token, 'in_context' or
        # 'cross_attention'
        time_features=256,  # sinusoids that describe the noise level
        positions="rotary",  # 'rotary' or 'sincos', computed from the token grid
        rope_theta=1e4,
        qk_norm=True,  # RMS norm of queries and keys
        remat="nothing",  # what the backward pass computes again: nothing, projections, attention, offload, everything
        scan_layers=True,  # one compiled layer, scanned
        dtype="float32",  # of matrix products: float32 or bfloat16 (parameters stay float32)
        matmul="",  # 'int8' or 'fp8': those of the layers in eight bits, by Qwix (extra 'quantized')
    )
    config.text = _section(
        tower="",  # folder or hub's OWNER/NAME of a published T5, UMT5 or CLIP that reads the captions, frozen; without
        # one they are read by a small encoder that trains along
        tower_dtype="bfloat16",  # of its weights and products
        padding="masked",  # what stands behind its text: 'masked' is not looked at, 'zeros' are, as in Wan
        words=(),  # vocabulary of the small one; empty: of the training captions, 20,000 at most, when the run starts
        max_tokens=32,  # S, words of a caption that are read; of a tower its own tokens
        width=128,  # E; with a tower that tower's
        num_layers=2,  # of the small encoder
        num_heads=4,
    )
    config.image = _section(
        tower="",  # folder or hub's OWNER/NAME of a published CLIP that looks at images, for a network that reads them
        tower_dtype="bfloat16",  # of its weights and products
        share=0.0,  # of training clips whose first frame is known, at time 0; of a network with extra_channels it
        # always is, by those
    )
    config.flow = _section(
        path="rectified",  # x_t = (1-t) data + t noise; or 'cosine', variance preserving
        prediction="velocity",  # what the network gives: velocity, epsilon, x0 or v
        density="logit_normal",  # of training times: 'logit_normal' or 'uniform'
        mean=0.0,  # of the logit; above 0 leans towards noise
        std=1.0,  # of the logit
        stratified=True,  # one time from each of B equal strata, in place of B independent times
        shift=1.0,  # times are moved by t -> shift t / (1 + (shift - 1) t); 0: by token count
        base_tokens=0,  # tokens of a clip for which shift 0 is 1; 0: those of the largest bucket
        times=(0.0, 1.0),  # between which training times lie; of two networks that take turns, those of one's turn
        caption_dropout=0.1,  # share of captions replaced by "" (for classifier-free guidance)
    )
    config.sample = _section(  # how previews and evaluation sample, and what `stvdm generate` starts from
        steps=30,  # denoising steps
        sampler="unipc",  # euler, heun, dpm++ or unipc
        guidance=4.0,  # scale of classifier-free guidance; 1: none
        guidance_interval=(0.0, 1.0),  # times between which guidance acts
        guidance_rescale=0.0,  # 0: none, 1: keep the deviation of the conditional prediction
        negative="",  # the prompt that guidance leads away from
        boundary=0.0,  # of two networks that take turns: the time from which on, towards noise, the first one works
        guidance_low=0.0,  # of the second of two networks; 0: as of the first
        shift=1.0,  # of the sampling schedule; 0: by token count
        spacing="even",  # of times before the shift: 'even', or as diffusers' schedulers have it, 'unipc' or 'euler'
        previews=(),  # prompts that are sampled with each evaluation; none: captions of held-out clips
    )
    return config.lock()


def unet() -> ConfigDict:
    """Base config of `stvdm.train.dit` for a U-Net in place of the transformer: `dit` with another ``model``."""
    config = dit().unlock()
    config.model = _section(
        network="unet",
        width=64,  # channels of the finest level; each coarser one has twice as many
        num_heads=4,
        patch=(1, 4, 4),  # latent positions in one of the coarsest level: powers of two, along height and width
        num_blocks=1,  # in each level on the way down; on the way up there is one more
        temporal=True,  # layers over time; without them each frame is made alone
        time_features=256,  # sinusoids that describe the noise level
        remat="nothing",  # what the backward pass computes again: nothing or everything
        dtype="float32",  # of products: float32 or bfloat16
        matmul="",  # 'int8' or 'fp8': products of attention and MLPs in eight bits, by Qwix
    )
    return config.lock()


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `FILE.py` or `FILE.py:variant` with overrides like `--config.model.width=512`.

    Files, variants and overrides are read by `ml_collections.config_flags`; here only its refusals are made legible.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a key that is not in the config (near ones are named), a value of the wrong type, or a file that is
        no config, or raises (its line is named).
    """
    from absl import flags
    from ml_collections import config_flags

    path = spec.split(":", 1)[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={spec}: there is no file {path}; shipped ones are in configs/")

    def parse(*arguments: str) -> ConfigDict:
        argv = ["stvdm", f"--config={spec}", *arguments]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return values.config

    try:
        config = parse()
        is_base = "kind" in (config or ()) and isinstance(config, ConfigDict)
    except Exception as error:  # whatever the file raises, e.g. ValueError for an unknown variant
        if isinstance(error, OSError) and error.errno:
            raise  # which may pass
        raise ValueError(f"--config={spec}: {_told(error, path)}") from error
    if not is_base:
        raise ValueError(
            f"--config={spec}: expected get_config to return a base of stvdm.config, edited, not a "
            f"{type(config).__name__} of its own."
        )
    known = sorted(_keys(config))
    for override in overrides:
        key = re.sub(r"^--?(no)?config\.", "", override.split("=", 1)[0])
        if key not in known:
            raise ValueError(f"--config.{key}: {path} has no such key; {_nearest(key, known)}")
    try:
        config = parse(*overrides)
    except (flags.Error, TypeError) as error:
        raise ValueError(_refused(str(error), overrides, config)) from error
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask absl, and absl is not what parsed our command line
    return config


def validate(config: ConfigDict, *, concerned: tuple[str, ...] = ("",)) -> ConfigDict:
    """The config itself, if a run can start from it; warns of settings that have no effect beside the others.

    Args:
      concerned: how the keys begin that are looked at.

    Raises:
      ValueError: listing every problem, each with what it got, what was expected and what to change.
    """
    problems = [problem for problem in _problems(config) if problem.startswith(concerned)]
    if problems:
        raise ValueError("this config cannot run:\n  - " + "\n  - ".join(problems))
    for setting in _without_effect(config):
        if setting.startswith(concerned):
            warnings.warn(setting, stacklevel=2)
    return config


def with_words(config: ConfigDict, words: Iterable[str]) -> ConfigDict:
    """A copy of the config that names its vocabulary, so that the checkpoint and the exported model carry it."""
    config = config.copy_and_resolve_references()
    config.text.words = tuple(words)
    return config


def flat(config: ConfigDict) -> dict[str, Any]:
    """A config as one level: its keys are "section.key"."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def defaults(kind: str) -> dict[str, Any]:
    """The base config of a kind of training, "dit" or "autoencoder", as one level.

    What a config says beyond it is what a run is of: a key that is added later, with the default that keeps runs as
    they were, changes nothing of those before.
    """
    return flat({"dit": dit, "autoencoder": autoencoder}[kind]())


def compression(model: Any) -> dict[str, Any]:
    """The arguments of `shapes.latent_shape` for an autoencoder with these settings (``config.model``)."""
    by_frame = model["grouping"] == "frame"
    return dict(
        temporal=1 if by_frame else 2 ** sum(model["temporal_down"]),
        spatial=model["unshuffle"] * 2 ** sum(model["spatial_down"]),
        grouping="uniform" if by_frame else model["grouping"],
    )


def _common() -> ConfigDict:
    """What both trainers share."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 10_000  # optimiser steps
    config.overfit = False  # train on one batch again and again: a set-up that works drives its loss down
    config.data = _section(
        source="kinetic_shapes",  # 'kinetic_shapes', 'folder' (your own videos) or 'latents' (from `stvdm preprocess`)
        path="",  # folder of the source; kinetic_shapes without one is rendered as it is read
        validation_path="",  # of 'folder' and 'latents': held-out clips
        validation_share=0.05,  # of 'folder' and 'latents' without that: clips that are held out
        num_clips=50_000,  # clips of the rendered world
        world=(),  # of the rendered world: (field, value) pairs in place of kinetic_shapes.World's defaults
        fps=8.0,  # frames per second that clips are read at
        buckets=((17, 64, 64, 32, 1.0),),  # (num_frames, height, width, global batch, weight), one compiled step each
        num_workers=0,  # processes that read ahead
        flip=False,  # mirror clips left-right; wrong where captions name sides
    )
    config.optimizer = _section(
        name="adamw",  # 'adamw', or 'muon' (matrices by Muon, the rest by AdamW)
        learning_rate=1e-4,  # peak; Muon's updates are scaled to the size of AdamW's, so one rate serves both
        schedule="cosine",  # after the warm-up: 'cosine', 'linear', 'constant', or 'wsd' (constant, then linear)
        warmup_steps=100,
        decay_fraction=0.3,  # of 'wsd': the share of total_steps, at the end, in which the rate falls
        final_fraction=0.0,  # of the peak, at the last step
        b1=0.9,
        b2=0.99,
        moments="float32",  # what first moments are kept in: float32 or bfloat16; second ones stay float32, as their
        # steps of a hundredth are less than bfloat16 can tell
        weight_decay=0.0,
        clip_norm=1.0,  # of the global gradient
        accumulate=1,  # micro-batches whose gradients are averaged into one step
    )
    config.ema_decay = 0.999  # of the averaged weights, which are what is evaluated and exported
    config.max_skipped = 100  # steps with a non-finite loss or gradients that may be skipped before the run stops
    config.mesh = _section(data=-1, fsdp=1, context=1, tensor=1)  # devices along each axis; -1: the rest
    config.topology = ""  # the TPU slice it is meant for, e.g. "v5p:4x4x4": what `stvdm plan --compile` compiles for
    config.num_slices = 1  # equal slices of that topology
    config.export_dtype = "float32"  # of the weights in the exported model: float32, bfloat16 or float16
    config.log_every = 20  # steps
    config.eval_every = 1000  # steps; 0: never
    config.eval_batches = 4  # held-out batches an evaluation looks at, the same every time
    config.checkpoint_every = 1000  # steps
    config.keep_checkpoints = 2
    config.profile = _section(  # a window of steps, for TensorBoard's profiler or Perfetto: in WORKDIR/profile
        first_step=10,  # steps made before it, so that it holds no compiling
        num_steps=0,  # 0: none
    )
    return config


def _autoencoder_model() -> ConfigDict:
    return _section(
        latent_channels=16,  # z
        width=96,  # channels of the first stage
        multipliers=(1, 2, 4, 4),  # of the width, stage by stage
        num_res_blocks=2,  # in each stage of the encoder (the decoder has one more)
        spatial_down=(True, True, True),  # between stages: halve height and width
        temporal_down=(False, True, True),  # between stages: halve time
        unshuffle=1,  # pixels gathered into channels before the first convolution
        convolution="full",  # 'full' 3x3x3, or 'separable': 3x3 in space, then 3 in time
        grouping="causal",  # time: 'causal' 1+(F-1)/t, 'uniform' F/t, or 'frame': each frame alone, as images
        shortcuts=False,  # past each stage that changes size: averages down, copies up
        last_shortcut=False,  # with them: one past the encoder's last stage as well
        upsampling_halves=True,  # channels; if not, the next stage's first block changes them
        decoder_width=0,  # channels of the decoder's last stage; 0: the same as of the encoder's first
        middle_attention=True,  # attention within each frame at the bottleneck
        remat="nothing",  # what the backward pass computes again: nothing or stages
        dtype="float32",
    )


def _section(**keys: Any) -> ConfigDict:
    return ConfigDict(keys, convert_dict=True)


def _choice(where: str, value: Any, options: tuple[str, ...]) -> Iterator[str]:
    if value not in options:
        yield f"{where}={value!r}: expected one of {', '.join(options)}."


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and least <= value <= most


def _each(holds: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda values: (len(values) in lengths if lengths else len(values) > 0) and all(map(holds, values))


def _is_bucket(value: Any) -> bool:
    return _each(_whole(1), 4)(value[:4]) and len(value) == 5 and 0 < value[4] < math.inf


# What is expected of a number -> whether a value is that, and the keys, of all kinds, whose values are to be.
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number of at least 1": (
        _whole(1),
        "total_steps log_every eval_batches checkpoint_every keep_checkpoints statistics_batches num_slices "
        "data.num_clips optimizer.accumulate model.width model.num_layers model.num_heads model.mlp_width "
        "model.latent_channels model.unshuffle text.max_tokens text.width text.num_heads sample.steps",
    ),
    "a whole number of at least 0": (
        _whole(0),
        "eval_every max_skipped data.num_workers optimizer.warmup_steps profile.first_step profile.num_steps "
        "loss.adversarial_start model.num_blocks model.num_res_blocks model.decoder_width model.extra_channels "
        "model.image_width lora.rank text.num_layers flow.base_tokens",
    ),
    "a whole number from 0 to 2**32 - 1": (_whole(0, 2**32 - 1), "seed"),  # JAX takes larger ones modulo 2**32
    "a whole number of at least 1, or -1 (the rest)": (
        lambda value: value == -1 or _whole(1)(value),
        "mesh.data mesh.fsdp mesh.context mesh.tensor",
    ),
    "an even number of at least 2": (lambda value: _whole(2)(value) and value % 2 == 0, "model.time_features"),
    "whole numbers of at least 1": (_each(_whole(1)), "model.multipliers"),
    "three whole numbers of at least 1": (_each(_whole(1), 3), "model.patch"),
    "three whole numbers of at least 0": (_each(_whole(0), 3), "model.window"),
    "entries (num_frames, height, width, batch, weight), of whole numbers and a weight above 0; a single one has a "
    "comma behind it, as ((17, 64, 64, 32, 1.0),)": (_each(_is_bucket), "data.buckets"),
    "a finite number": (math.isfinite, "flow.mean"),
    "a finite number above 0": (
        lambda value: 0 < value < math.inf,
        "data.fps optimizer.learning_rate model.rope_theta lora.scale flow.std",
    ),
    "a finite number of at least 0": (
        lambda value: 0 <= value < math.inf,
        "optimizer.weight_decay optimizer.final_fraction loss.absolute loss.squared loss.kl loss.perceptual "
        "loss.adversarial flow.shift sample.shift sample.guidance sample.guidance_low",
    ),
    "above 0 (1e9 clips nothing)": (lambda value: value > 0, "optimizer.clip_norm"),
    "0 <= share < 1": (lambda value: 0 <= value < 1, "ema_decay optimizer.b1 optimizer.b2 flow.caption_dropout"),
    "0 <= share <= 1": (lambda value: 0 <= value <= 1, "image.share sample.guidance_rescale"),
    "0 < share <= 1": (lambda value: 0 < value <= 1, "optimizer.decay_fraction"),
    "0 < share < 1": (lambda value: 0 < value < 1, "data.validation_share"),
    "0 <= time < 1; 0 where no two networks take turns": (lambda value: 0 <= value < 1, "sample.boundary"),
    "0 <= low < high <= 1, times of which 1 is noise": (
        lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
        "flow.times sample.guidance_interval",
    ),
}


def _problems(config: ConfigDict) -> Iterator[str]:
    numbers = list(_of_numbers(flat(config)))
    yield from numbers
    try:
        yield from _together(config)
    except Exception:
        if not numbers:  # else it comes of those
            raise


def _of_numbers(found: Mapping[str, Any]) -> Iterator[str]:
    for expected, (holds, keys) in _NUMBERS.items():
        for key in keys.split():
            try:
                is_so = key not in found or holds(found[key])
            except (TypeError, ValueError):  # no number at all, e.g. None, or a word in a tuple
                is_so = False
            if not is_so:
                yield f"{key}={found[key]!r}: expected {expected}."


def _together(config: ConfigDict) -> Iterator[str]:
    data, optimizer = config.data, config.optimizer
    yield from _choice("data.source", data.source, ("kinetic_shapes", "folder", "latents"))
    yield from _choice("optimizer.name", optimizer.name, ("adamw", "muon"))
    yield from _choice("optimizer.moments", optimizer.moments, ("float32", "bfloat16"))
    yield from _choice("optimizer.schedule", optimizer.schedule, ("cosine", "linear", "constant", "wsd"))
    if data.source in ("folder", "latents") and not data.path:
        yield f"data.path='': data.source={data.source!r} needs the folder to read."
    for where in ("path", "validation_path"):
        if "://" in data[where]:
            yield (
                f"data.{where}={data[where]!r}: expected a folder, since clips are read as files; mount the bucket on "
                "every host, e.g. with gcsfuse, and give the folder where it is mounted."
            )
    yield from _choice("export_dtype", config.export_dtype, ("float32", "bfloat16", "float16"))
    yield from _choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= config.total_steps:
        fewer = max(0, config.total_steps // 10)
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps}: expected fewer than total_steps={config.total_steps}, "
            f"e.g. --config.optimizer.warmup_steps={fewer}, or optimizer.schedule='constant'."
        )
    shards = math.prod(size for size in (config.mesh.data, config.mesh.fsdp) if size > 0)
    for *_, batch, _ in data.buckets:
        if batch % (shards * optimizer.accumulate):
            yield (
                f"data.buckets batch={batch}: expected a multiple of mesh data x fsdp x optimizer.accumulate "
                f"= {shards * optimizer.accumulate}."
            )
    if config.kind == "autoencoder":
        yield from _autoencoder_problems(config)
    else:
        yield from _dit_problems(config)


def _autoencoder_problems(config: ConfigDict) -> Iterator[str]:
    model = config.model
    yield from _choice("model.grouping", model.grouping, ("causal", "uniform", "frame"))
    yield from _choice("model.convolution", model.convolution, ("full", "separable"))
    yield from _choice("model.remat", model.remat, ("nothing", "stages"))
    if config.data.source == "latents":
        yield "data.source='latents': an autoencoder trains on videos; use 'kinetic_shapes' or 'folder'."
    stages = len(model.multipliers)
    for name in ("spatial_down", "temporal_down"):
        if len(model[name]) != stages - 1:
            yield f"model.{name}={tuple(model[name])}: expected {stages - 1} entries, one between each two stages."
    for bucket in config.data.buckets:
        try:
            _, *sides = shapes.latent_shape(tuple(bucket[:3]), **compression(model))
        except ValueError as error:
            yield f"data.buckets {tuple(bucket[:3])}: {error}"
            continue
        for side, size, axis in zip(("rows", "columns"), sides, ("context", "tensor"), strict=True):
            if size % max(1, config.mesh[axis]):
                yield (
                    f"data.buckets {tuple(bucket[:3])}: its latents have {size} {side}, expected a multiple of mesh."
                    f"{axis}={config.mesh[axis]}, over which they are split."
                )


def _dit_problems(config: ConfigDict) -> Iterator[str]:
    model, flow = config.model, config.flow
    yield from _choice("flow.path", flow.path, ("rectified", "cosine"))
    yield from _choice("flow.prediction", flow.prediction, ("velocity", "epsilon", "x0", "v"))
    yield from _choice("flow.density", flow.density, ("logit_normal", "uniform"))
    yield from _choice("sample.sampler", config.sample.sampler, ("euler", "heun", "dpm++", "unipc"))
    yield from _choice("sample.spacing", config.sample.spacing, ("even", "unipc", "euler"))
    yield from _choice("model.matmul", model.matmul, ("", "int8", "fp8"))
    yield from _choice("model.network", model.network, ("dit", "unet"))
    yield from _unet_problems(model) if model.network == "unet" else _transformer_problems(model)
    yield from _image_problems(config)
    yield from _choice("text.padding", config.text.padding, ("masked", "zeros"))
    yield from _choice("text.tower_dtype", config.text.tower_dtype, ("float32", "bfloat16"))
    yield from _choice("image.tower_dtype", config.image.tower_dtype, ("float32", "bfloat16"))
    split = [("model.num_heads", model.num_heads)]
    if not config.text.tower:
        split.append(("text.num_heads", config.text.num_heads))
        if config.text.width % (2 * config.text.num_heads):
            yield (
                f"text.width={config.text.width}: expected a multiple of 2 * text.num_heads="
                f"{2 * config.text.num_heads}; rotary positions need an even head width."
            )
    if model.network == "dit":
        split.append(("model.mlp_width", model.mlp_width))
    for where, size in split:
        if config.mesh.tensor > 0 and size % config.mesh.tensor:
            yield f"{where}={size}: expected a multiple of mesh.tensor={config.mesh.tensor}, over which it is split."
    if config.turn:
        yield from _choice("turn", config.turn, ("high_noise", "low_noise"))
        edge = config.sample.boundary
        own = (edge, 1.0) if config.turn == "high_noise" else (0.0, edge)
        if not edge:
            yield f"turn={config.turn!r}: expected sample.boundary, the time at which the other network takes over."
        elif tuple(flow.times) != own:
            yield f"flow.times={tuple(flow.times)}: expected {own}, as turn={config.turn!r} and sample.boundary={edge}."
        if not config.start_from:
            yield f"start_from='': turn={config.turn!r} is of a model of two networks, so name its folder."
    if not config.autoencoder:
        yield "autoencoder='': name the folder of a trained autoencoder (`stvdm train autoencoder` makes one)."
    for where, expression in (("train_only", config.train_only), ("lora.targets", config.lora.targets)):
        try:
            re.compile(expression)
        except re.error as error:
            yield f"{where}={expression!r}: expected a regular expression; {error}."
    if config.lora.rank and not config.start_from:
        yield f"start_from='': lora.rank={config.lora.rank} needs the folder of the model that adapters are for."
    if config.lora.rank and config.train_only:
        yield f"train_only={config.train_only!r}: with lora.rank={config.lora.rank} choose layers by lora.targets."


def _transformer_problems(model: ConfigDict) -> Iterator[str]:
    yield from _choice("model.text_path", model.text_path, ("cross", "joint", "dual"))
    paths_of_time = ("adaln_zero", "adaln", "in_context", "cross_attention")
    yield from _choice("model.time_path", model.time_path, paths_of_time)
    if model.time_path == "cross_attention" and model.text_path in ("joint", "dual"):
        yield (
            f"model.time_path='cross_attention': model.text_path={model.text_path!r} has no cross-attention; use "
            "model.text_path='cross', or model.time_path='in_context'."
        )
    yield from _choice("model.positions", model.positions, ("rotary", "sincos"))
    yield from _choice("model.remat", model.remat, ("nothing", "projections", "attention", "offload", "everything"))
    if not model.attention:
        yield "model.attention=(): expected at least one pattern."
    for pattern in model.attention:
        yield from _choice("model.attention", pattern, ("full", "frame", "time", "window", "block_causal"))
    if model.width % model.num_heads:
        yield f"model.width={model.width}: expected a multiple of model.num_heads={model.num_heads}."
    elif model.positions == "rotary" and (model.width // model.num_heads) % 2:
        yield f"model.width / num_heads={model.width // model.num_heads}: rotary positions need an even head width."
    if model.attention and model.num_layers % len(model.attention):
        yield (
            f"model.num_layers={model.num_layers}: expected a multiple of {len(model.attention)}, "
            f"the cycle of model.attention={tuple(model.attention)}."
        )


def _image_problems(config: ConfigDict) -> Iterator[str]:
    model, image = config.model, config.image
    is_dit = model.network == "dit"
    extra, width = (model.extra_channels, model.image_width) if is_dit else (0, 0)
    if image.share and extra:
        yield f"image.share={image.share}: expected 0, as with model.extra_channels={extra} it always is given."
    elif image.share and not (is_dit and model.time_path in ("adaln_zero", "adaln") and model.patch[0] == 1):
        yield (
            f"image.share={image.share}: expected 0, or a network that can be told that one frame is known: "
            "model.network='dit' with time_path='adaln_zero' or 'adaln' and patches of one latent frame."
        )
    if width and not extra:
        yield f"model.image_width={width}: expected 0, or model.extra_channels, which bring the image itself."
    if width and model.text_path != "cross":
        yield f"model.image_width={width}: an image is read by cross-attention; use model.text_path='cross'."
    if width and not image.tower:
        yield f"image.tower='': model.image_width={width} needs the folder of the tower that looks at first frames."
    still = [tuple(bucket[:3]) for bucket in config.data.buckets if bucket[0] == 1]
    if still and (extra or image.share == 1):
        yield f"data.buckets {still[0]}: a clip of one frame that is known leaves nothing to make; use more frames."


def _unet_problems(model: ConfigDict) -> Iterator[str]:
    yield from _choice("model.remat", model.remat, ("nothing", "everything"))
    time, height, width = model.patch
    if time != 1 or height != width or height & (height - 1):
        yield f"model.patch={tuple(model.patch)}: a U-Net halves height and width alike, so use (1, 2**n, 2**n)."
    for divisor in (2 * model.num_heads, 8):
        if model.width % divisor:
            yield f"model.width={model.width}: expected a multiple of {divisor}, for heads and groups of a norm."


def _without_effect(config: ConfigDict) -> Iterator[str]:
    if config.profile.num_steps and config.profile.first_step >= config.total_steps:
        yield f"profile.first_step={config.profile.first_step} has no effect: total_steps={config.total_steps}."
    if config.kind == "autoencoder":
        model = config.model
        if model.grouping == "frame" and any(model.temporal_down):
            yield f"model.temporal_down={tuple(model.temporal_down)} has no effect: model.grouping='frame' keeps time."
        if model.last_shortcut and not model.shortcuts:
            yield "model.last_shortcut=True has no effect: model.shortcuts=False."
        return
    flow, sample, text = config.flow, config.sample, config.text
    if text.tower and text.words:
        yield f"text.words: {len(text.words)} words have no effect: text.tower={text.tower!r} has its own vocabulary."
    if text.padding != "masked" and not text.tower:
        yield f"text.padding={text.padding!r} has no effect: text.tower='', and the small encoder's padding is masked."
    if config.train_only and not config.start_from:
        yield f"train_only={config.train_only!r} without start_from: what is not trained stays as it is drawn."
    if config.lora.rank and config.optimizer.name == "muon":
        yield "optimizer.name='muon' has no effect: adapters are no kernels, so they go to AdamW undecayed."
    if config.data.flip and config.data.source == "latents":
        yield "data.flip has no effect: latents are not mirrored; `stvdm preprocess` would have to."
    if flow.density == "uniform" and (flow.mean, flow.std) != (0.0, 1.0):
        yield f"flow.mean={flow.mean}, flow.std={flow.std} have no effect: flow.density='uniform'."
    if sample.guidance == 1 and (tuple(sample.guidance_interval), sample.guidance_rescale) != ((0.0, 1.0), 0.0):
        yield "sample.guidance_interval and sample.guidance_rescale have no effect: sample.guidance=1 is no guidance."


_CALLED = {  # what others call it -> what it is called here
    "batch_size": "buckets",
    "epochs": "total_steps",
    "resolution": "buckets",
    "gradient_accumulation_steps": "accumulate",
    "dim": "width",
    "hidden_size": "width",
    "depth": "num_layers",
    "cfg_scale": "guidance",
}


def _nearest(key: str, known: Sequence[str]) -> str:
    """Keys of the same name elsewhere, or of another or its initials ("lr"); else those spelled alike; else all."""
    section, _, last = key.rpartition(".")
    ends = {name: name.rpartition(".")[2] for name in known}
    by_name = [name for name, end in ends.items() if end in (last, _CALLED.get(last))]
    initials = [name for name, end in ends.items() if "".join(word[:1] for word in end.split("_")) == last]
    meant = by_name or initials
    near = [name for name in meant if name.rpartition(".")[0] == section] or meant
    near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"


def _told(error: BaseException, path: str) -> str:
    """What a config file raised, which lies below what became of it, and in which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    below = error.__cause__ or error.__context__
    if below is not None and not lines:
        return _told(below, path)
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{error}" if type(error) is ValueError else f"{where}{type(error).__name__}: {error}"


_WRITTEN = {bool: "true or false", int: "a whole number", float: "a number", tuple: "values with commas between them"}


def _refused(said: str, overrides: Sequence[str], config: ConfigDict) -> str:
    """What absl says of an override, in words of what its key holds."""
    blamed = re.match(r"flag --config\.([\w.]+)=", said)
    if blamed is None:
        return said
    key, held = blamed.group(1), flat(config)
    given = next((override for override in overrides if f"config.{key}=" in override), blamed.group())
    if key not in held:
        inside = [name for name in held if name.startswith(f"{key}.")]
        plain = next((name for name in inside if not isinstance(held[name], tuple | str)), inside[0])  # for a shell
        return f"{given}: expected one of the keys in it, e.g. --config.{plain}={held[plain]}."
    return f"{given}: expected {_WRITTEN.get(type(held[key]), 'another value')}, as in {reprlib.repr(held[key])}."


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
