# SPDX-License-Identifier: Apache-2.0
"""Results as small JSON files that people read too: few digits, null for nan, what is short on one line.

Files are written whole or not at all, and so is what lies beside them.

    write("results.json", result)
    result = read("results.json")
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

WIDTH = 400  # characters: what fits stands on one line


def rounded(value: Any, digits: int = 6) -> Any:
    """The same with floats of so many digits, and lists for tuples."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") + 0.0  # of -0.0 that makes 0.0
    if isinstance(value, Mapping):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def kept(value: Any, digits: int = 6) -> Any:
    """The same, rounded, as it comes back from a file."""
    return json.loads(as_json(rounded(value, digits)))


def as_json(value: Any) -> str:
    """JSON in lines, in which numbers stand many to a line; null for nan, which JSON has not."""
    return _lines(_without_nan(value), 0) + "\n"


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to write, which has its name only once all of it is written; makes its folder."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{target.name}.partial"
    with partial.open("wb") as file:
        yield file
    partial.replace(target)


def write(path: epath.PathLike, result: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all; makes its folder."""
    with whole(path) as file:
        file.write(as_json(result).encode())


def read(path: epath.PathLike) -> dict[str, Any]:
    """A result as it was written.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not JSON, or not a mapping; the message names the file.
    """
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"{path}: no such result; `stvdm evaluate --output={path}` writes one.")
    text = epath.Path(path).read_text()
    try:
        result = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a result in JSON, got {text[:40]!r}: {error}.") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path}: expected a result, a JSON object, got {type(result).__name__}.")
    return result


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _lines(value: Any, depth: int) -> str:
    text, pad = json.dumps(value), " " * (depth + 1)
    if len(text) + depth <= WIDTH or not isinstance(value, Mapping | list):
        return text
    if isinstance(value, Mapping):
        inside = [f"{json.dumps(key)}: {_lines(one, depth + 1)}" for key, one in value.items()]
        return "{\n" + pad + f",\n{pad}".join(inside) + "\n" + pad[1:] + "}"
    if not any(isinstance(one, Mapping | list) for one in value):
        return text  # a long list of numbers
    return "[\n" + pad + f",\n{pad}".join(_lines(one, depth + 1) for one in value) + "\n" + pad[1:] + "]"
