# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run (Orbax: state, data position and config in one atomic step), and exported models.

A run's checkpoints hold everything needed to go on, sharded as it lies on the mesh. An exported model holds only
what is needed to use it, in two files that any tool can read: ``model.safetensors`` and ``model.json``.

    with Checkpoints(workdir, keep=2) as checkpoints:
        state = checkpoints.restore(state)                    # the newest whole one, if there is one
        checkpoints.save(step, state, position=position, config=config)
    save_model(directory, params, description)                # all processes together
    params, description = load_model(directory)

A step counts once its *manifest* is written: ``STEP/manifest/P-of-N.json``, the size and SHA-256 of every file, made
when all processes have written theirs. It is checked before a step is restored: a flipped byte, a truncated or a
missing file is named in a warning, and the step before is taken.

What that costs: digests are of what lies on the disk, read once after writing, behind the training that goes on, and
once before restoring. Each of N processes reads every N-th file, streaming, in several threads, so that a terabyte on
64 hosts is 16 GB a host; nothing is sent between hosts but the verdict. SHA-256 rather than a shorter sum because
processors have instructions for it and `sha256sum` can check by hand what a manifest says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from stvdm import tensor_files
from stvdm.tensor_files import Tensor, bytes_of, places_in

Tree = Any

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
MANIFEST = "manifest"

# Of Orbax: what a step holds and when it was finished; and, on object stores, whether it was.
_CONTENTS, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not finished
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # what comes of reading JSON that was changed
_DIGEST_THREADS = 4
_CHUNK = 4 << 20  # bytes read at once
_EXPORT_SECONDS = 3600  # in which process 0 has written a model
_SAVE_SECONDS = 6 * 3600  # by the wall clock, which goes on while a laptop sleeps; Orbax's 1200 are few for terabytes


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``, saved asynchronously; a half-written or damaged one is never used.

    All processes of a run make the same calls in the same order, and see the same folder.

    Args:
      workdir: the run's folder, local (or shared by all hosts), or an object store.
      keep: how many whole checkpoints stay; while one is being saved there is one more, and of several processes, which
        may not all have finished theirs as the oldest go, another.
      gets_on: called again and again while files are checked, and around restoring.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2, gets_on: Callable[[], None] = lambda: None) -> None:
        self._folder = epath.Path(workdir).expanduser().absolute() / "checkpoints"
        self._keep = keep
        self._gets_on = gets_on
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=_SAVE_SECONDS)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._newest: int | None = None
        self._has_looked = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none. What is found on the disk is checked, once.

        Raises:
          ValueError: if there are checkpoints, and all are damaged.
        """
        self.wait()
        if not self._has_looked:
            self._newest, self._has_looked = self._newest_whole(), True
        return self._newest

    def save(self, step: int, state: Tree, *, position: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Begins to save one step, unless it is saved already; `wait` and the next `save` wait until it is whole.

        Args:
          state: a tree of (global) arrays.
          position: where the data stands, as JSON: enough to draw the batch of ``step`` next.
          config: the resolved config, as JSON.

        Raises:
          OSError: if this one can't be begun or the one before was not finished, e.g. for want of space. The whole
            ones before are as they were.
        """
        if step == self.latest:
            return
        with self._explained(step):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._checkpointer.save(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    position=ocp.args.JsonSave(dict(position)),
                    config=ocp.args.JsonSave(dict(config)),
                    # Comes with the step, atomically: so a step whose manifest was never finished is known.
                    **{MANIFEST: ocp.args.JsonSave({"processes": jax.process_count()})},
                ),
                force=True,  # in place of a damaged one of this step
            )
        self._saving = (step, self._thread.submit(self._seal, step, self._newest))

    def wait(self) -> None:
        """Returns when the save under way is whole.

        Raises:
          OSError: if it was not finished.
        """
        if self._saving is None:
            return
        (step, sealed), self._saving = self._saving, None
        with self._explained(step):
            sealed.result()
        self._newest, self._has_looked = step, True

    def close(self) -> None:
        """Waits for the save under way, and lets go of the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def restore(self, state: Tree) -> Tree:
        """The newest whole checkpoint, in the dtypes and shardings of ``state`` (arrays or ShapeDtypeStructs).

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if all are damaged, or the arrays have other names or shapes than ``state``.
        """
        self._check_arrays(state)
        there = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._restored(state=ocp.args.StandardRestore(there))["state"]

    def _check_arrays(self, state: Tree) -> None:
        """Orbax finds this too, and says it in a hundred lines."""
        if self.latest is None:
            return
        folder = self._folder / str(self.latest)
        there = _shapes_of(ocp.StandardCheckpointHandler().metadata(folder / "state").tree)
        here = _shapes_of(state)
        other = sorted(name for name in {**there, **here} if there.get(name) != here.get(name))
        if other:
            name = other[0]
            raise ValueError(
                f"{folder}: {len(other)} arrays are not those of this config, e.g. {name} is "
                f"{there.get(name, 'missing')}, expected {here.get(name, 'none')}; take the settings that it was "
                "trained with, or another --workdir."
            )

    def position(self) -> dict[str, Any]:
        """Where the data stood at the newest whole checkpoint."""
        return self._restored(position=ocp.args.JsonRestore())["position"]

    def config(self) -> dict[str, Any]:
        """The config that the newest whole checkpoint was trained with."""
        return self._restored(config=ocp.args.JsonRestore())["config"]

    def _restored(self, **items: Any) -> Any:
        step = self.latest
        if step is None:
            raise FileNotFoundError(f"{self._folder}: no checkpoint here.")
        self._gets_on()
        try:
            return self._checkpointer.restore(self._folder / str(step), args=ocp.args.Composite(**items))
        finally:
            self._gets_on()

    def _steps(self) -> list[int]:
        """Of all checkpoints that Orbax finished, whole or not."""
        if not self._folder.exists():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def _newest_whole(self) -> int | None:
        damaged = []
        for step in reversed(_of_process_zero(self._steps())):
            folder = self._folder / str(step)
            if _said_by_any("yes" if _unfinished(folder) else ""):
                warnings.warn(f"{folder}: its save was not finished, so the step before is taken", stacklevel=4)
                continue
            share = damage(
                folder, process_index=jax.process_index(), process_count=jax.process_count(), gets_on=self._gets_on
            )
            more = [f"and {len(share) - 5} files more"] if len(share) > 5 else []
            if not (problems := _said_by_any("; ".join(share[:5] + more))):
                return step
            warnings.warn(f"{folder} is damaged, so the step before is taken: {problems}", stacklevel=4)
            damaged.append(f"{folder}: {problems}")
        if damaged:
            raise ValueError(
                "no whole checkpoint is left to go on from:\n  - "
                + "\n  - ".join(damaged)
                + "\nso bring these files back from a copy, or start again in a new workdir."
            )
        return None

    def _seal(self, step: int, newest: int | None) -> None:
        """In a thread: when all processes have written, this one's part of the manifest; then the oldest go.

        Args:
          step: the one being saved.
          newest: the newest whole one before it. What lies beyond is damaged, and goes too.
        """
        folder = self._folder / str(step)
        try:
            self._checkpointer.wait_until_finished()
            _write_manifest(folder, process_index=jax.process_index(), process_count=jax.process_count())
        except BaseException:
            with contextlib.suppress(OSError):
                self._sweep()  # what was half written would keep the disk full
            raise
        if jax.process_index() == 0:
            # Of the step just saved, other processes may still be at their parts: then it does not count yet.
            steps = self._steps()
            beyond = {other for other in steps if other != step and (newest is None or other > newest)}
            whole = [other for other in steps if other not in beyond and not _unfinished(self._folder / str(other))]
            oldest = whole[-self._keep] if len(whole) > self._keep else -1
            for other in steps:
                if other in beyond or other < oldest:
                    (self._folder / str(other)).rmtree()

    def _sweep(self) -> None:
        """Removes what saves that died have left."""
        if jax.process_index() == 0 and self._folder.exists():
            for path in self._folder.glob(f"*{_UNFINISHED}*"):
                _remove(path)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            room = "" if "://" in str(self._folder) else f" {_free_mib(self._folder):,} MiB are free there;"
            kept = "no step was saved before" if self._newest is None else f"step {self._newest} is whole and untouched"
            remedy = "Make room" if "No space left" in reason else "See to what is said above"
            raise OSError(
                f"step {step} was not saved in {self._folder}: {reason};{room} {kept}. {remedy}, and give the same "
                "command again to go on."
            ) from error


def damage(
    folder: epath.PathLike,
    *,
    process_index: int = 0,
    process_count: int = 1,
    gets_on: Callable[[], None] = lambda: None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, by its manifest: a line each, nothing if it is as it was saved.

    Args:
      folder: of one step.
      process_index, process_count: which share of the files to read.
      gets_on: called for every file.
    """
    folder = epath.Path(folder)
    files: dict[str, dict[str, Any]] = {}
    problems, totals = [], set()
    try:
        parts = _manifest_parts(folder)
    except _UNREADABLE as error:
        if not _is_from_before_manifests(folder):
            return [_why(f"{MANIFEST}/metadata", error)]
        warnings.warn(f"{folder} has no manifest (an earlier version made it), so it can't be checked", stacklevel=2)
        return []
    for path in parts:
        try:
            part = json.loads(path.read_text())
            if part["sha256"] != _digest_of_json([part["files"], part["num_files"]]):
                raise ValueError
        except _UNREADABLE as error:
            problems.append(_why(f"{MANIFEST}/{path.name}", error))
            continue
        files |= part["files"]
        totals.add(part["num_files"])
    if not problems and totals != {len(files)}:
        problems.append(f"{MANIFEST} holds {len(files)} files, expected {sorted(totals)}")

    def look(name: str) -> str:
        expected, path = files[name], folder / name
        try:
            if not path.exists():
                return f"{name} is missing"
            if (size := path.stat().length) != expected["bytes"]:
                return f"{name} has {size:,} bytes, expected {expected['bytes']:,}"
            if (digest := _digest_of(path)) != expected["sha256"]:
                return f"{name} was changed: sha256 {digest[:12]}..., expected {expected['sha256'][:12]}..."
        except OSError as error:
            return f"{name} can't be read: {error}"
        return ""

    with ThreadPoolExecutor(_DIGEST_THREADS) as threads:
        for problem in threads.map(look, sorted(files)[process_index::process_count]):
            gets_on()
            if problem:
                problems.append(problem)
    return problems


def _write_manifest(folder: epath.Path, *, process_index: int, process_count: int) -> None:
    """This process's part: of every N-th file, and how many there are in all."""
    paths = {str(path.relative_to(folder)): path for path in _files_in(folder)}
    names = sorted(name for name in paths if not (name.startswith(f"{MANIFEST}/") and "-of-" in name))
    mine = names[process_index::process_count]
    with ThreadPoolExecutor(_DIGEST_THREADS) as threads:
        digests = threads.map(lambda name: _digest_of(paths[name]), mine)
        files = {
            name: {"bytes": paths[name].stat().length, "sha256": digest}
            for name, digest in zip(mine, digests, strict=True)
        }
    part = {"files": files, "num_files": len(names), "sha256": _digest_of_json([files, len(names)])}
    _write(folder / MANIFEST / f"{process_index}-of-{process_count}.json", json.dumps(part, indent=1).encode())


def _files_in(folder: epath.Path) -> Iterator[epath.Path]:
    """All below a folder. Not by `walk`, which on object stores loses the gs:// of its paths."""
    for path in folder.iterdir():
        if path == folder:  # an object that stands for the folder itself
            continue
        if path.is_dir():
            yield from _files_in(path)
        else:
            yield path


def _manifest_parts(folder: epath.Path) -> list[epath.Path]:
    """One of each process that saved, there or not. By name, since clients of object stores keep old listings."""
    count = json.loads((folder / MANIFEST / "metadata").read_text())["processes"]
    return [folder / MANIFEST / f"{index}-of-{count}.json" for index in range(count)]


def _unfinished(folder: epath.Path) -> bool:
    """Whether its save died: before Orbax was done, or before all processes had written their parts of the manifest."""
    try:
        if (folder / MANIFEST).exists():
            return not all(path.exists() for path in _manifest_parts(folder))
        return "://" in str(folder) and not (folder / _COMMITTED).exists()  # elsewhere Orbax renames what is done
    except _UNREADABLE:
        return False  # that is damage


def _is_from_before_manifests(folder: epath.Path) -> bool:
    """Whether a step never had a manifest, by what Orbax noted of it; it may also have lost one."""
    try:
        return MANIFEST not in json.loads((folder / _CONTENTS).read_text())["item_handlers"]
    except _UNREADABLE:
        return False


def _why(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} can't be read: {error}" if isinstance(error, OSError) else f"{name} was changed"


def _digest_of(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_process_zero(steps: list[int]) -> list[int]:
    """The same list on every process."""
    if jax.process_count() == 1:
        return steps
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    found = multihost_utils.broadcast_one_to_all(np.resize(np.asarray([*steps, 0], np.int32), length))
    return [int(step) for step in found]


def _shapes_of(tree: Tree) -> dict[str, tuple[int, ...]]:
    """By path, written alike for tuples and dicts; Orbax knows the latter alone."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _said_by_any(text: str) -> str:
    """What any process says, on every process; "" if none says anything."""
    if jax.process_count() == 1:
        return text
    said = np.frombuffer(text.encode()[:1024].ljust(1024, b"\0"), np.uint8)
    rows = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(said)]
    return "; ".join(dict.fromkeys(filter(None, rows)))


def _remove(folder: epath.Path) -> None:
    """An unfinished folder and what is in it. Writers of a save that failed may still look for it, in vain."""
    if "://" not in str(folder):
        folder = folder.rename(folder.with_name(f"{folder.name}-{time.time_ns()}"))
    folder.rmtree()


def _free_mib(folder: epath.Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free >> 20


def on_host(array: Any) -> np.ndarray:
    """All of an array, wherever it lies; if on the devices of several processes, all of them ask for it together."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def save_model(
    directory: epath.PathLike, params: Tree, description: Mapping[str, Any], *, dtype: str = "float32"
) -> str:
    """Writes ``model.safetensors`` and ``model.json``; returns the digest of the weights.

    All processes of a run call it together. Process 0 writes, and none returns before; the others know no digest.

    Args:
      params: nested dicts of arrays, wherever they lie; the path of a leaf, joined by '/', is its name in the file.
        They are gathered and written one at a time.
      description: JSON that says how to build the model; the digest of the weights is added to it.
      dtype: of the weights in the file: float32, bfloat16 or float16; the "statistics" of latents stay float32.
    """
    target = epath.Path(directory).expanduser()

    def tensor(name: str, leaf: Any) -> Tensor:
        kind = np.dtype("float32" if name.startswith("statistics/") else dtype)
        # A leaf of several dimensions comes in parts along the first: the layers of a scan one by one.
        parts = range(leaf.shape[0]) if leaf.ndim > 2 else [...]
        return Tensor(name, leaf.shape, lambda: (on_host(leaf[part]) for part in parts), kind)

    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = [tensor(name, leaf) for name, leaf in flat.items()]
    digests = tensor_files.write(target, tensors, stem=epath.Path(WEIGHTS).stem, shard_bytes=sys.maxsize)
    digest = digests.get(WEIGHTS, "")
    if jax.process_index() == 0:
        # The description names the digest of the weights, so a model whose two files do not belong together is refused.
        _write(target / DESCRIPTION, json.dumps({**description, "sha256": digest}, indent=1).encode())
    # A process that went on to its end would wait there for process 0, and not as long as writing may take.
    ocp.multihost.get_barrier_sync_fn()(key=f"written {target}", timeout_ms=1000 * _EXPORT_SECONDS)
    return digest


def load_model(directory: epath.PathLike) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_model` wrote: (params as float32 numpy arrays in nested dicts, description).

    Float32 arrays of a local file stay in it until they are looked at: a host need not hold a model to lay it out on
    devices, or to take the autoencoder from among a transformer's weights. They cannot be written to.

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: if the weights are not those that the description was written with (damaged or mixed files).
    """
    source, description = epath.Path(directory).expanduser(), describe_model(directory)
    data = bytes_of(source / WEIGHTS)
    digest = hashlib.sha256(data.data).hexdigest()
    if digest != description["sha256"]:
        raise ValueError(
            f"{source / WEIGHTS}: sha256 is {digest[:12]}..., expected {description['sha256'][:12]}...; "
            "the file is damaged or belongs to another model.json, so copy the folder again."
        )
    flat = {}
    for name, (_, start, dtype, shape) in places_in(source / WEIGHTS).items():
        found = data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        flat[name] = found.astype(np.float32, copy=False)
    return traverse_util.unflatten_dict(flat, sep="/"), description


def describe_model(directory: epath.PathLike) -> dict[str, Any]:
    """The description alone of what `save_model`, or `stvdm import`, wrote.

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: for a description that can't be read, or that tells no digest of weights.
    """
    source = epath.Path(directory).expanduser()
    missing = [name for name in (WEIGHTS, DESCRIPTION) if not (source / name).exists()]
    if missing:
        absent = " and no ".join(missing) if source.exists() else "such folder"
        raise FileNotFoundError(
            f"{source}: expected a model, found no {absent}; give the --workdir of a training that "
            "has ended, or run that training first, or give what `stvdm import` wrote."
        )
    description = tensor_files.told_in(source / DESCRIPTION)
    if "sha256" not in description:
        raise ValueError(f"{source / DESCRIPTION}: expected the sha256 of {WEIGHTS}; copy the folder again.")
    return description


def _write(path: epath.Path, data: bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    partial = path.parent / f"{path.name}.partial"
    partial.write_bytes(data)
    partial.replace(path)
