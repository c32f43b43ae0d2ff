# SPDX-License-Identifier: Apache-2.0
"""What the devices send each other in a step, read from the compiled program.

for collective in collectives_of(compiled.as_text(), mesh):
    print(collective.kind, collective.axes, collective.num, collective.bytes)     # all-gather ('fsdp',) 60 1.2e9
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh


class Collective(NamedTuple):
    """All collectives of one kind over the same mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    num: int
    bytes: float  # that one device sends


_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}


def collectives_of(hlo: str, mesh: Mesh) -> Iterator[Collective]:
    """The collectives of a compiled program, loops multiplied out, by kind and by the mesh axes they run over.

    What a device sends of an array of s bytes among g devices, at the least: (g-1)/g s for a gather (s gathered), a
    reduce-scatter (s scattered) and an all-to-all, twice that for an all-reduce, s for a permute.
    """
    bodies = _computations(hlo)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(lambda: [0, 0.0])

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            if loop:
                trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
                walk(loop[1], times * (int(trips[1]) if trips else 1))
                continue
            for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                if " fusion(" in line or " call(" in line or " conditional(" in line or "-start(" in line:
                    walk(called, times)
            kind = re.search(rf" ({'|'.join(_COLLECTIVES)})(-start)?\(", line)
            if not kind:
                continue
            result = line.split(" = ", 1)[1].split(f" {kind[1]}", 1)[0]
            sizes = [_array_bytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
            axes, group = _axes_of(line, mesh)
            whole = max(sizes) * (group if kind[1] == "reduce-scatter" and not kind[2] else 1)
            share = (group - 1) / group if group else 0.0
            sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind[1], share) * whole
            entry = found[kind[1], axes]
            entry[0] += times
            entry[1] += times * sent

    walk("ENTRY", 1)
    for (kind, axes), (num, size) in sorted(found.items(), key=lambda item: -item[1][1]):
        yield Collective(kind, axes, int(num), size)


def _computations(hlo: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of an HLO text; the entry goes by the name "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            current = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            current.append(line)
    return bodies


def _array_bytes(kind: str, dimensions: str) -> float:
    size = _TYPE_BYTES.get(kind, 8 if kind.endswith("64") else 4)
    return float(size * math.prod(int(n) for n in dimensions.split(",") if n))


def _axes_of(line: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """(mesh axes a collective runs over, devices in one group)."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line)
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        rows, order = ([int(n) for n in part.split(",")] for part in (iota[1], iota[2]))
        ids = np.arange(math.prod(order)).reshape(order)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        groups = ids.reshape(rows).tolist()
    else:
        text = pairs or listed
        groups = [] if text is None else [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text[1])]
    shape = tuple(mesh.shape.values())
    if not groups:  # all devices
        groups = [list(range(math.prod(shape)))]
    axes: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape), axis=-1)
        axes |= {name for name, column in zip(mesh.shape, places.T, strict=True) if len(set(column.tolist())) > 1}
    return tuple(name for name in mesh.shape if name in axes), max(map(len, groups))
