# SPDX-License-Identifier: Apache-2.0
"""What a training costs: FLOPs of a step, by the count that a running trainer and `stvdm plan` report, or seconds.

Counted are the products of the transformer and its text encoder, forward and backward, those of attention at the pairs
that a pattern sees (`stvdm.planning.flops`). The autoencoder takes no part: latents are made once, for all cells.

    training_flops(config, coder) * config.total_steps
    seconds_per_step(config, coder) * config.total_steps
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from stvdm import shapes, sharding
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.train import dit as train_dit
from stvdm.train import state as state_lib


def training_flops(config: ConfigDict, coder: Autoencoder) -> float:
    """FLOPs of one optimiser step of a config of `config.dit`, on average over its buckets."""
    work = train_dit.program(config, coder).work
    weights = [bucket[4] for bucket in config.data.buckets]
    steps = [work(batch_of(config, coder, bucket))["flops"] for bucket in config.data.buckets]
    return sum(weight * flops for weight, flops in zip(weights, steps, strict=True)) / sum(weights)


def seconds_per_step(config: ConfigDict, coder: Autoencoder, *, num: int = 15) -> float:
    """Seconds of one optimiser step on the devices here, on average over its buckets, with nothing else to do.

    The median of ``num`` steps on zeros, after those that compile. Other work on the machine counts too.
    """
    config = config.copy_and_resolve_references()
    config.data.source = "latents"
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        run = train_dit.program(config, coder)
        state = state_lib.initialise(run, mesh)
        statistics = {"mean_z": jnp.zeros(coder.latent_channels), "std_z": jnp.ones(coder.latent_channels)}
        step = jax.jit(run.step, donate_argnums=0)
        found = []
        for bucket in config.data.buckets:
            zeros = {name: np.zeros(like.shape, like.dtype) for name, like in batch_of(config, coder, bucket).items()}
            batch, seconds = state_lib.to_mesh(zeros, mesh), []
            for _ in range(2 + num):
                began = time.perf_counter()
                state, metrics = step(state, batch, {"statistics": statistics})
                jax.block_until_ready((state, metrics))
                seconds.append(time.perf_counter() - began)
            found.append(float(np.median(seconds[2:])))
    weights = [bucket[4] for bucket in config.data.buckets]
    return float(np.average(found, weights=weights))


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
