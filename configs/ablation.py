# SPDX-License-Identifier: Apache-2.0
"""What ablations start from, in three sizes; `stvdm ablate` edits it, variant by variant.

    stvdm ablate --list
    stvdm ablate attention --size=tiny

tiny    a small DiT on clips of 17x32x32 with the bundled autoencoder. Three to twenty minutes a
        cell on one idle CPU core; `stvdm ablate --list` says what each grid took.
small   clips of 17x64x64, one accelerator. Unproven. Its autoencoder first:
            stvdm train autoencoder --config=configs/ablation.py:small_autoencoder --workdir=runs/ablations/small
pod     clips of 33x128x128 in bfloat16, encoded in the step. Unproven. Its autoencoder first:
            stvdm train autoencoder --config=configs/ablation.py:pod_autoencoder --workdir=runs/ablations/pod

SIZE_autoencoder is what questions start from that train an autoencoder in each cell. Longer, where a grid is undecided:
--config.total_steps=6000 (the results are then of another kind, and do not mix with the shorter).
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("tiny", "small", "pod", "tiny_autoencoder", "small_autoencoder", "pod_autoencoder")

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


def get_config(variant: str = "tiny") -> ConfigDict:
    size, _, autoencoder = variant.partition("_")
    config = _autoencoder(size) if autoencoder else _dit(size)
    config.data.world = WORLD
    config.optimizer.name = "muon"
    config.optimizer.schedule = "linear"
    config.keep_checkpoints = 1
    return config.lock()


def _dit(size: str) -> ConfigDict:
    config = base.dit()
    config.data.source = "latents"  # `stvdm ablate` encodes them once for all cells, and puts its own folders here
    config.data.path = config.data.validation_path = "runs/ablations/latents"
    config.model.scan_layers = False
    config.flow.mean = 1.2
    config.flow.std = 1.2
    config.sample.steps = 20
    config.sample.guidance = 3.0
    config.log_every = 50
    if size == "tiny":
        config.autoencoder = "stvdm/bundled"
        config.data.num_clips = 20_000
        config.data.buckets = ((17, 32, 32, 32, 1.0),)
        config.model.positions = "sincos"  # so short a training with rotary ones hardly leaves chance (`positions`)
        config.model.width = 96
        config.model.num_layers = 4
        config.model.num_heads = 4
        config.model.mlp_width = 384
        config.text.width = 96
        config.text.max_tokens = 40
        config.optimizer.learning_rate = 4e-3
        config.total_steps = 1_500
        config.ema_decay = 0.99
        config.eval_every = 250
        config.checkpoint_every = 250
    elif size == "small":
        config.autoencoder = "runs/ablations/small"
        config.data.num_clips = 100_000
        config.data.buckets = ((17, 64, 64, 64, 1.0),)
        config.model.width = 256
        config.model.num_layers = 8
        config.model.num_heads = 8
        config.model.mlp_width = 1024
        config.text.max_tokens = 40
        config.optimizer.learning_rate = 3e-3
        config.total_steps = 20_000
        config.ema_decay = 0.999
        config.eval_every = 2_000
        config.checkpoint_every = 2_000
    else:
        config.autoencoder = "runs/ablations/pod"
        config.data.source = "kinetic_shapes"
        config.data.path = config.data.validation_path = ""
        config.data.num_clips = 1_000_000
        config.data.num_workers = 8
        config.data.buckets = ((33, 128, 128, 256, 1.0),)
        config.data.fps = 16.0  # two seconds, in which things keep to the frame
        config.model.width = 768
        config.model.num_layers = 12
        config.model.num_heads = 12
        config.model.mlp_width = 3072
        config.model.scan_layers = True
        config.model.dtype = "bfloat16"
        config.text.max_tokens = 40
        config.mesh.fsdp = 8
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 1_000
        config.total_steps = 100_000
        config.ema_decay = 0.9995
        config.eval_every = 10_000
        config.checkpoint_every = 2_000
    return config


def _autoencoder(size: str) -> ConfigDict:
    config = base.autoencoder()
    model = config.model
    model.unshuffle = 4
    model.multipliers = (1, 2, 2)
    model.num_res_blocks = 1
    model.temporal_down = (True, True)
    model.convolution = "separable"
    model.shortcuts = True
    config.loss.absolute, config.loss.squared = 0.0, 1.0
    config.log_every = 50
    if size == "tiny":
        model.latent_channels = 8
        model.width = 32
        model.spatial_down = (False, False)
        config.data.num_clips = 200_000
        config.data.buckets = ((17, 32, 32, 8, 1.0),)
        config.optimizer.learning_rate = 1e-2
        config.total_steps = 1_500
        config.ema_decay = 0.99
        config.eval_every = 300
        config.eval_batches = 16
        config.checkpoint_every = 300
        config.statistics_batches = 64
    elif size == "small":
        model.latent_channels = 16
        model.width = 64
        model.spatial_down = (True, False)
        config.data.num_clips = 500_000
        config.data.buckets = ((17, 64, 64, 16, 1.0),)
        config.data.num_workers = 8
        config.optimizer.learning_rate = 5e-3
        config.total_steps = 20_000
        config.eval_every = 2_000
        config.checkpoint_every = 2_000
    else:
        model.latent_channels = 16
        model.width = 96
        model.multipliers = (1, 2, 4)
        model.num_res_blocks = 2
        model.spatial_down = (True, False)
        model.dtype = "bfloat16"
        config.data.num_clips = 1_000_000
        config.data.num_workers = 8
        config.data.buckets = ((33, 128, 128, 64, 1.0),)
        config.data.fps = 16.0
        config.mesh.fsdp = 8
        config.optimizer.learning_rate = 3e-3
        config.total_steps = 50_000
        config.eval_every = 5_000
        config.checkpoint_every = 2_000
    return config
