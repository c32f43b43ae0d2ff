# SPDX-License-Identifier: Apache-2.0
"""The mesh, remat policy and micro-batches that fit a slice and take the least time there, by compiling few of many.

    found = search(config, outline, where, ask)          # ask(config) -> the plan of a config, compiled
    print(as_text(found))

Meshes are put in the order of an estimate: arithmetic, and what the devices send each other, one after the other. In
each, memory falls along one ladder, from remat "nothing" down to "everything" and on to more and more micro-batches,
while time rises; bisection finds the first rung that fits. A mesh that is estimated slower than what was found is not
compiled. The estimate decides what is tried; what fits, and what is best of it, the compiled programs decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from stvdm.models.context_parallel import split_context
from stvdm.planning.chips import CHIPS, SLICES, Chip
from stvdm.planning.chips import num_devices as devices_of
from stvdm.planning.report import Json, duration, gib, mesh_text

REMAT = {  # from most memory to least
    "dit": ("nothing", "projections", "attention", "offload", "everything"),
    "autoencoder": ("nothing", "stages"),
}
LARGEST = {"context": 16, "tensor": 8}  # beyond these a step of this model is all talk


class Rung(NamedTuple):
    """One way to spend less memory and more time in a mesh."""

    remat: str
    accumulate: int


class Tried(NamedTuple):
    """One program that was compiled."""

    mesh: dict[str, int]
    rung: Rung
    fits: bool
    needed_bytes: float | None  # None: the compiler refused without a number
    seconds: float | None  # arithmetic, memory, links and network one after the other; None where it does not fit


class Found(NamedTuple):
    """What a search found: all it tried, in its order, and how many meshes it left out, for which reason."""

    tried: list[Tried]
    too_large: int  # their weights, averages and moments alone do not fit
    slower: int  # as estimated
    unseen: int  # there were no ``tries`` left
    limit_bytes: float
    state_bytes: float  # weights, averages and moments alone, spread over all devices
    larger: str  # the smallest slice of this chip that has a mesh and enough memory in all, "" if none fits or has

    @property
    def least_bytes(self) -> float:
        """What the leanest program needs; of the state alone, if none was compiled or told."""
        return min((one.needed_bytes for one in self.tried if one.needed_bytes is not None), default=self.state_bytes)

    @property
    def best(self) -> Tried | None:
        """The quickest that fits."""
        fitting = [(one.seconds, i) for i, one in enumerate(self.tried) if one.seconds is not None]
        return self.tried[min(fitting)[1]] if fitting else None

    def to_json(self) -> dict[str, Any]:
        plain = [{**one._asdict(), "rung": one.rung._asdict()} for one in self.tried]
        return {**self._asdict(), "tried": plain, "best": plain[self.tried.index(self.best)] if self.best else None}


def search(
    config: ConfigDict,
    outline: Json,
    *,
    chip: str,
    num_devices: int,
    num_slices: int = 1,
    ask: Callable[[ConfigDict], Json],
    arithmetic: Callable[[str], float],
    tries: int = 16,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Searches meshes, remat policies and micro-batches for a config.

    Args:
      config: its mesh, remat policy and micro-batches are what is searched; all else stays.
      outline: its plan, not compiled.
      chip: its name in `CHIPS`.
      num_devices, num_slices: what to spread it over.
      ask: the compiled part of the plan of an edited config.
      arithmetic: the least seconds of a whole step under a remat policy, on one device.
      tries: programs to compile at most.
      say: is told of each.

    Raises:
      ValueError: if no mesh of these devices divides the batch and the model, or all of them are refused.
    """
    possible = list(_meshes(config, outline, num_devices, num_slices))
    if not possible:
        raise ValueError(
            f"no mesh of {num_devices} devices in {num_slices} slices divides the batch of "
            f"{config.data.buckets[0][3]} clips and the model; change data.buckets' batch or take fewer devices."
        )
    limit_bytes = CHIPS[chip].memory_gib * 2**30
    state_bytes = outline["state_bytes"]
    policies = _worthwhile(REMAT[config.kind], arithmetic)
    least = arithmetic(policies[0])
    meshes = sorted(
        (
            (_estimate(config, outline, least, CHIPS[chip], mesh, num_slices), i, mesh)
            for i, mesh in enumerate(possible)
            if state_bytes / (mesh["fsdp"] * mesh["context"] * mesh["tensor"]) <= limit_bytes
        )
    )
    tried: list[Tried] = []
    unseen = slower = 0
    refusal: ValueError | None = None
    fastest = math.inf
    for estimate, _, mesh in meshes:
        if estimate >= fastest:
            slower += 1
            continue
        ladder = list(_ladder(config, mesh, policies))
        low, high = 0, len(ladder)  # the first rung that fits lies in [low, high]
        while low < high and len(tried) < tries:
            middle = (low + high) // 2
            try:
                fit = ask(edited(config, mesh, ladder[middle]))
            except ValueError as error:  # the batch of some bucket or some weight does not divide over this mesh
                say(f"{mesh_text(mesh)}: {error}")
                refusal = error
                break
            seconds = sum(fit["bounds"].values()) if fit["fits"] else None
            tried.append(Tried(mesh, ladder[middle], fit["fits"], fit["needed_bytes"], seconds))
            say(_row(tried[-1]))
            low, high = (low, middle) if fit["fits"] else (middle + 1, high)
            fastest = min(fastest, seconds or math.inf)
        else:
            unseen += low < high
    if refusal and not tried:
        raise refusal  # it is not the meshes
    too_large = len(possible) - len(meshes)
    found = Found(tried, too_large, slower, unseen, limit_bytes, state_bytes / num_devices, "")
    if found.best:
        return found
    needed = math.ceil(found.least_bytes / limit_bytes) * num_devices
    larger = (f"{chip}:{shape}" for shape in SLICES[chip])
    enough = (where for where in larger if devices_of(where, num_slices=num_slices) >= max(needed, num_devices + 1))
    has_mesh = (
        where for where in enough if any(_meshes(config, outline, devices_of(where, num_slices=num_slices), num_slices))
    )
    slices = f"{num_slices} x " if num_slices > 1 else ""
    return found._replace(larger=next((slices + where for where in has_mesh), ""))


def edited(config: ConfigDict, mesh: Mapping[str, int], rung: Rung) -> ConfigDict:
    """The config with this mesh, remat policy and number of micro-batches."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.model.remat = rung.remat
    config.optimizer.accumulate = rung.accumulate
    return config


def as_text(found: Found) -> str:
    """What was tried, and what came of it, for people."""
    left_out = {
        "too large even for their weights": found.too_large,
        "estimated slower": found.slower,
        "not searched through (raise --tries to go on: what was compiled is kept)": found.unseen,
    }
    reasons = "".join(f"; {number} meshes {reason}" for reason, number in left_out.items() if number)
    lines = [f"compiled {len(found.tried)} programs{reasons}", *(f"  {_row(one)}" for one in found.tried)]
    if found.best:
        mesh, rung = found.best.mesh, found.best.rung
        edits = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        edits += [f"--config.model.remat={rung.remat}", f"--config.optimizer.accumulate={rung.accumulate}"]
        return "\n".join([*lines, "the best that fits: " + " ".join(edits)])
    told = any(one.needed_bytes is not None for one in found.tried)
    larger = [name for name, chip in CHIPS.items() if chip.memory_gib * 2**30 >= found.least_bytes]
    of_those = "of those tried " if found.unseen else ""
    named = f"e.g. {found.larger}" if found.larger else "which no slice of this chip with a mesh for this batch has"
    times = math.ceil(found.least_bytes / found.limit_bytes)
    lines += [
        f"none {of_those}fits: the leanest {'' if told else 'state '}needs {gib(found.least_bytes)} of "
        f"{gib(found.limit_bytes)} GiB a device. Take at least {times} times the devices, {named}"
        + (f", or {' or '.join(larger)}" if larger else "")
        + ", or fewer frames or pixels.",
        "That is if all memory were split by so many more: weights, averages and moments are, but what is kept of a "
        "clip only by more context and tensor, and some of it not at all. So plan that slice too.",
        f"Looked at were meshes of context up to {LARGEST['context']} and tensor up to {LARGEST['tensor']} in which "
        "data x fsdp divides the batch; in each the remat policies, and micro-batches down to one clip a device.",
    ]
    return "\n".join(lines)


def _row(one: Tried) -> str:
    verdict = "does not fit" if one.seconds is None else f"fits, {duration(one.seconds)}"
    needed = "more than there is" if one.needed_bytes is None else f"{gib(one.needed_bytes)} GiB"
    return f"{mesh_text(one.mesh)}; remat {one.rung.remat}, {one.rung.accumulate} micro-batches: {needed}, {verdict}"


def _meshes(config: ConfigDict, outline: Json, num_devices: int, num_slices: int) -> Iterator[dict[str, int]]:
    """The meshes of so many devices that divide batch and model."""
    is_dit, batch = config.kind == "dit", config.data.buckets[0][3]
    _, rows, columns = outline["clips"][0]["latent"]
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for context, tensor in itertools.product(sizes, sizes):
        if context > LARGEST["context"] or tensor > LARGEST["tensor"] or num_devices % (context * tensor):
            continue
        if not is_dit and (rows % context or columns % tensor):
            continue
        if is_dit and (config.model.num_heads % tensor or config.model.mlp_width % tensor):
            continue
        rest = num_devices // (context * tensor)
        if batch % rest or rest % num_slices:
            continue
        for fsdp in sizes if is_dit else (1,):  # an autoencoder's weights are not split
            divides = not is_dit or config.model.width % (fsdp * context) == 0
            if rest % fsdp == 0 and (rest // fsdp) % num_slices == 0 and divides:
                yield {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}


def _worthwhile(policies: tuple[str, ...], arithmetic: Callable[[str], float]) -> tuple[str, ...]:
    """The policies, without those that compute more again than one of less memory does."""
    costs = [arithmetic(policy) for policy in policies]
    return tuple(policy for i, policy in enumerate(policies) if all(costs[i] <= cost for cost in costs[i + 1 :]))


def _ladder(config: ConfigDict, mesh: Mapping[str, int], policies: tuple[str, ...]) -> Iterator[Rung]:
    """Rungs of falling memory."""
    for remat in policies:
        yield Rung(remat, 1)
    local = config.data.buckets[0][3] // (mesh["data"] * mesh["fsdp"])
    for parts in range(2, local + 1):
        if local % parts == 0:
            yield Rung(policies[-1], parts)


def _estimate(
    config: ConfigDict, outline: Json, arithmetic: float, chip: Chip, mesh: Mapping[str, int], num_slices: int
) -> float:
    """Seconds of a step that computes nothing again, if nothing of it ran side by side.

    Weights are gathered twice and gradients scattered once over fsdp and context, and summed over data. In
    each layer queries, keys, values and results cross context by all-to-all, forward and backward, or keys and values
    go round a ring; two sums cross tensor, each way.
    """
    weights = 4.0 * sum(outline["parameters"].values()) / mesh["tensor"]
    split = mesh["fsdp"] * mesh["context"]
    gradients = 2 * weights / split * _share(mesh["data"])
    between = gradients * (num_slices - 1) / max(1, mesh["data"] - 1)
    links = 3 * weights * _share(split) + gradients - between
    if config.kind == "dit":
        clips = outline["clips"][0]["batch"] / (mesh["data"] * mesh["fsdp"])
        width = 2 if config.model.dtype == "bfloat16" else 4
        stream = clips * outline["clips"][0]["tokens"] / mesh["context"] * config.model.width * width
        all_to_all, ring = split_context(mesh["context"], config.model.num_heads // mesh["tensor"])
        crossing = 8 * _share(all_to_all) + 6 * (ring - 1)
        links += config.model.num_layers * stream * (crossing / mesh["tensor"] + 8 * _share(mesh["tensor"]))
    return arithmetic / math.prod(mesh.values()) + links / chip.link_bandwidth + between / chip.network_bandwidth


def _share(parts: int) -> float:
    return (parts - 1) / parts
