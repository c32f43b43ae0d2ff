# SPDX-License-Identifier: Apache-2.0
"""Trains the spacetime transformer and its text encoder on latents of a trained autoencoder; reads top to bottom.

    stvdm train dit --config=configs/dit_kinetic.py --workdir=runs/dit

    x_t = (1 - t) latent + t noise,      loss = |network(x_t, t, caption) - (noise - latent)|²

In ``workdir``: ``checkpoints/`` to go on from, ``metrics.jsonl``, ``tensorboard/``, ``previews/`` (samples of
``config.sample.previews`` or of held-out captions), ``model/`` (the averaged weights together with the autoencoder:
what `stvdm generate` loads). The latents are read ready-made (``data.source="latents"``) or encoded in the step.

Of two networks that take turns a training is of one (``turn``), at its own times (``flow.times``); `Pipeline.load`
finds the other where this one started from. It makes no previews, which would take both.

With ``lora.rank`` low-rank adapters are trained beside the weights of ``start_from``: those are no part of the state,
have no moments, no average and no gradient, and ``model/`` holds the adapters alone.

Where a published tower reads the captions (``text.tower``) it is frozen, and no part of the step: what it makes of them
lies beside the latents (`stvdm preprocess`), or is computed before each step. So it is with the tower that looks at
images, of a network that begins with one: a clip's image is its own first frame (`sampling.first_frame`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvdm import checkpoint, shapes, sharding
from stvdm import config as base
from stvdm.data.loader import Loader
from stvdm.diffusion import flow
from stvdm.models import lora
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.text_encoders import collect_words
from stvdm.planning.flops import model_flops
from stvdm.sampling import denoising, first_frame, pipeline
from stvdm.sampling.pipeline import Pipeline
from stvdm.train import preemption, split_weights, supervisor
from stvdm.train import state as state_lib
from stvdm.train.batches import (
    Captions,
    batch_reader,
    beginning,
    begins_with_image,
    captions_reader,
    check_buckets,
    check_latents,
    frozen_weights,
    images_reader,
    no_caption,
    previews_of,
    words_tokenizer,
)
from stvdm.train.state import Program, State, is_due
from stvdm.train.telemetry import Telemetry

Tree = Any
Metrics = dict[str, jax.Array]

MAX_CAPTIONS = 20_000  # that are read for the vocabulary
EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the held-out loss is taken, each by itself; of the way through the
# times that are trained


def program(config: ConfigDict, coder: Autoencoder) -> Program:
    """All that a run with this config compiles, for latents of this autoencoder.

    The step is (state, batch, `frozen_weights`) -> (state, metrics), and the batch holds "mask", "tokens" (int; of a
    tower: what it made of them, float), and "latent" (raw) or "video".
    """
    # Networks.
    settings = config.to_dict()
    models = pipeline.build(settings, latent_channels=coder.latent_channels)
    read = batch_reader(config, coder)
    null = no_caption(config)
    if begins_with_image(config):
        first_frame.check(models.dit, coder)
    fresh = initialiser(config, coder)

    def init() -> Tree:
        if not config.lora.rank:
            return fresh()
        key, weights = state_lib.stream(config.seed, 0, "adapters"), jax.eval_shape(fresh)
        return lora.fresh(key, {"dit": weights["dit"]}, rank=config.lora.rank, targets=config.lora.targets)

    def whole(params: Tree, frozen: Tree) -> Tree:
        """All weights: those that are trained, and those that they lie beside."""
        return lora.beside(frozen["base"], [(params, config.lora.scale)]) if config.lora.rank else params

    # Loss.
    objective = denoising.objective(settings["flow"])

    def flow_loss(params: Tree, batch: Tree, time: jax.Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        latent, mask = batch["latent"], batch["mask"]
        text = models.read(params, batch["tokens"], mask)
        given = beginning(config, batch, jax.random.fold_in(key, 1))
        return flow.flow_matching_loss(
            lambda x, t: models.predict(params, x, t, text, mask, given),
            latent,
            jax.random.normal(key, latent.shape),
            time,
            objective=objective,
            mask=None if given.known_B1hwz is None else first_frame.is_known(given, latent.shape[1]),
        )

    def loss(params: Tree, batch: Tree, key: jax.Array, null: Captions = null) -> tuple[jax.Array, Metrics]:
        params = state_lib.left_alone(params, config.train_only)
        key_noise, key_time, key_drop = jax.random.split(key, 3)
        latent, tokens, mask = batch["latent"], batch["tokens"], batch["mask"]
        B = latent.shape[0]
        dropped = jax.random.bernoulli(key_drop, config.flow.caption_dropout, (B, 1))
        tokens = jnp.where(dropped.reshape(B, *[1] * (tokens.ndim - 1)), null[0], tokens)
        mask = jnp.where(dropped, null[1], mask)
        time = flow.sample_times(
            key_time,
            (B,),
            density=config.flow.density,
            mean=config.flow.mean,
            std=config.flow.std,
            stratified=config.flow.stratified,
            shift=config.flow.shift or pipeline.shift_of(latent.shape[1:4], coder, settings),
            within=tuple(config.flow.times),
        )
        losses, parts = flow_loss(params, {**batch, "tokens": tokens, "mask": mask}, time, key_noise)
        return losses.mean(), {"velocity_mse": parts["velocity_mse"].mean()}

    # Step.
    optimizer, rate = state_lib.make_optimizer(config.optimizer, config.total_steps, train_only=config.train_only)

    def gradient(frozen: Tree) -> Callable[[Tree, Tree, jax.Array], tuple[Tree, Metrics]]:
        def here(params: Tree, batch: Tree, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss(whole(params, frozen), batch, key, frozen.get("null", null))

        return state_lib.accumulated_grad(here, config.optimizer.accumulate)

    def kept(params: Tree) -> Tree:
        """The kernels of the transformer's layers in halves, where products are in bfloat16."""

        return split_weights.split(params, is_multiplied) if config.model.dtype == "bfloat16" else params

    def train_step(state: State, batch: Tree, frozen: Tree) -> tuple[State, Metrics]:
        batch = read(frozen, batch)
        rate_now = rate(state.step - state.num_skipped)
        grads, metrics = gradient(frozen)(state.params, batch, state_lib.stream(config.seed, state.step, "flow"))
        state, taken = state_lib.update(
            state, grads, loss=metrics["loss"], optimizer=optimizer, ema_decay=config.ema_decay
        )
        return state, {**metrics, **taken, "learning_rate": rate_now}

    # Evaluation: at fixed times, with fixed noise.
    def held_out_loss(params: Tree, batch: Tree, frozen: Tree, key: jax.Array) -> Metrics:
        batch, params = read(frozen, batch), whole(params, frozen)
        scores, (low, high) = {}, config.flow.times
        for t in (round(low + (high - low) * share, 4) for share in EVAL_TIMES):
            time = jnp.full(batch["latent"].shape[:1], t)
            _, parts = flow_loss(params, batch, time, key)
            scores[f"velocity_mse_at_{t}"] = parts["velocity_mse"].mean()
        return {"velocity_mse": jnp.mean(jnp.stack(list(scores.values()))), **scores}

    # Telemetry and planning.
    def work(batch: Tree) -> dict[str, float]:
        clips = batch["tokens"].shape[0]
        latent = batch["latent"].shape[1:4] if "latent" in batch else coder.latent_shape(batch["video"].shape[1:4])
        channels = {"latent": coder.latent_channels, "extra": first_frame.parts_of(config.model).get("image_latent", 0)}
        made = {name: jax.ShapeDtypeStruct((clips, *latent, z), jnp.float32) for name, z in channels.items() if z}
        batch = {**batch, **made, "image": batch.get("image_tokens")}
        params, weights = nn.unbox(jax.eval_shape(lambda: (init(), fresh())))
        if config.train_only or config.lora.rank:
            both = {"base": weights}, params
            flops = model_flops(loss, both, batch, gradient=lambda both, *rest: gradient(both[0])(both[1], *rest))
        else:
            flops = model_flops(loss, params, batch)
        return {
            "clips": clips,
            "tokens": clips * math.prod(shapes.token_grid(latent, config.model.patch)),
            "flops": flops,
        }

    return Program(init, optimizer, loss, train_step, held_out_loss, work, kept)


def initialiser(config: ConfigDict, coder: Autoencoder) -> Callable[[], Tree]:
    """Makes the boxed weights of step 0, of the transformer, and of the small text encoder if there is one."""
    null = no_caption(config)
    models = pipeline.build(config.to_dict(), latent_channels=coder.latent_channels)
    latent_thw = coder.latent_shape(tuple(config.data.buckets[0][:3]))

    def fresh() -> Tree:
        key_dit, key_text = jax.random.split(jax.random.key(config.seed))
        text = {} if models.text is None else {"text": models.text.init(key_text, *null)["params"]}
        parts = first_frame.parts_of(config.model)
        image = {"image_BSE": jnp.zeros((1, 1, parts["image_tokens"]))} if "image_tokens" in parts else {}
        latent_Bthwz = jnp.zeros((1, *latent_thw, coder.latent_channels + parts.get("image_latent", 0)))
        text_BSE = jnp.zeros((1, config.text.max_tokens, config.text.width))
        time_BK = jnp.zeros((1, 1))
        return {"dit": models.dit.init(key_dit, latent_Bthwz, time_BK, None, text_BSE, **image)["params"], **text}

    return fresh


def main(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains until ``config.total_steps``, from the newest checkpoint in ``workdir`` if there is one."""
    # Config and mesh.
    base.validate(config)
    workdir = epath.Path(workdir).expanduser()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.meet(mesh)

    with (
        preemption.watch() as must_leave,
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints, gets_on=supervisor.beat) as checkpoints,
    ):
        # Autoencoder, data and words.
        before = state_lib.config_before(checkpoints, config.kind)
        coder_params, coder_description = load_autoencoder(config.autoencoder)
        coder = pipeline.autoencoder_of(coder_description["autoencoder"])
        check_buckets(config, coder)
        batches, held_out = state_lib.open_batches(config, mesh)
        check_latents(config, coder_description)
        images_of = images_reader(config, mesh)
        starts = config.start_from and (before is None or config.lora.rank)
        start = start_of(config.start_from, coder_params, turn=config.turn) if starts else None
        config = base.with_words(config, words_of(config, before, start, batches))
        settings = config.to_dict()
        reader = pipeline.reader_of(settings)
        tokenizer = reader.tokenizer if reader else words_tokenizer(config)
        previews = previews_of(config, tokenizer, held_out, mesh)
        reader = reader and reader.on(mesh)
        known = reader and reader.only(["", config.sample.negative, *previews.prompts])
        captions_of = captions_reader(config, reader, mesh)
        del reader  # a tower that reads nothing more than these lets go of its memory

        # Restore or initialise.
        run = program(config, coder)
        state, first_step = state_lib.resume(checkpoints, config, run, mesh, position=batches.position)
        fresh: list[str] = []
        if start is not None and not config.lora.rank:
            state, fresh = state_lib.start_from(state, start.weights)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        frozen = jax.device_put(frozen_weights(config, coder_params), sharding.replicated(mesh))
        if known is not None:
            frozen["null"] = jax.device_put(pipeline.read_captions(known, [""], settings), sharding.replicated(mesh))
        if start is not None and config.lora.rank:
            frozen["base"] = laid_beside(start.weights, base_shapes(config, coder, mesh))
        train_step = jax.jit(run.step, donate_argnums=0, out_shardings=(shardings, None))

        # Evaluation: the loss of held-out clips, and samples of fixed prompts.
        held_out_loss = jax.jit(run.evaluate)
        read_batch = jax.jit(batch_reader(config, coder))

        def evaluate(params: Tree) -> dict[str, float]:
            scores = [
                held_out_loss(
                    params, ready(held_out.batch_at(i)), frozen, state_lib.stream(config.seed, i, "evaluation")
                )
                for i in range(config.eval_batches)
            ]
            return jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(scores))

        def ready(batch: dict[str, Any]) -> Tree:
            arrays: dict[str, Any] = {name: batch[name] for name in ("video", "latent") if name in batch}
            return {**state_lib.to_mesh(arrays, mesh), **captions_of(batch), **images_of(batch)}

        description = {
            "kind": "dit",
            "autoencoder": coder_description["autoencoder"],
            "autoencoder_sha256": coder_description["sha256"],
            "config": settings,
        }

        def samples(params: Tree, prompts: list[str], rows: list[int]) -> np.ndarray:
            networks = lora.beside(frozen["base"], [(params, config.lora.scale)]) if config.lora.rank else params
            model = Pipeline.of({**coder_params, **frozen, **networks}, description, reader=known)
            how: dict[str, Any] = dict(batch_size=len(prompts), progress=lambda *_: supervisor.beat())
            if begins_with_image(config):
                batch = read_batch(frozen, ready(held_out.batch_at(0)))
                how["image"] = jax.tree.map(lambda x: checkpoint.on_host(x)[rows], beginning(config, batch))
                clip = coder.video_shape(batch["latent"].shape[1:4])
                how |= dict(zip(("num_frames", "height", "width"), clip, strict=True))
            return model.generate(prompts, **how).videos

        # Loop.
        batches.step = first_step
        only_batch = batches.batch_at(0) if config.overfit else None
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
            num_params = sum(leaf.size for leaf in jax.tree.leaves(state.ema))
            telemetry.say(f"{num_params:,} parameters, a vocabulary of {len(config.text.words)} words")
            if fresh:
                telemetry.say(f"not in {config.start_from}, so they start fresh: {', '.join(fresh)}")
            if first_step:
                telemetry.say(f"goes on from step {first_step}")
            for change in state_lib.changed_settings(before or settings, settings):
                telemetry.say(change)
            for step in range(first_step, config.total_steps):
                with telemetry.timed("data"):
                    rows = only_batch or next(batches)
                    batch = ready(rows)
                with telemetry.step(batch, run.work):
                    state, metrics = train_step(state, batch, frozen)
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
                        checkpoints.save(done, state_lib.to_save(state), position=position, config=settings)
                        telemetry.bring()
                if leaving:
                    telemetry.say(f"asked to stop: step {done} is being saved, the same command goes on from it")
                    preemption.leave(checkpoints)
                if is_due(done, config.eval_every, config.total_steps):
                    with telemetry.timed("evaluate"):
                        scores = evaluate(state.ema)
                    telemetry.record(done, scores, prefix="eval/")
                    if previews.prompts:
                        with telemetry.timed("evaluate"):
                            videos = samples(state.ema, *previews)
                        telemetry.preview(done, "samples", videos, captions=previews.prompts)

            # Finish.
            if (skipped_since := write_report()) != report:
                telemetry.say(str(skipped_since))
            with telemetry.timed("export"):
                model = {**coder_params, **state.ema}
                if config.lora.rank:
                    assert start is not None
                    model = lora.scaled(state.ema, config.lora.scale)
                    description = {
                        "kind": "lora",
                        "network": f"dit_{config.turn}" if config.turn else "dit",
                        "base": config.start_from,
                        "base_sha256": start.digest,
                        "autoencoder": coder_description["autoencoder"],
                        "config": settings,
                    }
                checkpoint.save_model(workdir / "model", model, description, dtype=config.export_dtype)
            telemetry.say(f"the model is in {workdir / 'model'}")


def load_autoencoder(path: epath.PathLike) -> tuple[Tree, dict[str, Any]]:
    """({"autoencoder", "statistics"}, description) of the run or exported model in a folder."""
    try:
        params, description = checkpoint.load_model(pipeline.model_folder(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"autoencoder: {error}") from error
    return {name: params[name] for name in ("autoencoder", "statistics")}, description


class Start(NamedTuple):
    """A trained model that a training starts from."""

    weights: Tree  # {"dit", "text"}
    words: tuple[str, ...]
    digest: str


def start_of(path: epath.PathLike, coder_params: Tree, *, turn: str = "") -> Start:
    """The model in a folder: a trained or imported one, or an imported transformer alone.

    Args:
      turn: of two transformers that take turns, "high_noise" or "low_noise".

    Raises:
      ValueError: if it is an autoencoder alone, or two transformers where one is meant or the reverse, or its latents
        are of another autoencoder than these.
    """
    params, description = pipeline.load_whole(path)
    kind, takes_turns = description["kind"], denoising.HIGH in params
    if takes_turns != bool(turn):
        has = (
            "a model of two transformers that take turns, and a training is of one"
            if takes_turns
            else "one transformer"
        )
        expected = "turn='high_noise' or 'low_noise'" if takes_turns else "turn=''"
        raise ValueError(f"start_from={str(path)!r}: {has}; expected {expected}, got {turn!r}.")
    if takes_turns:
        params = {**params, "dit": params[f"dit_{turn}"]}
    if kind not in ("dit", "transformers"):
        raise ValueError(f"start_from={str(path)!r}: a model of kind {kind!r}, expected 'dit' or 'transformers'.")
    if kind == "dit":
        ours, theirs = coder_params["statistics"], params["statistics"]
        if not all(np.array_equal(ours[name], theirs[name]) for name in ours):
            raise ValueError(
                f"start_from={str(path)!r}: it was trained on the latents of another autoencoder, expected that of "
                "this config; name the one in that folder as `autoencoder`, or start from another model."
            )
    weights = {name: params[name] for name in ("dit", "text") if name in params}
    words = tuple(description["config"]["text"]["words"]) if kind == "dit" else ()
    return Start(weights, words, description["sha256"])


def raw_weights(workdir: epath.PathLike) -> Tree:
    """The weights of a run's newest checkpoint as they were trained, in place of their average; in the host's memory.

    Args:
      workdir: of a run that has ended, on whichever devices.

    Raises:
      FileNotFoundError: if there is no checkpoint, or no model beside it.
      ValueError: for a run of another kind, or of adapters.
    """
    with checkpoint.Checkpoints(workdir) as checkpoints:
        before = state_lib.config_before(checkpoints, "dit")
        if before is None:
            raise FileNotFoundError(f"{workdir}: no checkpoint here, and weights that are no average lie in one alone.")
        if before["lora"]["rank"]:
            raise ValueError(f"{workdir}: a run of adapters has no weights of its own, so merge its average.")
        config = base.dit().unlock()
        config.update(before)  # which has none of the settings that came later
        coder = pipeline.autoencoder_of(load_autoencoder(workdir)[1]["autoencoder"])
        mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
        with jax.set_mesh(mesh):
            expected = state_lib.abstract_state(program(config, coder), mesh)
            state = checkpoints.restore(expected._replace(params=expected.ema))
            return jax.tree.map(checkpoint.on_host, state.params)


def is_multiplied(path: Any) -> bool:
    """Whether a parameter is a kernel of the transformer's layers, which products in bfloat16 read in bfloat16."""
    names = [entry.key for entry in path]
    return names[0] == "dit" and names[1].startswith("layers") and names[-1] == "kernel"


def base_shapes(config: ConfigDict, coder: Autoencoder, mesh: Mesh) -> Tree:
    """The weights beside which adapters are trained, as shapes: in the type that products read, split over the mesh."""
    boxed = jax.eval_shape(initialiser(config, coder))
    in_half = config.model.dtype == "bfloat16"

    def one(path: Any, leaf: Any, split: Any) -> jax.ShapeDtypeStruct:
        dtype = jnp.bfloat16 if in_half and is_multiplied(path) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=split)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(boxed), sharding.shardings(boxed, mesh))


def laid_beside(weights: Tree, like: Tree) -> Tree:
    """Weights from a file, as `base_shapes` says.

    Raises:
      ValueError: naming those that are missing, left over or of another shape.
    """
    given, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (weights, like))
    shapes_of = lambda tree: {(name, leaf.shape) for name, leaf in tree.items()}  # noqa: E731
    if wrong := sorted(shapes_of(given) ^ shapes_of(wanted)):
        raise ValueError(
            f"start_from: the model of this config is not the one in that folder; they differ in {wrong[:4]}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Make config.model and config.text its own."
        )

    def put(leaf: np.ndarray, there: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, there.sharding, lambda index: leaf[index].astype(there.dtype))

    return jax.tree.map(put, weights, like)


def words_of(
    config: ConfigDict, before: dict[str, Any] | None, start: Start | None, batches: Loader
) -> tuple[str, ...]:
    """The vocabulary: of the checkpoint, the model that is started from, the config or the training captions.

    Raises:
      ValueError: if the config names other words than the model that it starts from reads.
    """
    words = tuple(config.text.words)
    if config.text.tower:
        return ()  # it has its own
    if before is not None:
        return tuple(before["text"]["words"])
    if start is not None:
        if words not in ((), start.words):
            raise ValueError(
                f"text.words: {len(words)} words, expected none, or the {len(start.words)} of the model in "
                f"start_from={config.start_from!r} in their order."
            )
        return start.words
    return words or collect_words(batches.captions(MAX_CAPTIONS))
