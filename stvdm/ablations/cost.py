# SPDX-License-Identifier: Apache-2.0
"""What a training costs: FLOPs of a step, by the same count that a running trainer and `stvdm plan` report.

Counted are the products of the transformer and its text encoder, forward and backward, those of attention at the pairs
that a pattern sees (`stvdm.planning.flops`). The autoencoder takes no part: latents are made once, for all cells.

    training_flops(config, coder) * config.total_steps
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from stvdm import shapes
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.train import dit as train_dit


def training_flops(config: ConfigDict, coder: Autoencoder) -> float:
    """FLOPs of one optimiser step of a config of `config.dit`, on average over its buckets."""
    work = train_dit.program(config, coder).work
    weights = [bucket[4] for bucket in config.data.buckets]
    steps = [work(batch_of(config, coder, bucket))["flops"] for bucket in config.data.buckets]
    return sum(weight * flops for weight, flops in zip(weights, steps, strict=True)) / sum(weights)


def batch_of(config: ConfigDict, coder: Autoencoder, bucket: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of a bucket: captions as tokens_BS with their mask_BS, and latent_Bthwz."""
    T, H, W, B, _ = bucket
    S = config.text.max_tokens
    return {
        "tokens": jax.ShapeDtypeStruct((B, S), jnp.int32),
        "mask": jax.ShapeDtypeStruct((B, S), jnp.bool_),
        "latent": jax.ShapeDtypeStruct((B, *coder.latent_shape((T, H, W)), coder.latent_channels), jnp.float32),
    }


def grid_of(config: ConfigDict, coder: Autoencoder, bucket: Any) -> tuple[int, int, int]:
    """Tokens along (time, height, width) of the clips of a bucket."""
    T, H, W = bucket[:3]
    return shapes.token_grid(coder.latent_shape((T, H, W)), tuple(config.model.patch))
