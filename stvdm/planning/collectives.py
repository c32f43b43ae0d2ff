# SPDX-License-Identifier: Apache-2.0
"""What the devices send each other in a step, read from the compiled program.

for collective in collectives_of(compiled.as_text(), mesh):
    print(collective.kind, collective.axes, collective.num, collective.bytes)     # all-gather ('fsdp',) 60 1.2e9
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator
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
_NUMBER = re.compile(r"(?:s|u)\d+\[\]|pred\[\]")  # the type of one whole number
_SAME = (  # operations that give the number that they get
    *("bitcast", "convert", "copy", "copy-start", "copy-done", "optimization-barrier", "reshape"),
    *("async-update", "async-done", "call-done"),
)
_WHOLE: dict[str, Callable[..., int]] = {  # what is computed of whole numbers and truths; comparisons by direction
    **{
        "LT": operator.lt,
        "LE": operator.le,
        "GT": operator.gt,
        "GE": operator.ge,
        "EQ": operator.eq,
        "NE": operator.ne,
    },
    **{"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "negate": operator.neg},
    **{"minimum": min, "maximum": max, "and": operator.and_, "or": operator.or_},
    "select": lambda which, one, other: one if which else other,
}
MOST_TURNS = 10_000  # a loop that counts longer is not followed to its end
_IOTA = r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?"
_AXIS = r"'([^']+)'(?::\((\d+)\)(\d+))?"

Bodies = dict[str, list[str]]  # name -> lines of each computation
Numbers = dict[int, int]  # place in a tuple -> number
Given = Callable[[int, int | None], int | None]  # (parameter, place in it if it is a tuple) -> number, None if unknown
Read = Callable[[str, int | None], int | None]  # (name, place in it if it is a tuple) -> number, None if unknown
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

    def walk(
        name: str, given: Given = lambda parameter, place: None, *, counted: Collection[str | None] = ()
    ) -> Counts:
        found: Counts = {}
        read = _reader(_definitions(bodies.get(name, [])), given, bodies)
        for line in bodies.get(name, ()):
            loop = re.search(r" while\(.*body=%?([\w.\-]+)", line)
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            called = [*re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)]
            called = called or ([part.strip().lstrip("%") for part in branches[1].split(",")] if branches else [])
            if loop:
                turns, stay = _turns(line, read, bodies)
                _merge(
                    found,
                    walk(loop[1], _in_one_tuple(stay)),
                    times=1 if turns is None else turns,
                    exact=turns is not None,
                )
            elif called:
                _merge(found, max(map(walk, called), key=lambda counts: sum(entry[1] for entry in counts.values())))
            elif inner := _CALLS.search(line):
                given_here = _operands(_operation(line)[1], read)
                inside = walk(inner[1], given_here, counted=() if _is_start(line) else started)
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


def _turns(line: str, read: Read, bodies: Bodies) -> tuple[int | None, Numbers]:
    """How often a loop turns, and what stays as it is meanwhile: the numbers of its tuple by their place.

    So many times as the program says, else by running what it counts; None if that does not follow from constants. A
    compiler writes a loop in many ways: what it counts and how it ends may stand in fusions and calls, be copied from
    one memory to another, be carried along. So no form is looked for: the whole numbers in the loop's tuple are
    followed turn by turn, until its condition gives false.

    Args:
      line: the loop's.
      read: of the computation that it stands in.
      bodies: all computations.
    """
    told = re.search(r"known_trip_count[^0-9]*(\d+)", line)
    known = int(told[1]) if told else None
    said = re.search(r" while\(%?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not said:
        return known, {}
    condition, body = (_definitions(bodies.get(name, [])) for name in said.groups()[1:])
    places = range(line.count("["))  # no more than there are types in its line
    now = {i: n for i in places if (n := read(said[1], i)) is not None}
    stay = dict(now)
    for turns in range(MOST_TURNS):
        holds = _reader(condition, _in_one_tuple(now), bodies)("ROOT", None) if known is None else turns < known
        if holds is None:
            break
        if not holds:
            return turns, stay
        after = _reader(body, _in_one_tuple(now), bodies)
        now = {i: n for i in now if (n := after("ROOT", i)) is not None}
        stay = {i: n for i, n in stay.items() if now.get(i) == n}
    return known, {}


def _reader(here: dict[str, str], given: Given, bodies: Bodies) -> Read:
    """Tells the whole numbers of a computation, as far as they follow from constants and from what it is called with.

    Args:
      here: its `_definitions`.
      given: what it is called with.
      bodies: all computations.
    """

    @functools.cache
    def read(name: str, place: int | None) -> int | None:
        said = here.get(name, "")
        kind, operands, rest = _operation(said)
        if place is None and not _NUMBER.match(said) and not kind.endswith("-start"):
            return None
        if kind == "parameter":
            return given(int(re.findall(r" parameter\((\d+)\)", said)[0]), place)
        if kind == "constant":
            value = re.findall(r" constant\(([^)]*)\)", said)[0]
            return {"true": 1, "false": 0}[value] if value in ("true", "false") else int(value)
        if kind == "tuple":
            return read(operands[place], None) if place is not None and place < len(operands) else None
        if kind == "get-tuple-element":
            return read(operands[0], int(re.findall(r"index=(\d+)", rest)[0])) if place is None else None
        if kind in _SAME:
            return read(operands[0], place)
        if inner := _CALLS.search(said):
            return _reader(_definitions(bodies.get(inner[1], [])), _operands(operands, read), bodies)("ROOT", place)
        direction = re.search(r"direction=(\w+)", rest)
        compute = _WHOLE.get(direction[1] if direction else kind)
        numbers = [read(operand, None) for operand in operands] if compute and place is None else [None]
        return int(compute(*numbers)) if compute and None not in numbers else None

    return read


def _in_one_tuple(numbers: Numbers) -> Given:
    """Of a computation that is called with one tuple, of which these numbers are known."""
    return lambda parameter, place: None if parameter or place is None else numbers.get(place)


def _operands(names: tuple[str, ...], read: Read) -> Given:
    """Of a computation that is called with these names of another."""
    return lambda parameter, place: read(names[parameter], place) if parameter < len(names) else None


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


def _merge(found: Counts, more: Counts, *, times: int = 1, exact: bool = True) -> None:
    for key, (num, size, is_exact) in more.items():
        had = found.get(key, (0, 0.0, True))
        found[key] = (had[0] + times * num, had[1] + times * size, had[2] and is_exact and exact)


def _computations(hlo: str) -> Bodies:
    """Name -> lines of each computation of an HLO text; the entry goes by the name "ENTRY"."""
    bodies: Bodies = collections.defaultdict(list)
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
