# SPDX-License-Identifier: Apache-2.0
"""The whole road in small: autoencoder, latents, transformer, evaluation, from nothing, in about ten minutes.

Two CPU cores. One coloured thing slides before a plain background, 17 frames of 32x32; what to expect is in the README.

    stvdm train autoencoder --config=configs/quickstart.py:autoencoder --workdir=runs/quickstart/autoencoder
    stvdm preprocess --config=configs/quickstart.py:autoencoder --checkpoint=runs/quickstart/autoencoder \
        --out=runs/quickstart/latents
    stvdm train dit --config=configs/quickstart.py:dit --workdir=runs/quickstart/dit
    stvdm evaluate --checkpoint=runs/quickstart/dit --num=64 --output=runs/quickstart/results.json

An hour in place of ten minutes: --config.total_steps=2000 for the autoencoder, 5000 for the transformer.
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("autoencoder", "dit")


def get_config(variant: str = "autoencoder") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    config = _autoencoder() if variant == "autoencoder" else _dit()
    config.data.world = (
        ("num_things", (1.0,)),
        ("motions", ("left", "right", "up", "down")),
        ("motion_weights", (1.0, 1.0, 1.0, 1.0)),
        ("occluder", 0.0),
        ("pan", 0.0),
        ("backgrounds", ("plain",)),
        ("radius", (0.18, 0.24)),
    )
    config.optimizer.name = "muon"
    config.optimizer.schedule = "linear"
    return config.lock()


def _autoencoder() -> ConfigDict:
    config = base.autoencoder()
    config.model.latent_channels = 8
    config.model.unshuffle = 4
    config.model.width = 32
    config.model.multipliers = (1, 2, 2)
    config.model.num_res_blocks = 1
    config.model.spatial_down = (False, False)
    config.model.temporal_down = (True, True)
    config.model.convolution = "separable"
    config.model.shortcuts = True
    config.data.num_clips = 4_000
    config.data.buckets = ((17, 32, 32, 8, 1.0),)
    config.loss.absolute, config.loss.squared = 0.0, 1.0
    config.optimizer.learning_rate = 1e-2
    config.total_steps = 400
    config.ema_decay = 0.99
    config.eval_every = 400
    config.checkpoint_every = 200
    config.statistics_batches = 32
    return config


def _dit() -> ConfigDict:
    config = base.dit()
    config.autoencoder = "runs/quickstart/autoencoder"
    config.data.source = "latents"
    config.data.path = "runs/quickstart/latents"
    config.data.buckets = ((17, 32, 32, 32, 1.0),)
    config.model.width = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.mlp_width = 512
    config.model.scan_layers = False  # layers written out take less time on two cores
    config.text.width = 64
    config.text.num_layers = 1
    config.flow.mean = 1.2
    config.flow.std = 1.2
    config.optimizer.learning_rate = 5e-3
    config.total_steps = 700
    config.ema_decay = 0.99
    config.eval_every = 700
    config.checkpoint_every = 350
    config.sample.steps = 20
    config.sample.guidance = 3.0
    config.sample.previews = ("a red ball moves to the right", "a blue square moves up")
    return config
