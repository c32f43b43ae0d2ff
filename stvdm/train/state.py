# SPDX-License-Identifier: Apache-2.0
"""What both trainers share: batches, the state of a run, its optimiser, its update, its random streams.

batches, held_out = open_batches(config, mesh)
optimizer, rate = make_optimizer(config.optimizer, config.total_steps)
state, first_step = resume(checkpoints, config, program, mesh, position=batches.position)
state, metrics = update(state, grads, loss=loss, optimizer=optimizer, ema_decay=0.999)     # inside the jitted step
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvdm import sharding
from stvdm.checkpoint import Checkpoints
from stvdm.data.folder import SkipReport
from stvdm.data.loader import Loader, Source, check_position, configured_sources, make_loader, served
from stvdm.train import split_weights
from stvdm.train.split_weights import Halves, are_halves

Tree = Any


class State(NamedTuple):
    """All that a step reads and writes. Random keys and data follow from ``step``, so they are not in it."""

    step: jax.Array  # int32: steps taken, skipped ones included
    params: Tree  # float32, of a training in bfloat16 partly in `split_weights.Halves`
    ema: Tree  # exponential moving average of params
    opt_state: optax.OptState
    num_skipped: jax.Array  # int32: steps with a non-finite loss or gradients, which changed nothing


class Program(NamedTuple):
    """What a run compiles: made by a trainer's `program`, run by its `main`, compiled for machines that are not here
    by `stvdm.planning`."""

    init: Callable[[], Tree]  # the boxed parameters of step 0
    optimizer: optax.GradientTransformation
    loss: Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]  # (params, batch, key) -> ...
    step: Callable[..., tuple[State, dict[str, jax.Array]]]  # (state, batch, *frozen weights) -> (state, metrics)
    evaluate: Callable[..., Any]  # (params, held-out batch, ...) -> scores
    work: Callable[[Tree], dict[str, float]]  # batch, or its shapes -> what a step does: clips, tokens, model FLOPs
    kept: Callable[[Tree], Tree] = lambda params: params  # the parameters as a state keeps them


def open_batches(config: ConfigDict, mesh: Mesh) -> tuple[Loader, Loader]:
    """The training batches of ``config.data``, and those of held-out clips: this process's rows of them.

    Raises:
      ValueError: if a batch is not whole on each device in each micro-batch, or the processes do not all find the same
        data.
    """
    data = config.data
    num_shards, shards = shards_here(mesh)
    for *_, batch, _ in data.buckets:  # `config.validate` does not know how many devices -1 stands for
        if batch % (num_shards * config.optimizer.accumulate):
            raise ValueError(
                f"data.buckets batch={batch}: expected a multiple of mesh data x fsdp x optimizer.accumulate = "
                f"{num_shards} x {config.optimizer.accumulate}, so that no device is without clips of a micro-batch."
            )
    train, held_out = configured_sources(data, seed=config.seed)

    def batches(source: Source, buckets: Any, num_workers: int) -> Loader:
        made = make_loader(
            source,
            buckets=buckets,
            seed=config.seed,
            num_workers=num_workers,
            num_shards=num_shards,
            shards=shards,
            flip=data.flip,
        )
        _check_all_find(made.position)
        return made

    return batches(train, data.buckets, data.num_workers), batches(held_out, served(held_out, data.buckets), 0)


def shards_here(mesh: Mesh) -> tuple[int, list[int]]:
    """(how many equal parts a batch is split into, which of them the devices of this process hold).

    Devices that differ only along context or tensor hold the same part, also where they belong to several processes.
    """
    split = sharding.batch_sharding(mesh)
    num_shards = mesh.size // split.shard_shape((mesh.size,))[0]
    parts = split.addressable_devices_indices_map((num_shards,)).values()
    return num_shards, sorted({rows.start or 0 for (rows,) in filter(None, parts)})


def to_mesh(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the mesh."""
    split = sharding.batch_sharding(mesh)
    num_shards, shards = shards_here(mesh)

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) // len(shards) * num_shards, *rows.shape[1:])
        return jax.make_array_from_process_local_data(split, rows, shape)

    return {name: whole(np.asarray(rows)) for name, rows in batch.items() if isinstance(rows, np.ndarray | jax.Array)}


def resume(
    checkpoints: Checkpoints, config: ConfigDict, program: Program, mesh: Mesh, *, position: Mapping[str, Any]
) -> tuple[State, int]:
    """The state to start from and its step: that of the newest checkpoint, or a fresh one. Memory never holds both.

    Raises:
      ValueError: if the data at ``position``, or the optimiser, is not what the checkpoint was trained with.
    """
    if checkpoints.latest is None:
        return initialise(program, mesh), 0
    first_step = check_position(checkpoints.position(), position)
    _check_optimizer(checkpoints.config()["optimizer"], config.optimizer)
    expected = abstract_state(program, mesh)
    state = checkpoints.restore(expected._replace(params=expected.ema))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, expected.params)
    keep = jax.jit(program.kept, out_shardings=shardings, donate_argnums=0)
    return state._replace(params=keep(state.params)), first_step


def to_save(state: State) -> State:
    """The state as a checkpoint holds it: weights in float32, so that a run may go on in another type."""
    return state._replace(params=split_weights.whole(state.params))


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


def reporter(batches: Loader, checkpoints: Checkpoints, workdir: epath.Path, mesh: Mesh) -> Callable[[], SkipReport]:
    """A function that leaves in ``workdir/data.json``, and returns, which clips were used, skipped or replaced and why,
    since the run began, in all processes; they call it together.

    What was replaced until a checkpoint is the "replaced" of its position; read again after a restart, it counts once.
    """
    before = {} if checkpoints.latest is None else checkpoints.position().get("replaced", {})
    _, shards = shards_here(mesh)

    def write() -> SkipReport:
        report = SkipReport(batches.report.num_found, batches.report.skipped)
        of_rows = {str(rows): counts for rows, counts in _of_all([shards, batches.report.replacements])}
        for counts in (before, *of_rows.values()):  # processes that share examples read the same rows
            report.merge(SkipReport(**counts))
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "data.json").write_text(json.dumps(report.to_json(), indent=1))
        return report

    return write


def _of_all(content: Any) -> list[Any]:
    """What each process has to say, as JSON; all of them call it together."""
    text = json.dumps(content).encode()
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(length), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded).reshape(-1, length)]


class Skips:
    """The steps whose loss or gradients were not finite, with the examples in their batches; too many stop the run.

    Args:
      limit: how many of a run's steps may be skipped.
      num_skipped: how many were, before.
    """

    def __init__(self, limit: int, num_skipped: jax.Array) -> None:
        self._limit, self._count = limit, int(num_skipped)
        self._unread: list[tuple[int, jax.Array, np.ndarray]] = []
        self._last: collections.deque[tuple[int, np.ndarray]] = collections.deque(maxlen=3)

    def add(self, step: int, metrics: Mapping[str, jax.Array], rows: Mapping[str, Any]) -> None:
        """Notes one step, without waiting for it: its metrics, and its batch as the loader gave it."""
        self._unread.append((step, metrics["num_skipped"], rows["index"]))

    def check(self, batches: Loader) -> None:
        """Reads what was noted, on all processes at once.

        Raises:
          FloatingPointError: if more steps than the limit were skipped; it names the last and their examples.
        """
        counts = jax.device_get([count for _, count, _ in self._unread])
        for (step, _, index), count in zip(self._unread, counts, strict=True):
            if count > self._count:
                self._last.append((step, index))
            self._count = int(count)
        self._unread = []
        if self._count <= self._limit:
            return
        lines = []
        for step, index in self._last:
            everywhere = np.unique(multihost_utils.process_allgather(index))
            lines.append(f"\n  step {step}: " + ", ".join(batches.name_of(int(i)) for i in everywhere))
        raise FloatingPointError(
            f"{self._count} steps were skipped, as their loss or gradients were not finite, and max_skipped="
            f"{self._limit}: look at the examples of the last of them, or lower optimizer.learning_rate or "
            "optimizer.clip_norm. Their batches were" + "".join(lines)
        )


def is_due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one; every=0 is never."""
    return every > 0 and (step % every == 0 or step == total)


def stream(seed: int, step: jax.Array | int, purpose: str) -> jax.Array:
    """The random key of one purpose in one step: any step can be replayed alone, on any mesh."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), step)


def make_optimizer(
    config: ConfigDict, total_steps: int, *, train_only: str = ""
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of ``config.optimizer`` and the schedule of its learning rate.

    Muon (Jordan 2024) orthogonalises the updates of matrices, here also of stacked layers and of convolutions seen as
    (taps x in, out) matrices, scaled to AdamW's size (Liu 2025); vectors and tables go to AdamW. Weight decay pulls
    on no vector, and with Muon on its matrices alone.

    Args:
      train_only: what `are_trained` goes by; other parameters have no moments and stay as they are.
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
        descent = optax.adamw(
            rate, b1=config.b1, b2=config.b2, mu_dtype=config.moments, weight_decay=config.weight_decay, mask=_decayed
        )
    else:
        descent = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            mu_dtype=config.moments,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    if train_only:
        descent = optax.partition(
            {"trained": descent, "left": optax.set_to_zero()},
            lambda params: jax.tree.map(lambda yes: "trained" if yes else "left", _found_in(params, train_only)),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), descent), rate


def are_trained(params: Tree, train_only: str) -> Tree:
    """For each parameter whether a regular expression is found in its path, as "dit/down_0_0_temporal/mlp_in/kernel".

    Raises:
      ValueError: if it is found in none.
    """
    found = _found_in(params, train_only)
    if not any(jax.tree.leaves(found)):
        some = ", ".join(list(traverse_util.flatten_dict(params, sep="/"))[:3])
        raise ValueError(f"train_only={train_only!r}: found in no parameter's path; they are like {some}.")
    return found


def _found_in(params: Tree, train_only: str) -> Tree:
    """Also of the single leaf by which Optax finds out where in its state parameters are."""

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return re.search(train_only, "/".join(entry.key for entry in path)) is not None

    return jax.tree_util.tree_map_with_path(one, params)


def left_alone(params: Tree, train_only: str) -> Tree:
    """The parameters, those that are not trained without a gradient, so that none is computed."""
    if not train_only:
        return params
    return jax.tree.map(
        lambda leaf, yes: leaf if yes else jax.lax.stop_gradient(leaf), params, are_trained(params, train_only)
    )


def start_from(state: State, weights: Tree) -> tuple[State, list[str]]:
    """A fresh state with these weights, in the average too, laid out as it is; and the modules that stay fresh.

    Args:
      weights: host arrays in nested dicts, as `checkpoint.load_model` gives them: some of the parameters, or all.

    Raises:
      ValueError: for weights that the state has no place for, or of other shapes.
    """
    fresh = traverse_util.flatten_dict(state.ema, sep="/")
    given = traverse_util.flatten_dict(weights, sep="/")
    wrong = [
        f"{path} is {leaf.shape}, expected {fresh[path].shape if path in fresh else 'none'}"
        for path, leaf in given.items()
        if path not in fresh or leaf.shape != fresh[path].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"start_from: these weights do not fit the model of this config: {'; '.join(wrong[:3])}{more}. "
            "Make its config.model and config.text those of the model that they come from, or only add to them."
        )

    def replaced(params: Tree) -> Tree:
        def one(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
            if (name := "/".join(path)) not in given:
                return leaf
            whole = np.asarray(given[name], leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

        return traverse_util.path_aware_map(one, params)

    params = split_weights.like(replaced(split_weights.whole(state.params)), state.params)
    state = state._replace(params=params, ema=replaced(state.ema))
    return state, sorted({"/".join(path.split("/")[:2]) for path in fresh.keys() - given.keys()})


def initialise(program: Program, mesh: Mesh) -> State:
    """A fresh state, made sharded on the mesh."""
    fresh, _, shardings = _plan_state(program, mesh)
    return jax.jit(fresh, out_shardings=shardings)()


def abstract_state(program: Program, mesh: Mesh) -> State:
    """The state of `initialise` as shapes, types and shardings alone; the mesh may be of devices that are not here."""
    _, abstract, shardings = _plan_state(program, mesh)
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split), abstract, shardings
    )


def _plan_state(program: Program, mesh: Mesh) -> tuple[Callable[[], State], State, State]:
    """(makes a fresh state, its shapes, its shardings). Moments and averages are split like the weights."""
    init, optimizer = program.init, program.optimizer

    def fresh() -> State:
        params = nn.unbox(init())
        count = jnp.zeros((), jnp.int32)
        return State(count, program.kept(params), params, optimizer.init(params), count)

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
    kept = jax.tree.map(
        lambda leaf, split: Halves(split, split) if are_halves(leaf) else split,
        abstract.params,
        by_param,
        is_leaf=are_halves,
    )
    shardings = abstract._replace(step=whole, params=kept, ema=by_param, opt_state=by_moment, num_skipped=whole)
    return fresh, abstract, shardings


def update(
    state: State, grads: Tree, *, loss: jax.Array, optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step. A loss or gradients that are not finite change nothing but the counters.

    The average starts short and grows to ``ema_decay``: decay_n = min(ema_decay, (1 + n) / (10 + n)).
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    before = split_weights.whole(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, before)
    params = optax.apply_updates(before, updates)
    taken = (state.step - state.num_skipped).astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
    ema = jax.tree.map(lambda average, p: average + (1 - decay) * (p - average), state.ema, params)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    new = State(
        step=state.step + 1,
        params=keep(split_weights.like(params, state.params), state.params),
        ema=keep(ema, state.ema),
        opt_state=keep(opt_state, state.opt_state),
        num_skipped=state.num_skipped + (~finite).astype(jnp.int32),
    )
    return new, {"grad_norm": norm, "num_skipped": new.num_skipped}


def accumulated_grad(
    loss: Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    num_micro: int,
) -> Callable[[Tree, Tree, jax.Array], tuple[Tree, dict[str, jax.Array]]]:
    """(params, batch, key) -> (grads, metrics), averaged over ``num_micro`` equal parts of the batch, one at a time.

    Products in bfloat16 have gradients in bfloat16: of weights in halves they are kept as that until the optimiser
    reads them, so that those of a scan's layers are half as large.

    Args:
      loss: ``loss(params, batch, key)`` gives (mean loss, metrics).
      num_micro: parts of the batch; their gradients are summed in float32.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(params: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
        (value, metrics), grads = value_and_grad(split_weights.multiplied(params), batch, key)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
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


def _check_all_find(position: Mapping[str, Any]) -> None:
    """All processes must read one data set in one order: each reads only its rows of a batch."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(position, sort_keys=True).encode()).digest()
    rows = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = np.flatnonzero((rows != rows[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(
            f"the processes {others} do not find the data that process 0 finds; this is process {jax.process_index()}, "
            f"with the fingerprint {position['fingerprint']}: give all hosts the same files at data.path and "
            "data.validation_path, e.g. on a disk that they share, and the same config."
        )


def _check_optimizer(saved: Mapping[str, Any], now: ConfigDict) -> None:
    """Whether the state of the optimiser of a checkpoint can be gone on with."""
    if saved["name"] != now.name:
        raise ValueError(
            f"optimizer.name: saved {saved['name']!r}, now {now.name!r}: they keep different moments, so give back the "
            "old name, or start from step 0 in a new workdir."
        )
    moments = saved.get("moments", "float32")  # earlier versions knew no other
    if moments != now.moments:
        warnings.warn(
            f"optimizer.moments: saved {moments!r}, now {now.moments!r}: the first moments are converted, so the run "
            "does not go on quite as it would have.",
            stacklevel=3,
        )


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
