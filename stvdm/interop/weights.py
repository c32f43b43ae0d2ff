# SPDX-License-Identifier: Apache-2.0
"""Sharded safetensors, one tensor at a time: read onto any mesh, written from any, and from one format to the other.

    source = Weights(folder)                                        # headers alone: names, dtypes, shapes
    mapping.agree(pairs, source.shapes)
    params = fill(shapes, of_theirs(pairs, source.read), stacked="layers", shardings=shardings)
    tensor_files.write(folder, theirs(pairs, of_tree(params)), dtype="bfloat16")

Parameters come as *parts*, a whole one or a layer of a stack of them: of foreign tensors, of a tree of arrays, or of a
file of ours; and go into arrays on a mesh (`fill`), into foreign tensors (`theirs`) or under our names (`ours`).

No host need hold more of a model than its largest tensor. A parameter that stacks the layers of a scan is filled where
it lies, on the devices, layer by layer, in place; on the way out it is cut into its layers there, and they come one by
one. From file to file nothing is held but the tensor that is under way.

Pickles are never opened.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from stvdm.checkpoint import on_host
from stvdm.interop import mapping
from stvdm.interop.mapping import Pair
from stvdm.tensor_files import INDEX, Place, Shape, Tensor, places_in

Tree = Any
Part = Callable[[str, int | None], np.ndarray]  # (our path, layer) -> that layer of that parameter of ours


class Weights:
    """The tensors of a safetensors file, or of all those of a folder, of which only the headers are read at first.

    Where there is an index (``*.safetensors.index.json``), its files are meant.

    Raises:
      FileNotFoundError: if there are none, or files that the index names are missing.
      ValueError: for pickles, damaged or truncated files, a name that stands in two files, or an index that does not
        tell what is in them.
    """

    def __init__(self, place: epath.PathLike) -> None:
        self.places: dict[str, Place] = {}
        source = epath.Path(place).expanduser()
        files, index = _files_of(source)
        for file in files:
            for name, found in places_in(file).items():
                if name in self.places:
                    raise ValueError(f"{file}: {name} stands in {self.places[name].file.name} too.")
                self.places[name] = found
        if index is not None:
            told = _where(index)
            wrong = {name for name in told.keys() | self.places.keys() if not self._is_in(name, told.get(name))}
            if wrong:
                raise ValueError(
                    f"{index}: of {len(told)} tensors {len(wrong)} are not where it says, e.g. {sorted(wrong)[0]}; "
                    "copy the folder again."
                )

    def _is_in(self, name: str, file: str | None) -> bool:
        return name in self.places and self.places[name].file.name == file

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: place.shape for name, place in self.places.items()}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One tensor; with ``layer`` that entry of its first dimension, and no more is read."""
        file, start, dtype, shape = self.places[name]
        if layer is not None:
            shape = shape[1:]
            start += layer * math.prod(shape) * dtype.itemsize
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)


def of_tree(params: Tree) -> Part:
    """Our parameters, wherever they lie; where several processes hold them, all ask together."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return lambda path, layer: on_host(flat[path] if layer is None else flat[path][layer])


def of_file(source: Weights, prefix: str = "") -> Part:
    """Our parameters in a file under our names, each behind ``prefix``."""
    return lambda path, layer: source.read(prefix + path, layer)


def of_theirs(pairs: Sequence[Pair], read: Callable[[str], np.ndarray]) -> Part:
    """Our parameters, of the tensors that ``read`` gives by their foreign names; let `mapping.agree` have looked."""
    found = {(pair.ours, pair.layer): pair for pair in pairs}

    def part(path: str, layer: int | None) -> np.ndarray:
        pair = found[path, layer]
        return pair.layout.to_ours(read(pair.theirs))

    return part


def fill(
    shapes: Tree,
    part: Part,
    *,
    stacked: str = "",
    shardings: Tree | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Tree:
    """Our parameters, of their parts, one after the other.

    Args:
      shapes: nested dicts of anything with a ``shape``.
      stacked: the name of scanned layers, whose parameters come layer by layer; as of `mapping.pairs_of`.
      shardings: a NamedSharding for each parameter: they are made there. Each process asks for all parts and keeps of
        each what is its own. None: in the host's memory, as numpy arrays.
      dtype: of the parameters.
    """
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    placed = traverse_util.flatten_dict(shardings, sep="/") if shardings is not None else {}
    params: dict[str, Any] = {}
    for path, leaf in sorted(wanted.items()):
        shape = tuple(leaf.shape)
        layers = [layer for layer, *_ in mapping.layers_of(path, shape, stacked)]
        if shardings is None:
            params[path] = np.empty(shape, jnp.dtype(dtype))
            for layer in layers:
                params[path][... if layer is None else layer] = part(path, layer)
        elif layers == [None]:
            params[path] = _placed(part(path, None), dtype, placed[path])
        else:
            params[path] = _stacked(
                (part(path, layer) for layer in layers if layer is not None), shape, dtype, placed[path]
            )
    return traverse_util.unflatten_dict(params, sep="/")


def _stacked(
    arrays: Iterable[np.ndarray], shape: Shape, dtype: jax.typing.DTypeLike, sharding: NamedSharding
) -> jax.Array:
    """Arrays as the layers of one, filled where it lies."""
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    assert spec[0] is None, f"layers are split over {spec[0]}"
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))
    whole = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for layer, array in enumerate(arrays):
        whole = _set_layer(sharding)(whole, _placed(array, dtype, of_layer), np.int32(layer))
        jax.block_until_ready(whole)  # else the host goes on reading, and keeps what waits to be copied
    return whole


def _placed(array: np.ndarray, dtype: jax.typing.DTypeLike, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.ascontiguousarray(array[index], dtype=dtype)
    )


@functools.cache
def _set_layer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, np.int32], jax.Array]:
    """(whole, part, layer) -> whole with that layer, in the same memory."""
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def theirs(pairs: Sequence[Pair], part: Part) -> list[Tensor]:
    """Our parameters as foreign tensors, for `write`."""

    def one(pair: Pair) -> Tensor:
        return Tensor(pair.theirs, pair.shape, lambda: [pair.layout.to_theirs(part(pair.ours, pair.layer))])

    return [one(pair) for pair in pairs]


def ours(
    shapes: Tree, part: Part, *, prefix: str = "", stacked: str = "", dtype: jax.typing.DTypeLike | None = None
) -> list[Tensor]:
    """Our parameters under our names behind ``prefix``, for `write`; layers come one by one.

    Args:
      dtype: of these in the file; None: that of `write`.
    """
    kind = None if dtype is None else np.dtype(dtype)

    def one(path: str, shape: Shape) -> Tensor:
        layers = mapping.layers_of(path, shape, stacked)
        return Tensor(prefix + path, shape, lambda: (part(path, layer) for layer, *_ in layers), kind)

    return [one(path, tuple(leaf.shape)) for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()]


def _files_of(source: epath.Path) -> tuple[list[epath.Path], epath.Path | None]:
    """The files that are meant, and the index that says so."""
    if source.is_dir():
        indices = sorted(source.glob(f"*{INDEX}"))
        if len(indices) > 1:
            raise ValueError(f"{source}: {len(indices)} indices, of {', '.join(p.name for p in indices)}; leave one.")
        if indices:
            named = sorted(set(_where(indices[0]).values()))
            missing = [name for name in named if not (source / name).exists()]
            if missing:
                raise FileNotFoundError(f"{indices[0]}: of {len(named)} files are missing {', '.join(missing)}.")
            return [source / name for name in named], indices[0]
    return mapping.files_of(source), None


def _where(index: epath.Path) -> dict[str, str]:
    """Which file each tensor is in, by an index."""
    told = mapping.told_in(index).get("weight_map")
    if not isinstance(told, dict):
        raise ValueError(f"{index}: expected a weight_map of tensors to files; copy it again.")
    return told
