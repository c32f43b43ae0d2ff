# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, one tensor at a time: where each lies in a file, and files written of tensors that come in parts.

    places = places_in(file)                                        # the header alone is read
    digests = write(folder, [Tensor("a", (40, 8, 8), lambda: (made(layer) for layer in range(40)))])

A model of 14 B parameters is 57 GB in float32, and no host need hold more of it than its largest tensor: a header is
known from shapes before the first byte of data is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

Shape = tuple[int, ...]

INDEX = ".safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what tools of the Hugging Face hub keep files below

# Names of types in safetensors files, whose own NumPy reader knows no bfloat16.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LARGEST_HEADER = 100_000_000  # as in the format's own reader
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor of a safetensors file lies."""

    file: epath.Path
    start: int  # of its bytes in the file
    dtype: np.dtype
    shape: tuple[int, ...]


def places_in(file: epath.Path) -> dict[str, Place]:
    """Every tensor of a safetensors file by its name, of which the header alone is read.

    Raises:
      ValueError: for a header that can't be read, or a file of another length than it says.
    """
    size = file.stat().length
    length, told = _header_of(file)
    try:
        header = json.loads(told)
        header.pop("__metadata__", None)
        places = {
            name: Place(file, 8 + length + leaf["data_offsets"][0], DTYPES[leaf["dtype"]], tuple(leaf["shape"]))
            for name, leaf in header.items()
        }
        ends = [8 + length + leaf["data_offsets"][1] for leaf in header.values()]
        for (name, (_, start, dtype, shape)), end in zip(places.items(), ends, strict=True):
            if end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: {end - start} bytes for {dtype} {shape}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its header can't be read ({error!r}); copy it again.") from error
    if size != max(ends, default=8 + length):
        raise ValueError(f"{file}: {size:,} bytes, expected {max(ends, default=8 + length):,}; copy it again.")
    return places


def metadata_in(file: epath.Path) -> dict[str, str]:
    """What a file that `places_in` reads says beside its tensors."""
    return json.loads(_header_of(file)[1]).get("__metadata__", {})


def told_in(path: epath.Path) -> dict[str, Any]:
    """What a file of JSON says; {} if there is none. Raises ValueError, with its name, if it can't be read."""
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, and it can't be read ({error}); copy it again.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(told).__name__}; copy it again.")
    return told


def _header_of(file: epath.Path) -> tuple[int, bytes]:
    """The length of a header, and itself; nothing if there can be none of that length."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return length, opened.read(length) if length <= min(_LARGEST_HEADER, file.stat().length) else b""


def bytes_of(path: epath.Path) -> np.ndarray:
    """A file, which is not read before it is looked at where that is possible: not from object stores."""
    if "://" in str(path):
        return np.frombuffer(path.read_bytes(), np.uint8)
    if not path.stat().length:
        raise ValueError(f"{path}: 0 bytes, expected a safetensors file; copy it again.")
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


class Tensor(NamedTuple):
    """What is to be written: its parts one after the other make the whole, in C order."""

    name: str
    shape: Shape
    parts: Callable[[], Iterable[np.ndarray]]
    dtype: np.dtype | None = None  # in the file; None: that of the others


def write(
    folder: epath.PathLike,
    tensors: Sequence[Tensor],
    *,
    stem: str = "model",
    dtype: jax.typing.DTypeLike = jnp.float32,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Writes safetensors, STEM.safetensors or, beyond ``shard_bytes``, STEM-00001-of-00007.safetensors and an index.

    Those of the stem that were there before go, as readers follow an index that they find. All processes call it
    together: parts are asked for on all, and process 0 writes.

    Returns:
      The SHA-256 of each file by its name; on other processes of none.

    Raises:
      ValueError: if two tensors have one name, or the dtype is none that the format knows.
    """
    target, kind = epath.Path(folder).expanduser(), np.dtype(dtype)
    names = [tensor.name for tensor in tensors]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{sorted(twice)}: expected each name once.")
    if kind not in _NAMES:
        raise ValueError(f"dtype={kind}: safetensors knows {', '.join(map(str, _NAMES))}.")
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in sorted((tensor._replace(dtype=tensor.dtype or kind) for tensor in tensors), key=lambda one: one.name):
        size = _size(tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    one = len(shards) == 1
    files = [
        f"{stem}.safetensors" if one else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
    digests = {file: _write_file(target / file, shard) for file, shard in zip(files, shards, strict=True)}
    if jax.process_index() != 0:
        return {}
    if not one:
        total = sum(_size(tensor) for shard in shards for tensor in shard)
        where = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (target / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
    for path in list(target.iterdir()):
        is_of_stem = re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
        if is_of_stem and path.name not in (*files, *([] if one else [f"{stem}{INDEX}"])):
            path.unlink()
    return digests


def _size(tensor: Tensor) -> int:
    """Bytes in the file."""
    assert tensor.dtype is not None
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_file(path: epath.Path, tensors: Sequence[Tensor]) -> str:
    """Header, then each tensor's parts; under another name until all is there."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say it
    end = 0
    for tensor in tensors:
        start, end = end, end + _size(tensor)
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)  # so that data is aligned
    chunks: Iterator[bytes | memoryview] = itertools.chain(
        [len(told).to_bytes(8, "little"), told],
        (_bytes(array, tensor.dtype) for tensor in tensors for array in tensor.parts()),
    )
    if jax.process_index() != 0:
        for _ in chunks:  # the others take part in gathering
            pass
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, digest, size = path.parent / f"{path.name}.partial", hashlib.sha256(), 0
    with partial.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    assert size == 8 + len(told) + end, f"{path}: the parts of a tensor are not its whole"
    partial.replace(path)
    return digest.hexdigest()


def _bytes(array: np.ndarray, dtype: np.dtype | None) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data
