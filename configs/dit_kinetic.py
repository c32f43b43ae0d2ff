# SPDX-License-Identifier: Apache-2.0
"""The transformer of the bundled model: clips of 17x32x32 as 80 tokens, text by cross-attention, full attention.

Two CPU cores, 88 minutes with little else running; what it reached is in stvdm/bundled/README.md.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder
    stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents \
        --config.data.num_clips=40000
    stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder \
        --out=runs/latents_validation --split=validation --config.data.num_clips=1000
    stvdm train dit --config=configs/dit_kinetic.py --workdir=runs/dit

Variants: `full`, and `frame`: the same with each latent frame attending to itself alone, the control that shows what
attention over time is for. Its positions are added to the tokens: turns within a frame do not tell which one it is. On
an accelerator: --config.model.width=384 --config.model.num_layers=12
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("full", "frame")

# One or two things that keep to the frame and are large enough for 32 pixels: the same as in autoencoder_kinetic.py.
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


def get_config(variant: str = "full") -> ConfigDict:
    config = base.dit()
    config.autoencoder = "runs/autoencoder"
    config.data.source = "latents"
    config.data.world = WORLD
    config.data.path = "runs/latents"
    config.data.validation_path = "runs/latents_validation"
    config.data.buckets = ((17, 32, 32, 32, 1.0),)
    config.model.attention = (variant,)
    config.model.positions = "sincos" if variant == "frame" else "rotary"
    config.model.width = 128
    config.model.num_layers = 6
    config.model.num_heads = 4
    config.model.mlp_width = 512
    config.model.scan_layers = False  # six layers written out take less time on two cores
    config.text.width = 128
    config.text.num_layers = 2
    config.text.max_tokens = 40
    config.flow.mean = 1.2
    config.flow.std = 1.2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "wsd"
    config.total_steps = 8_000
    config.ema_decay = 0.998
    config.export_dtype = "float16"
    config.log_every = 50
    config.eval_every = 1_000
    config.checkpoint_every = 500
    config.sample.steps = 25
    config.sample.guidance = 3.0
    config.sample.previews = (
        "a red ball bounces to the right",
        "a blue square grows",
        "a green triangle slides up and to the left",
        "a yellow ball moves to the left and a cyan square shrinks",
    )
    return config.lock()
