# SPDX-License-Identifier: Apache-2.0
"""The transformer of the bundled model: clips of 17x64x64 as 80 tokens, text by cross-attention, full attention.

Two CPU cores, about 2 hours when idle; what it reached is in stvdm/bundled/README.md.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder
    stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents
    stvdm train dit --config=configs/dit_kinetic.py --workdir=runs/dit

Variants: `full`, and `frame`: the same with each latent frame attending to itself alone, the control that shows what
attention over time is for. On an accelerator: --config.model.width=384 --config.model.num_layers=12
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("full", "frame")


def get_config(variant: str = "full") -> ConfigDict:
    config = base.dit()
    config.autoencoder = "runs/autoencoder"
    config.data.source = "latents"
    config.data.path = "runs/latents"
    config.data.buckets = ((17, 64, 64, 64, 1.0),)
    config.model.attention = (variant,)
    config.model.width = 192
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.mlp_width = 768
    config.text.width = 128
    config.text.num_layers = 2
    config.text.max_tokens = 40
    config.flow.mean = 1.2
    config.flow.std = 1.2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "linear"
    config.total_steps = 8_000
    config.ema_decay = 0.998
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
