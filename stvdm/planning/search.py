# SPDX-License-Identifier: Apache-2.0
"""The mesh, remat policy and micro-batches that fit a slice and take the least time there, by compiling few of many.

    found = search(config, outline, where, ask)          # ask(config) -> the plan of a config, compiled
    print(as_text(found))

Meshes are put in the order of an estimate: arithmetic, and what the devices send each other, one after the other. In
each, memory falls along one ladder, from remat "nothing" down to "everything" and on to more and more micro-batches,
while time rises; bisection finds the first rung that fits. A mesh whose estimate at best is above what was found is
not compiled. The estimate decides what is tried first; what fits, and what is best, the compiled programs decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from stvdm import config as base
from stvdm.planning.chips import CHIPS, Chip
from stvdm.planning.report import Json, gib, mesh_text

REMAT = {"dit": ("nothing", "projections", "attention", "everything"), "autoencoder": ("nothing", "stages")}
LARGEST = {"context": 16, "tensor": 8}  # beyond these a step of this model is all talk
STATE_BYTES = 4 * 5  # of a parameter: weight, average, two moments, gradient


class Rung(NamedTuple):
    """One way to spend less memory and more time in a mesh."""

    remat: str
    accumulate: int


class Tried(NamedTuple):
    """One program that was compiled."""

    mesh: dict[str, int]
    rung: Rung
    fits: bool
    needed_bytes: float
    seconds: float  # arithmetic, memory, links and network one after the other; infinite where it does not fit


class Found(NamedTuple):
    """What a search found: all it tried, in its order, and the number of meshes it left out as they cannot be better,
    or, if it was stopped by ``tries``, as there was no time."""

    tried: list[Tried]
    skipped: int
    stopped: bool
    limit_bytes: float
    state_bytes: float  # weights, average, moments and gradients alone, spread over all devices

    @property
    def best(self) -> Tried | None:
        """The quickest that fits."""
        return min((one for one in self.tried if one.fits), key=lambda one: one.seconds, default=None)

    def to_json(self) -> dict[str, Any]:
        plain = [{**one._asdict(), "rung": one.rung._asdict()} for one in self.tried]
        return {**self._asdict(), "tried": plain, "best": plain[self.tried.index(self.best)] if self.best else None}


def search(
    config: ConfigDict,
    outline: Json,
    *,
    chip: Chip,
    num_devices: int,
    num_slices: int = 1,
    ask: Callable[[ConfigDict], Json],
    tries: int = 16,
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """Searches meshes, remat policies and micro-batches for a config.

    Args:
      config: its mesh, remat policy and micro-batches are what is searched; all else stays.
      outline: its plan, not compiled.
      chip: a row of `CHIPS`.
      num_devices, num_slices: what to spread it over.
      ask: the compiled part of the plan of an edited config.
      tries: programs to compile at most.
      say: is told of each.

    Raises:
      ValueError: if no mesh of these devices divides the batch and the model.
    """
    meshes = sorted(
        ((_estimate(config, outline, chip, mesh, num_slices), mesh) for mesh in _meshes(config, outline, num_devices, num_slices)),
        key=lambda item: item[0],
    )
    if not meshes:
        raise ValueError(
            f"no mesh of {num_devices} devices in {num_slices} slices divides the batch of "
            f"{config.data.buckets[0][3]} clips and the model; change data.buckets' batch or take fewer devices."
        )
    tried: list[Tried] = []
    limit_bytes = chip.memory_gib * 2**30
    state_bytes = STATE_BYTES * sum(outline["parameters"].values()) / num_devices

    def attempt(mesh: dict[str, int], rung: Rung) -> Tried:
        fit = ask(edited(config, mesh, rung))
        seconds = sum(fit["bounds"].values()) if fit["fits"] else math.inf
        one = Tried(mesh, rung, fit["fits"], fit["needed_bytes"], seconds)
        tried.append(one)
        say(_row(one))
        return one

    fastest = math.inf
    for number, (estimate, mesh) in enumerate(meshes):
        if estimate >= fastest:
            return Found(tried, len(meshes) - number, False, limit_bytes, state_bytes)
        ladder = list(_ladder(config, mesh))
        low, high = 0, len(ladder)  # the first rung that fits lies in [low, high]
        while low < high:
            if len(tried) >= tries:
                return Found(tried, len(meshes) - number, True, limit_bytes, state_bytes)
            middle = (low + high) // 2
            try:
                one = attempt(mesh, ladder[middle])
            except ValueError as error:  # some weight does not divide over this mesh
                say(f"{mesh_text(mesh)}: {error}")
                break
            low, high = (low, middle) if one.fits else (middle + 1, high)
            fastest = min(fastest, one.seconds)
    return Found(tried, 0, False, limit_bytes, state_bytes)


def edited(config: ConfigDict, mesh: Mapping[str, int], rung: Rung) -> ConfigDict:
    """The config with this mesh, remat policy and number of micro-batches."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    config.model.remat = rung.remat
    config.optimizer.accumulate = rung.accumulate
    return config


def as_text(found: Found) -> str:
    """What was tried, and what came of it, for people."""
    lines = [f"compiled {len(found.tried)} programs, {found.skipped} meshes left out" + (
        " (raise --tries to go on: what was compiled is kept)" if found.stopped else " as they cannot be quicker"
    )]
    lines += [f"  {_row(one)}" for one in found.tried]
    if found.best:
        mesh, rung = found.best.mesh, found.best.rung
        edits = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        edits += [f"--config.model.remat={rung.remat}", f"--config.optimizer.accumulate={rung.accumulate}"]
        return "\n".join([*lines, "the best that fits: " + " ".join(edits)])
    least = min((one.needed_bytes for one in found.tried), default=found.state_bytes)
    larger = [name for name, chip in CHIPS.items() if chip.memory_gib * 2**30 >= least]
    lines.append(
        f"none fits: the leanest {'tried' if found.tried else 'state alone'} needs {gib(least)} of {gib(found.limit_bytes)} GiB a device. It would take about "
        f"{math.ceil(least / found.limit_bytes)} times the devices"
        + (f", or as many of {' or '.join(larger)}" if larger else "")
        + "; or fewer frames or pixels."
    )
    return "\n".join(lines)


def _row(one: Tried) -> str:
    verdict = f"fits, {one.seconds * 1e3:.0f} ms" if one.fits else "does not fit"
    return (
        f"{mesh_text(one.mesh)}; remat {one.rung.remat}, {one.rung.accumulate} micro-batches: "
        f"{gib(one.needed_bytes)} GiB, {verdict}"
    )


def _meshes(config: ConfigDict, outline: Json, num_devices: int, num_slices: int) -> Iterator[dict[str, int]]:
    """The meshes of so many devices that divide batch and model."""
    is_dit, batch = config.kind == "dit", config.data.buckets[0][3]
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for context, tensor in itertools.product(sizes, sizes):
        if context > LARGEST["context"] or tensor > LARGEST["tensor"] or num_devices % (context * tensor):
            continue
        if not is_dit and (tensor > 1 or outline["clips"][0]["latent"][1] % context):
            continue
        if is_dit and (config.model.num_heads % tensor or config.model.mlp_width % tensor):
            continue
        rest = num_devices // (context * tensor)
        if batch % rest or rest % num_slices:
            continue
        for fsdp in sizes:
            fits_width = not is_dit or config.model.width % fsdp == 0
            if rest % fsdp == 0 and (rest // fsdp) % num_slices == 0 and fits_width:
                yield {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}


def _ladder(config: ConfigDict, mesh: Mapping[str, int]) -> Iterator[Rung]:
    """Rungs of falling memory."""
    policies = REMAT[config.kind]
    for remat in policies:
        yield Rung(remat, 1)
    local = config.data.buckets[0][3] // (mesh["data"] * mesh["fsdp"])
    for parts in range(2, local + 1):
        if local % parts == 0:
            yield Rung(policies[-1], parts)


def _estimate(
    config: ConfigDict, outline: Json, chip: Chip, mesh: Mapping[str, int], num_slices: int
) -> float:
    """Seconds of a step at the top of the ladder, at least; infinite where its state alone does not fit.

    Weights are gathered twice and gradients scattered once over fsdp; gradients are summed over data; queries, keys,
    values and results cross context in each layer, forward and backward; two sums a layer cross tensor, each way.
    """
    weights = 4.0 * sum(outline["parameters"].values()) / mesh["tensor"]
    if STATE_BYTES / 4 * weights / mesh["fsdp"] > chip.memory_gib * 2**30:
        return math.inf
    links = 3 * weights * _share(mesh["fsdp"])
    network = 0.0
    gradients = 2 * weights / mesh["fsdp"] * _share(mesh["data"])
    if num_slices > 1:
        network += gradients
    else:
        links += gradients
    if config.kind == "dit":
        clips = outline["clips"][0]["batch"] / (mesh["data"] * mesh["fsdp"])
        width = 2 if config.model.dtype == "bfloat16" else 4
        stream = clips * outline["clips"][0]["tokens"] / mesh["context"] * config.model.width * width
        layers = config.model.num_layers
        links += 8 * stream / mesh["tensor"] * _share(mesh["context"]) * layers
        links += 8 * stream * _share(mesh["tensor"]) * layers
    arithmetic = outline["model_flops"] / (math.prod(mesh.values()) * chip.flops)
    return arithmetic + links / chip.link_bandwidth + network / chip.network_bandwidth


def _share(parts: int) -> float:
    return (parts - 1) / parts
