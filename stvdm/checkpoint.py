# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run (Orbax: state, data position and config in one atomic step), and exported models.

A run's checkpoints hold everything needed to go on, sharded as it lies on the mesh. An exported model holds only
what is needed to use it, in two files that any tool can read: ``model.safetensors`` and ``model.json``.

    with Checkpoints(workdir, keep=2) as checkpoints:
        state, position = checkpoints.restore(state)          # the newest, if there is one
        checkpoints.save(step, state, position=position, config=config)
    save_model(directory, params, description);  params, description = load_model(directory)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

Tree = Any

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"

# safetensors' own NumPy reader knows no bfloat16.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``, saved asynchronously; a half-written one is never seen."""

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).expanduser().absolute() / "checkpoints",
            options=options,
            item_names=("state", "position", "config"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for the save under way

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, *, position: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Saves one step, unless it is saved already.

        Args:
          state: a tree of (global) arrays.
          position: where the data stands, as JSON: enough to draw the batch of ``step`` next.
          config: the resolved config, as JSON.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                position=ocp.args.JsonSave(dict(position)),
                config=ocp.args.JsonSave(dict(config)),
            ),
        )

    def restore(self, state: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest checkpoint, in the dtypes and shardings of ``state`` (arrays or ShapeDtypeStructs).

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if its arrays have other names or shapes than ``state``.
        """
        step = self.latest
        if step is None:
            raise FileNotFoundError(f"{self._manager.directory}: no checkpoint here.")
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
                position=ocp.args.JsonRestore(),
            ),
        )
        return found["state"], found["position"]

    def config(self) -> dict[str, Any]:
        """The config that the newest checkpoint was trained with."""
        return self._manager.restore(self.latest, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def save_model(
    directory: epath.PathLike, params: Tree, description: Mapping[str, Any], *, dtype: str = "float32"
) -> str:
    """Writes ``model.safetensors`` and ``model.json``; returns the digest of the weights.

    Args:
      params: nested dicts of arrays; the path of a leaf, joined by '/', is its name in the file.
      description: JSON that says how to build the model; the digest is added to it.
      dtype: of the weights in the file: float32, bfloat16 or float16; the "statistics" of latents stay float32.
    """
    from safetensors.flax import save

    target = epath.Path(directory).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    flat = {
        name: jnp.asarray(leaf, "float32" if name.startswith("statistics/") else dtype)
        for name, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }
    data = save(dict(sorted(flat.items())))
    digest = hashlib.sha256(data).hexdigest()
    # The description names the digest of the weights, so a model whose two files do not belong together is refused.
    _write(target / WEIGHTS, data)
    _write(target / DESCRIPTION, json.dumps({**description, "sha256": digest}, indent=1).encode())
    return digest


def load_model(directory: epath.PathLike) -> tuple[Tree, dict[str, Any]]:
    """Reads what `save_model` wrote: (params as float32 numpy arrays in nested dicts, description).

    Raises:
      FileNotFoundError: if one of the two files is missing.
      ValueError: if the weights are not those that the description was written with (damaged or mixed files).
    """
    from safetensors import deserialize

    source = epath.Path(directory).expanduser()
    missing = [name for name in (WEIGHTS, DESCRIPTION) if not (source / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{source}: expected an exported model, found no {' and no '.join(missing)}; "
            "give the --workdir of a training that has ended, or run that training first."
        )
    description = json.loads((source / DESCRIPTION).read_text())
    data = (source / WEIGHTS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != description["sha256"]:
        raise ValueError(
            f"{source / WEIGHTS}: sha256 is {digest[:12]}..., expected {description['sha256'][:12]}...; "
            "the file is damaged or belongs to another model.json, so copy the folder again."
        )
    flat = {
        name: np.frombuffer(leaf["data"], _DTYPES[leaf["dtype"]]).reshape(leaf["shape"]).astype(np.float32)
        for name, leaf in deserialize(data)
    }
    return traverse_util.unflatten_dict(flat, sep="/"), description


def _write(path: epath.Path, data: bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    partial = path.parent / f"{path.name}.partial"
    partial.write_bytes(data)
    partial.replace(path)
