# SPDX-License-Identifier: Apache-2.0
"""Answers that took minutes are kept: a plan that was made before on this machine is there in seconds.

    report = answer({"config": config.to_dict(), "topology": "v5p:4x4x4"}, make)

An answer is filed under a digest of its question, of this package's sources and of the versions of what compiles them:
when one of these changes it is made anew. The files are in $STVDM_CACHE, else in stvdm/ in $XDG_CACHE_HOME, else in
~/.cache/stvdm; deleting them costs nothing but time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
COMPILERS = ("jax", "jaxlib", "libtpu", "flax", "optax")


def answer(question: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, from the cache if this was asked before; a cache that cannot be written is done without.

    Args:
      question: all that the answer depends on, beside sources and versions; JSON and tuples.
      make: gives the answer, JSON.
    """
    flags = {name: os.environ.get(name, "") for name in FLAGS}
    asked = json.dumps([question, flags, versions(), source_digest()], sort_keys=True, default=str)
    path = folder() / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # not asked before, or half written by an older program
    made = json.loads(json.dumps(make(), default=_plain, allow_nan=False))
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(made, allow_nan=False), encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
    return made


def folder() -> Path:
    """Where plans are kept."""
    named = os.environ.get("STVDM_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stvdm"
    return base / "plans"


def versions() -> dict[str, str]:
    """The installed version of each of `COMPILERS`, "" of those that are not."""
    found = {}
    for name in COMPILERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def source_digest() -> str:
    """A digest of every source file of this package."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
