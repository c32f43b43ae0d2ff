# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of the bundled model: clips of 17x64x64 to latents of 5x8x8x16, 13x fewer values.

Two CPU cores, about 40 minutes when idle; what it reached is in stvdm/bundled/README.md.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder

Variants: `uniform` (frames in equal groups of 4: clips of 16) and `frame` (each frame alone, a quarter of the channels
for as many latent values: the 2-D control). On an accelerator: --config.model.width=96 --config.model.num_res_blocks=2
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("causal", "uniform", "frame")


def get_config(variant: str = "causal") -> ConfigDict:
    config = base.autoencoder()
    config.model.grouping = variant
    config.model.latent_channels = 16
    config.model.unshuffle = 4
    config.model.width = 32
    config.model.multipliers = (1, 2, 2)
    config.model.num_res_blocks = 1
    config.model.spatial_down = (True, False)
    config.model.temporal_down = (True, True)
    config.model.convolution = "separable"
    config.model.shortcuts = True
    config.data.num_clips = 200_000
    config.data.buckets = ((17, 64, 64, 4, 1.0),)
    if variant == "uniform":
        config.data.buckets = ((16, 64, 64, 4, 1.0),)
    if variant == "frame":
        config.model.latent_channels = 4
    config.loss.squared = 1.0
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "linear"
    config.total_steps = 5_000
    config.ema_decay = 0.995
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 16
    config.checkpoint_every = 500
    config.statistics_batches = 128
    return config.lock()
