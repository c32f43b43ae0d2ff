# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of the bundled model: clips of 17x32x32x3 to latents of 5x8x8x8, 20 times fewer values.

Two CPU cores, about 25 minutes when idle; what it reached is in stvdm/bundled/README.md.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder

Variants: `uniform` (frames in equal groups of 4: clips of 16) and `frame` (each frame alone, a quarter of the channels
for as many latent values: the 2-D control). On an accelerator: --config.model.width=96 --config.model.num_res_blocks=2
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("causal", "uniform", "frame")

# One or two things that keep to the frame and are large enough for 32 pixels: the same as in dit_kinetic.py.
MOTION_WEIGHTS = {
    **dict(left=3.0, right=3.0, up=2.0, down=2.0, up_left=1.5, up_right=1.5, down_left=1.5, down_right=1.5),
    **dict(bounce_left=3.0, bounce_right=3.0, bounce_in_place=2.0, grow=3.0, shrink=3.0),
}
WORLD = (
    ("num_things", (0.7, 0.3)),
    ("motions", tuple(MOTION_WEIGHTS)),
    ("motion_weights", tuple(MOTION_WEIGHTS.values())),
    ("radius", (0.16, 0.21)),
    ("backgrounds", ("plain", "gradient")),
    ("pan", 0.0),
)


def get_config(variant: str = "causal") -> ConfigDict:
    config = base.autoencoder()
    config.model.grouping = variant
    config.model.latent_channels = 8
    config.model.unshuffle = 4
    config.model.width = 32
    config.model.multipliers = (1, 2, 2)
    config.model.num_res_blocks = 1
    config.model.spatial_down = (False, False)
    config.model.temporal_down = (True, True)
    config.model.convolution = "separable"
    config.model.shortcuts = True
    config.data.num_clips = 200_000
    config.data.world = WORLD
    config.data.buckets = ((17, 32, 32, 8, 1.0),)
    if variant == "uniform":
        config.data.buckets = ((16, 32, 32, 8, 1.0),)
    if variant == "frame":
        config.model.latent_channels = 2
        config.model.temporal_down = (False, False)
    config.loss.absolute, config.loss.squared = 0.0, 1.0  # on two cores 1 dB better after 300 steps than both
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "linear"
    config.total_steps = 4_000
    config.ema_decay = 0.995
    config.log_every = 50
    config.eval_every = 1_000
    config.eval_batches = 16
    config.checkpoint_every = 500
    config.statistics_batches = 128
    return config.lock()
