# SPDX-License-Identifier: Apache-2.0
"""What the devices send each other in a step, read from the compiled program.

for collective in collectives_of(compiled.as_text(), mesh):
    print(collective.kind, collective.axes, collective.num, collective.bytes)     # all-gather ('fsdp',) 60 1.2e9
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh


class Collective(NamedTuple):
    """All collectives of one kind over the same mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    num: int
    bytes: float  # that one device sends
    exact: bool = True  # False: some stand in a loop whose number of turns is not in the program; one turn counts


BETWEEN_SLICES = "between slices"  # the kind of what goes over the network of the data centre

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "token": 0}

_CALLS = re.compile(r" (?:fusion|call|call-start|async-start)\(.*(?:calls|to_apply)=%?([\w.\-]+)")
_IOTA = r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?"
_AXIS = r"'([^']+)'(?::\((\d+)\)(\d+))?"

Counts = dict[tuple[str, tuple[str, ...]], tuple[int, float, bool]]  # (kind, axes) -> num, bytes, exact


def collectives_of(hlo: str, mesh: Mesh, *, num_slices: int = 1) -> Iterator[Collective]:
    """The collectives of a compiled program, loops multiplied out, by kind and by the mesh axes they run over.

    What a device sends of an array of s bytes among g devices, at the least: (g-1)/g s for a gather (s gathered), a
    reduce-scatter (s scattered) and an all-to-all, twice that for an all-reduce, s for a permute. Between slices
    the same, but that a gather's s is there what one device gives: it sends (g-1) s. Of the branches of a conditional
    the one that sends most counts.

    Raises:
      ValueError: if the program says in a way that is not known here which devices form a group.
    """
    bodies = _computations(hlo)

    # A TPU may gather in pieces, beside the arithmetic of several fusions; each of them names the gather that started.
    starts = [_CALLS.search(line) for lines in bodies.values() for line in lines if _is_start(line)]
    started = {_channel(line) for call in filter(None, starts) for line in bodies[call[1]]} - {None}

    def walk(name: str, *, counted: Collection[str | None] = ()) -> Counts:
        found: Counts = {}
        for line in bodies.get(name, ()):
            loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            called = [*re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)]
            called = called or ([part.strip().lstrip("%") for part in branches[1].split(",")] if branches else [])
            if loop:
                turns = _turns(line, bodies[name], bodies)
                _merge(found, walk(loop[1]), times=turns or 1, exact=turns is not None)
            elif called:
                _merge(found, max(map(walk, called), key=lambda counts: sum(entry[1] for entry in counts.values())))
            elif inner := _CALLS.search(line):
                inside = walk(inner[1], counted=() if _is_start(line) else started)
                if inner[1].startswith("all-reduce-scatter"):  # a TPU's reduce-scatter: each keeps a part of the sum
                    inside = {
                        ("reduce-scatter" if kind == "all-reduce" else kind, axes): (num, size / 2, exact)
                        for (kind, axes), (num, size, exact) in inside.items()
                    }
                _merge(found, inside)
            elif _channel(line) not in counted:
                _merge(found, _collective(line, mesh, num_slices))
        return found

    for (kind, axes), (num, size, exact) in sorted(walk("ENTRY").items(), key=lambda item: -item[1][1]):
        yield Collective(kind, axes, num, size, exact)


def _is_start(line: str) -> bool:
    return line.lstrip().startswith("%async-collective-start")


def _channel(line: str) -> str | None:
    """The number that a transfer goes by."""
    said = re.search(r"channel_id=(\d+)", line)
    return said and said[1]


def _collective(line: str, mesh: Mesh, num_slices: int) -> Counts:
    """The one collective of a line of a program, if it is one."""
    between = re.search(r" = (.*?) send\(.*_xla_(?:megascale|host)_transfer\w*_type=\"?(\w+)", line)
    if between:
        share = (num_slices - 1) / num_slices
        times = {"ALL_REDUCE": 2 * share, "REDUCE_SCATTER": share, "ALL_TO_ALL": share, "ALL_GATHER": num_slices - 1}
        return {(BETWEEN_SLICES, ("data",)): (1, times.get(between[2], 1.0) * sum(_arrays(between[1])), True)}
    op = re.search(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
    if not op:
        return {}
    kind, starts = op[2], op[3] is not None
    axes, group = _axes_of(line, mesh)
    if group == 1:  # what is left of one that the compiler took apart
        return {}
    whole = sum(_arrays(op[1]))  # of the results; of what starts, of its operands too
    if kind == "all-gather" and starts:
        whole *= group / (group + 1)
    elif kind == "reduce-scatter":
        whole *= group / (group + 1) if starts else group
    elif kind in ("collective-permute", "all-to-all") and starts:
        whole /= 2
    share = (group - 1) / group
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * whole
    return {(kind, axes): (1, sent, True)}


def _turns(line: str, around: list[str], bodies: dict[str, list[str]]) -> int | None:
    """How often a loop turns: as the program says, else by what it counts from, by and up to; None if unclear."""
    if known := re.search(r"known_trip_count[^0-9]*(\d+)", line):
        return int(known[1])
    said = re.search(r" while\(%?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not said:
        return None
    here, condition, body = (_definitions(lines) for lines in (around, bodies.get(said[2], []), bodies[said[3]]))
    kind, compared, rest = _operation(condition.get("ROOT", ""))
    place = re.search(r"index=(\d+)", _operation(condition.get(compared[0], ""))[2]) if compared else None
    if kind != "compare" or "direction=LT" not in rest or not place:
        return None
    _, starts, _ = _operation(here.get(said[1], ""))
    _, ends, _ = _operation(body["ROOT"])
    kind, added, _ = _operation(body.get(ends[int(place[1])], ""))
    numbers = [_constant(body, name) for name in added] if kind == "add" else []
    step = next((number for number in numbers if number is not None), None)
    first, end = _constant(here, starts[int(place[1])]), _constant(condition, compared[1])
    return None if first is None or end is None or not step else -((first - end) // step)


def _definitions(lines: list[str]) -> dict[str, str]:
    """Name -> right side of each line of a computation; what it returns goes by the name "ROOT" too."""
    found = {}
    for line in lines:
        if said := re.match(r"\s*(ROOT )?%?([\w.\-]+) = (.*)", line):
            found[said[2]] = found["ROOT" if said[1] else said[2]] = said[3]
    return found


def _operation(said: str) -> tuple[str, tuple[str, ...], str]:
    """(kind, names of the operands, the rest) of a right side such as "s32[] add(%a, %b), metadata={}"."""
    found = re.search(r"(?:^| )([\w\-]+)\(([^()]*)\)(.*)", said)
    return (found[1], tuple(re.findall(r"%([\w.\-]+)", found[2])), found[3]) if found else ("", (), "")


def _constant(definitions: dict[str, str], name: str) -> int | None:
    said = definitions.get(name, "")
    if number := re.search(r" constant\((-?\d+)\)", said):
        return int(number[1])
    kind, operands, _ = _operation(said)
    return _constant(definitions, operands[0]) if kind in ("copy", "bitcast") else None


def _merge(found: Counts, more: Counts, *, times: int = 1, exact: bool = True) -> None:
    for key, (num, size, is_exact) in more.items():
        had = found.get(key, (0, 0.0, True))
        found[key] = (had[0] + times * num, had[1] + times * size, had[2] and is_exact and exact)


def _computations(hlo: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of an HLO text; the entry goes by the name "ENTRY"."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    current: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            current = bodies["ENTRY" if head[1] else head[2]]
        else:
            current.append(line)
    return bodies


def _arrays(shape: str) -> list[float]:
    """Bytes of each array of a result such as "(f32[8,16]{1,0}, bf16[4])"; what keeps a transfer's state counts not."""
    return [_array_bytes(kind, size) for kind, size in re.findall(r"(\w+)\[([\d,]*)\]", shape) if kind != "u32" or size]


def _array_bytes(kind: str, dimensions: str) -> float:
    width = 1 if kind.startswith("f8") else _TYPE_BYTES.get(kind, 8 if kind.endswith("64") else 4)
    return float(width * math.prod(int(n) for n in dimensions.split(",") if n))


def _iota(said: re.Match[str]) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): the numbers 0 to 7 as (4, 2), transposed, as (2, 4); without [2,4]<= as one row."""
    rows, order, axes = ([int(n) for n in part.split(",")] if part else None for part in said.groups())
    ids = np.arange(math.prod(order or ())).reshape(order or ())
    return ids.transpose(axes).reshape(rows or -1)


def _groups_of_named_axes(mesh: str, order: str | None, among: str) -> list[list[int]]:
    """mesh['a'=4,'b'=2] {'a':(1)2}: of a mesh of devices in order, those that differ along an axis or a part of it.

    ``:(p)n`` is the part of size n after one of size p, counted from the slowest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = [(name, int(before or 1), int(size or 0)) for name, before, size in re.findall(_AXIS, among)]
    iota = re.match(_IOTA, order or "")
    if not sizes or not parts or any(name not in sizes for name, _, _ in parts) or (order and not iota):
        raise ValueError(f"groups of devices are told in a form that is not known here: {mesh!r} {order!r} {among!r}")
    ids = _iota(iota) if iota else np.arange(math.prod(sizes.values()))
    split: list[tuple[int, bool]] = []  # of each axis, or its parts: size, and whether a group runs along it
    for name, size in sizes.items():
        cuts = {1, size, *(cut for axis, before, n in parts if axis == name for cut in (before, before * (n or size)))}
        for first, last in itertools.pairwise(sorted(cuts)):
            inside = any(axis == name and before <= first and last <= before * (n or size) for axis, before, n in parts)
            split.append((last // first, inside))
    along = [axis for axis, (_, inside) in enumerate(split) if inside]
    apart = [axis for axis, (_, inside) in enumerate(split) if not inside]
    grid = ids.reshape([size for size, _ in split]).transpose([*apart, *along])
    return grid.reshape(-1, math.prod(split[axis][0] for axis in along)).tolist()


def _axes_of(line: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """(mesh axes a collective runs over, devices in one group)."""
    said = re.search(r"(replica_groups|source_target_pairs)=(.*)", line)
    text = said[2] if said else "{}"
    iota = re.match(_IOTA, text)
    shape = tuple(mesh.shape.values())
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", text)
    if iota:
        groups = _iota(iota).tolist()
    elif named:
        groups = _groups_of_named_axes(named[1], named[2], named[3])
    elif listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    elif text.startswith("{}"):
        groups = [list(range(math.prod(shape)))]  # all devices
    else:
        raise ValueError(f"groups of devices are told in a form that is not known here: {said and said[0][:120]!r}")
    axes: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape), axis=-1)
        axes |= {name for name, column in zip(mesh.shape, places.T, strict=True) if len(set(column.tolist())) > 1}
    return tuple(name for name in mesh.shape if name in axes), max(map(len, groups))
