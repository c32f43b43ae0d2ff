# SPDX-License-Identifier: Apache-2.0
"""What both trainers share: batches, the state of a run, its optimiser, its update, its random streams.

batches, held_out = open_batches(config)
optimizer, rate = make_optimizer(config.optimizer, config.total_steps)
state, shardings = initialise(init, optimizer, mesh)
state, metrics = update(state, grads, optimizer=optimizer, ema_decay=0.999)     # inside the jitted step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvdm import sharding
from stvdm.checkpoint import Checkpoints
from stvdm.data.folder import SkipReport
from stvdm.data.loader import Loader, Source, check_position, configured_sources, make_loader, served

Tree = Any


class State(NamedTuple):
    """All that a step reads and writes. Random keys and data follow from ``step``, so they are not in it."""

    step: jax.Array  # int32: steps taken, skipped ones included
    params: Tree
    ema: Tree  # exponential moving average of params
    opt_state: optax.OptState
    num_skipped: jax.Array  # int32: steps with non-finite gradients, which changed nothing


def open_batches(config: ConfigDict) -> tuple[Loader, Loader]:
    """The training batches of ``config.data``, and those of held-out clips."""
    data = config.data
    train, held_out = configured_sources(data, seed=config.seed)

    def batches(source: Source, buckets: Any, num_workers: int) -> Loader:
        return make_loader(
            source,
            buckets=buckets,
            seed=config.seed,
            num_workers=num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            flip=data.flip,
        )

    return batches(train, data.buckets, data.num_workers), batches(held_out, served(held_out, data.buckets), 0)


def to_mesh(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the mesh."""
    split = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(split, np.asarray(rows))
        for name, rows in batch.items()
        if isinstance(rows, np.ndarray | jax.Array)
    }


def gathered(tree: Tree, mesh: Mesh) -> Tree:
    """The whole of sharded arrays, as NumPy arrays on every process."""
    return jax.device_get(jax.jit(lambda t: t, out_shardings=sharding.replicated(mesh))(tree))


def resume(checkpoints: Checkpoints, state: State, position: Mapping[str, Any]) -> tuple[State, int]:
    """The state to start from and its step: the newest checkpoint, if the data is still what it was, or ``state``.

    Raises:
      ValueError: if the data at ``position`` is not what the checkpoint was trained on.
    """
    if checkpoints.latest is None:
        return state, 0
    state, saved = checkpoints.restore(state)
    return state, check_position(saved, position)


def config_before(checkpoints: Checkpoints, kind: str) -> dict[str, Any] | None:
    """The config that the newest checkpoint was trained with, None if there is none.

    Raises:
      ValueError: if it is of another kind of training.
    """
    if checkpoints.latest is None:
        return None
    before = checkpoints.config()
    if before["kind"] != kind:
        raise ValueError(
            f"the checkpoints in this workdir are of kind {before['kind']!r}: expected {kind!r}, so give each training "
            "a --workdir of its own."
        )
    return before


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """What another config says differently, a line each; both as JSON has them."""
    lines = []
    before, now = json.loads(json.dumps(dict(before))), json.loads(json.dumps(dict(now)))
    for key in sorted({**before, **now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changed_settings(old, new, prefix=f"{prefix}{key}.")
        elif old != new:
            lines.append(f"changed since the checkpoint: {prefix}{key} was {old!r}, is {new!r}")
    return lines


def write_report(report: SkipReport, workdir: epath.Path) -> str:
    """Leaves in ``workdir/data.json`` which clips were used, skipped or replaced, and why; returns it for people."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "data.json").write_text(json.dumps(report.to_json(), indent=1))
    return str(report)


def check_skipped(num_skipped: float | None, limit: int) -> None:
    """Stops a run whose gradients keep being non-finite."""
    if num_skipped is not None and num_skipped > limit:
        raise FloatingPointError(
            f"{num_skipped:.0f} steps were skipped for non-finite gradients, and max_skipped={limit}: lower "
            "optimizer.learning_rate or optimizer.clip_norm, or look at the data of the last steps."
        )


def is_due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one; every=0 is never."""
    return every > 0 and (step % every == 0 or step == total)


def stream(seed: int, step: jax.Array | int, purpose: str) -> jax.Array:
    """The random key of one purpose in one step: any step can be replayed alone, on any mesh."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), step)


def make_optimizer(config: ConfigDict, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of ``config.optimizer`` and the schedule of its learning rate.

    Muon (Jordan 2024) orthogonalises the updates of matrices, here also of stacked layers and of convolutions seen as
    (taps x in, out) matrices, scaled to AdamW's size (Liu 2025); vectors and tables go to AdamW. Weight decay pulls
    on no vector, and with Muon on its matrices alone.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after = max(1, total_steps - config.warmup_steps)
    decay_steps = min(after, max(1, round(config.decay_fraction * total_steps)))
    course = {
        "cosine": optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, final, after),
        "wsd": optax.linear_schedule(peak, final, decay_steps, transition_begin=after - decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    warmup = optax.linear_schedule(peak / max(1, config.warmup_steps), peak, config.warmup_steps)
    rate = optax.join_schedules([warmup, course], [config.warmup_steps])
    if config.name == "adamw":
        descent = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed)
    else:
        descent = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), descent), rate


def initialise(init: Callable[[], Tree], optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[State, State]:
    """A fresh state, made sharded on the mesh, and the tree of its shardings.

    ``init`` makes the boxed parameters, as `Module.init` gives them. Moments and averages are split like the weights.
    """

    def fresh() -> State:
        params = nn.unbox(init())
        count = jnp.zeros((), jnp.int32)
        return State(count, params, params, optimizer.init(params), count)

    abstract = jax.eval_shape(fresh)
    by_param = sharding.shardings(jax.eval_shape(init), mesh)
    whole = sharding.replicated(mesh)
    by_moment = optax.tree.map_params(
        optimizer,
        lambda moment, split: moment if isinstance(moment, optax.MaskedNode) else split,
        abstract.opt_state,
        by_param,
        transform_non_params=lambda _: whole,
        is_leaf=lambda moment: isinstance(moment, optax.MaskedNode),  # what Muon leaves to AdamW, and the reverse
    )
    shardings = abstract._replace(step=whole, params=by_param, ema=by_param, opt_state=by_moment, num_skipped=whole)
    return jax.jit(fresh, out_shardings=shardings)(), shardings


def update(
    state: State, grads: Tree, *, optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step. Non-finite gradients change nothing but the counters.

    The average starts short and grows to ``ema_decay``: decay_n = min(ema_decay, (1 + n) / (10 + n)).
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    taken = (state.step - state.num_skipped).astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
    ema = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state.ema, params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    new = State(
        step=state.step + 1,
        params=keep(params, state.params),
        ema=keep(ema, state.ema),
        opt_state=keep(opt_state, state.opt_state),
        num_skipped=state.num_skipped + (~finite).astype(jnp.int32),
    )
    return new, {"grad_norm": norm, "num_skipped": new.num_skipped}


def accumulated_grad(
    loss: Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]], num_micro: int
) -> Callable[[Tree, Tree, jax.Array], tuple[Tree, dict[str, jax.Array]]]:
    """(params, batch, key) -> (grads, metrics), averaged over ``num_micro`` equal parts of the batch, one at a time.

    ``loss(params, batch, key)`` gives (mean loss, metrics).
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(params: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
        (value, metrics), grads = value_and_grad(params, batch, key)
        return grads, {"loss": value, **metrics}

    if num_micro == 1:
        return one

    def many(params: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
        # Strided parts: each keeps the split of the batch over the mesh.
        parts = jax.tree.map(lambda x: x.reshape(-1, num_micro, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(total: Tree, part_and_key: tuple[Tree, jax.Array]) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, one(params, *part_and_key)), None

        keys = jax.random.split(key, num_micro)
        first = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], parts), keys[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        total, _ = jax.lax.scan(body, zeros, (parts, keys))
        return jax.tree.map(lambda x: x / num_micro, total)

    return many


def _decayed(params: Tree) -> Tree:
    """Which parameters weight decay pulls on: all but vectors, also where those of several layers are stacked."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim - _is_stacked(path) > 1, params)


def _is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the first axis of a parameter is the layer."""
    return "layers" in (getattr(entry, "key", entry) for entry in path)


def _matrices(params: Tree) -> Tree:
    """Which parameters Muon takes, and as what matrix: kernels; not tables, embeddings, vectors."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if names[-1] != "kernel" or leaf.ndim < 2:
            return None
        axes = tuple(range(_is_stacked(path), leaf.ndim))  # stacked layers are a batch of matrices
        return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[:-1], output_axis=axes[-1])

    return jax.tree_util.tree_map_with_path(one, params)
