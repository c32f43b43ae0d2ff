# SPDX-License-Identifier: Apache-2.0
"""Trains the 3-D autoencoder; reads from top to bottom.

    stvdm train autoencoder --config=configs/autoencoder_kinetic.py --workdir=runs/autoencoder

    loss = absolute |x - x'| + squared (x - x')² + kl KL(q(z|x) | N(0, 1)) + perceptual distance + balanced adversary

In ``workdir``: ``checkpoints/`` to go on from, ``metrics.jsonl``, ``tensorboard/``, ``previews/`` (clips above their
reconstructions), ``model/`` (the averaged weights and the scale of their latents, for `stvdm train dit`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
from stvdm.planning.flops import model_flops
from stvdm.sampling.pipeline import to_model_range
from stvdm.train import preemption, supervisor
from stvdm.train import state as state_lib
from stvdm.train.state import Program, State, is_due
from stvdm.train.telemetry import Telemetry

Tree = Any
Metrics = dict[str, jax.Array]


def program(config: ConfigDict) -> Program:
    """All that a run with this config compiles. A batch holds "video"."""
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
        rate_now = rate(state.step - state.num_skipped)
        state, taken = state_lib.update(
            state, grads, loss=metrics["loss"], optimizer=optimizer, ema_decay=config.ema_decay
        )
        return state, {**metrics, **taken, "learning_rate": rate_now}

    # Evaluation.
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

    # Telemetry and planning.
    first_loss = functools.partial(loss, step=jnp.zeros((), jnp.int32))

    def work(batch: Tree) -> dict[str, float]:
        params = nn.unbox(jax.eval_shape(init))
        return {"clips": batch["video"].shape[0], "flops": model_flops(first_loss, params, batch)}

    return Program(init, optimizer, first_loss, train_step, evaluate, work)


def main(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains until ``config.total_steps``, from the newest checkpoint in ``workdir`` if there is one."""
    # Config and mesh.
    base.validate(config)
    workdir = epath.Path(workdir).expanduser()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.meet(mesh)
    run = program(config)

    with (
        preemption.watch() as must_leave,
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints, gets_on=supervisor.beat) as checkpoints,
    ):
        # Restore or initialise.
        before = state_lib.config_before(checkpoints, config.kind)
        batches, held_out = state_lib.open_batches(config, mesh)
        state, first_step = state_lib.resume(checkpoints, config, run, mesh, position=batches.position)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        batches.step = first_step
        train_step = jax.jit(run.step, donate_argnums=0, out_shardings=(shardings, None))
        evaluate = jax.jit(run.evaluate, out_shardings=sharding.replicated(mesh))  # so that every process can read it
        only_batch = batches.batch_at(0) if config.overfit else None

        # Loop.
        skips = state_lib.Skips(config.max_skipped, state.num_skipped)
        write_report = state_lib.reporter(batches, checkpoints, workdir, mesh)
        with Telemetry(
            workdir,
            num_steps=config.total_steps,
            first_step=first_step,
            profile=(config.profile.first_step, config.profile.num_steps),
        ) as telemetry:
            report = write_report()
            telemetry.say(str(report))
            if first_step:
                telemetry.say(f"goes on from step {first_step}")
            for change in state_lib.changed_settings(before or config.to_dict(), config.to_dict()):
                telemetry.say(change)
            for step in range(first_step, config.total_steps):
                with telemetry.timed("data"):
                    rows = only_batch or next(batches)
                    batch = state_lib.to_mesh(rows, mesh)
                with telemetry.step(batch, run.work):
                    state, metrics = train_step(state, batch)
                skips.add(step, metrics, rows)
                done = step + 1
                leaving = must_leave(done)
                if leaving or is_due(done, config.log_every, config.total_steps):
                    telemetry.record(done, metrics)
                    skips.check(batches)
                if leaving or is_due(done, config.checkpoint_every, config.total_steps):
                    skips.check(batches)  # a run that must stop would stop again after this step
                    with telemetry.timed("save"):
                        position = {**batches.position, "step": done, "replaced": write_report().replacements}
                        checkpoints.save(done, state, position=position, config=config.to_dict())
                        telemetry.bring()
                if leaving:
                    telemetry.say(f"asked to stop: step {done} is being saved, the same command goes on from it")
                    preemption.leave(checkpoints)
                if is_due(done, config.eval_every, config.total_steps):
                    with telemetry.timed("evaluate"):
                        results = [
                            evaluate(state.ema, state_lib.to_mesh(held_out.batch_at(i), mesh))
                            for i in range(config.eval_batches)
                        ]
                    telemetry.record(done, mean_scores([scores for scores, _ in results]), prefix="eval/")
                    telemetry.preview(done, "reconstruction", results[0][1])

            if (skipped_since := write_report()) != report:
                telemetry.say(str(skipped_since))

            # Finish: the averaged weights, and the scale of the latents they make.
            statistics = latent_statistics(Autoencoder(**config.model), state.ema, batches, config, mesh)
            params = {"autoencoder": state.ema["autoencoder"], "statistics": statistics}
            description = {"kind": "autoencoder", "autoencoder": config.model.to_dict(), "config": config.to_dict()}
            with telemetry.timed("export"):
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

    def encode(params: Tree, batch: Tree) -> jax.Array:
        return model.apply({"params": params["autoencoder"]}, to_model_range(batch["video"]), method="encode")[0]

    encode = jax.jit(encode, out_shardings=sharding.replicated(mesh))  # so that every process can read it

    def latents() -> Iterator[jax.Array]:
        for i in range(config.statistics_batches):
            supervisor.beat()
            yield encode(params, state_lib.to_mesh(batches.batch_at(i), mesh))

    return autoencoder3d.latent_statistics(latents())
