# SPDX-License-Identifier: Apache-2.0
"""Trains the 3-D autoencoder; reads from top to bottom.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder

    loss = absolute |x - x'| + squared (x - x')² + kl KL(q(z|x) | N(0, 1)) + perceptual distance + balanced adversary

In ``workdir``: ``checkpoints/`` to go on from, ``metrics.jsonl``, ``tensorboard/``, ``previews/`` (clips above their
reconstructions), ``model/`` (the averaged weights and the scale of their latents, for `stvdm train dit`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from stvdm import checkpoint, sharding
from stvdm import config as base
from stvdm.data.loader import Loader
from stvdm.evaluation import metrics as measure
from stvdm.models import autoencoder3d, critics
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.sampling.pipeline import to_model_range
from stvdm.train import state as state_lib
from stvdm.train.state import State, is_due
from stvdm.train.telemetry import Telemetry

Tree = Any
Metrics = dict[str, jax.Array]


def main(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains until ``config.total_steps``, from the newest checkpoint in ``workdir`` if there is one."""
    # Config and mesh.
    base.validate(config)
    workdir = epath.Path(workdir).expanduser()
    mesh = sharding.make_mesh(**config.mesh)

    # Model and optimiser.
    model = Autoencoder(**config.model)
    optimizer, rate = state_lib.make_optimizer(config.optimizer, config.total_steps)

    def init() -> Tree:
        T, H, W = config.data.buckets[0][:3]
        video, key = jnp.zeros((1, T, H, W, 3)), jax.random.key(config.seed)
        params = {"autoencoder": model.init(key, video)["params"]}
        if config.loss.adversarial:
            params["discriminator"] = discriminator.init(key, video)["params"]
        return params

    # Critics: features with fixed random weights, and a discriminator that is trained beside the autoencoder.
    discriminator, features = critics.Discriminator(), critics.FeatureNet()
    feature_params: Tree = {}
    if config.loss.perceptual:
        feature_params = nn.unbox(jax.jit(features.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3))))["params"]

    # Step.
    def loss(params: Tree, batch: Tree, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
        video = to_model_range(batch["video"])
        variables = {"params": params["autoencoder"]}
        mean, log_variance = model.apply(variables, video, method="encode")
        decoded = model.apply(variables, autoencoder3d.sample_latent(key, mean, log_variance), method="decode")
        reconstruct = functools.partial(
            critics.reconstruction, absolute=config.loss.absolute, squared=config.loss.squared, video_BTHWC=video
        )
        parts = {"reconstruction": reconstruct(decoded), "kl": autoencoder3d.kl(mean, log_variance)}
        total = parts["reconstruction"] + config.loss.kl * parts["kl"]
        if config.loss.perceptual:
            parts["perceptual"] = critics.perceptual_distance(features, feature_params, decoded, video)
            total += config.loss.perceptual * parts["perceptual"]
        if config.loss.adversarial:
            pull, parts["discriminator"] = critics.adversarial_terms(
                discriminator, params["discriminator"], decoded, video, reconstruction=reconstruct
            )
            weight = critics.ramp(step, weight=config.loss.adversarial, start=config.loss.adversarial_start)
            total += weight * pull + parts["discriminator"]
        return total, parts

    def train_step(state: State, batch: Tree) -> tuple[State, Metrics]:
        gradient = state_lib.accumulated_grad(functools.partial(loss, step=state.step), config.optimizer.accumulate)
        grads, metrics = gradient(state.params, batch, state_lib.stream(config.seed, state.step, "posterior"))
        state, taken = state_lib.update(state, grads, optimizer=optimizer, ema_decay=config.ema_decay)
        return state, {**metrics, **taken, "learning_rate": rate(state.step - 1)}

    # Evaluation.
    @jax.jit
    def evaluate(params: Tree, batch: Tree) -> tuple[Metrics, jax.Array]:
        video = to_model_range(batch["video"])
        decoded = jnp.clip(model.apply({"params": params["autoencoder"]}, video), -1, 1)
        scores = dict(
            psnr=measure.psnr(decoded, video, data_range=2.0),
            ssim=measure.ssim(decoded, video, data_range=2.0),
        )
        if video.shape[1] > 1:  # an image does not flicker
            scores["excess_flicker"] = measure.excess_flicker(decoded, video)
        return {name: jnp.mean(score) for name, score in scores.items()}, jnp.concatenate([video[:4], decoded[:4]])

    with jax.set_mesh(mesh), checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        # Restore or initialise.
        before = state_lib.config_before(checkpoints, config.kind)
        state, shardings = state_lib.initialise(init, optimizer, mesh)
        batches, held_out = state_lib.open_batches(config)
        state, first_step = state_lib.resume(checkpoints, state, batches.position)
        batches.step = first_step
        train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
        only_batch = batches.batch_at(0) if config.overfit else None

        # Loop.
        with Telemetry(workdir, num_steps=config.total_steps, first_step=first_step) as telemetry:
            report = state_lib.write_report(batches.report, workdir)
            telemetry.say(report)
            for change in state_lib.changed_settings(before or config.to_dict(), config.to_dict()):
                telemetry.say(change)
            for step in range(first_step, config.total_steps):
                with telemetry.timed("data"):
                    batch = state_lib.to_mesh(only_batch or next(batches), mesh)
                with telemetry.timed("compile" if step == first_step else "step"):
                    state, metrics = train_step(state, batch)
                done = step + 1
                if is_due(done, config.log_every, config.total_steps):
                    record = telemetry.record(done, metrics)
                    state_lib.check_skipped(record["num_skipped"], config.max_skipped)
                if is_due(done, config.checkpoint_every, config.total_steps):
                    with telemetry.timed("save"):
                        position = {**batches.position, "step": done}
                        checkpoints.save(done, state, position=position, config=config.to_dict())
                if is_due(done, config.eval_every, config.total_steps):
                    with telemetry.timed("evaluate"):
                        results = [
                            evaluate(state.ema, state_lib.to_mesh(held_out.batch_at(i), mesh))
                            for i in range(config.eval_batches)
                        ]
                    telemetry.record(done, mean_scores([scores for scores, _ in results]), prefix="eval/")
                    telemetry.preview(done, "reconstruction", results[0][1])

            if (skipped_since := state_lib.write_report(batches.report, workdir)) != report:
                telemetry.say(skipped_since)

            # Finish: the averaged weights, and the scale of the latents they make.
            statistics = latent_statistics(model, state.ema, batches, config, mesh)
            params = {"autoencoder": state_lib.gathered(state.ema["autoencoder"], mesh), "statistics": statistics}
            if jax.process_index() == 0:
                description = {"kind": "autoencoder", "autoencoder": config.model.to_dict(), "config": config.to_dict()}
                checkpoint.save_model(workdir / "model", params, description, dtype=config.export_dtype)
            telemetry.say(f"the model is in {workdir / 'model'}")


def mean_scores(results: Sequence[Metrics]) -> dict[str, float]:
    """Each score's mean over the batches that have it."""
    names = dict.fromkeys(name for scores in results for name in scores)
    return {name: float(np.mean([scores[name] for scores in results if name in scores])) for name in names}


def latent_statistics(
    model: Autoencoder, params: Tree, batches: Loader, config: ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """Per-channel mean and deviation of the latents of ``config.statistics_batches`` training batches."""

    @jax.jit
    def encode(params: Tree, batch: Tree) -> jax.Array:
        return model.apply({"params": params["autoencoder"]}, to_model_range(batch["video"]), method="encode")[0]

    return autoencoder3d.latent_statistics(
        encode(params, state_lib.to_mesh(batches.batch_at(i), mesh)) for i in range(config.statistics_batches)
    )
