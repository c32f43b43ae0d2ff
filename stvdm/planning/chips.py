# SPDX-License-Identifier: Apache-2.0
"""Chips, their published peaks, and slices of them that need not be here.

where = topology("v5p:4x4x4")          # 64 devices for `sharding.make_mesh` and the compiler; nothing can run on them
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Peaks of one device as JAX sees it, and where they are published. Bandwidths are in bytes per second, one way."""

    flops: float  # bfloat16, dense
    eight_bit_flops: dict[str, float]  # of the kinds of `models.quantized` that its arithmetic has
    memory_bandwidth: float
    link_bandwidth: float  # all links of the device together, inside a slice
    network_bandwidth: float  # the device's share of its host's network card, between slices
    memory_gib: float  # what the compiler grants
    source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v5e": Chip(197e12, {"int8": 393e12}, 0.819e12, 200e9, 3.125e9, 15.75, _DOCS + "v5e"),
    "v5p": Chip(459e12, {"int8": 918e12}, 2.765e12, 600e9, 6.25e9, 95.74, _DOCS + "v5p"),
    "v6e": Chip(918e12, {"int8": 1836e12}, 1.640e12, 400e9, 12.5e9, 31.25, _DOCS + "v6e"),
    "tpu7x": Chip(  # two devices a chip
        2307e12 / 2, {"fp8": 4614e12 / 2}, 7.38e12 / 2, 600e9 / 2, 12.5e9 / 2, 94.75, _DOCS + "tpu7x"
    ),
}

DEVICES_PER_CHIP = {"tpu7x": 2}


# Slices by size, that are let and that the compiler knows (`tests/planning/test_plan.py`); a v5p or tpu7x has others.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {
    "v5e": _FLAT,
    "v5p": (*_CUBES, "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": _CUBES,
}


# What JAX calls the devices of a chip.
DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


EIGHT_BIT_PARTS = ("projections of attention", "MLP")  # of `flops.count_flops`: what `models.quantized` rounds


def arithmetic_seconds(step_flops: Mapping[str, float], chip: Chip, matmul: str = "") -> float:
    """The least time of a step on one device; products in eight bits go at their peak, where the chip has one.

    Args:
      step_flops: by part.
      chip: a row of `CHIPS`.
      matmul: of a config's model: "", "int8" or "fp8".
    """
    rounded = chip.eight_bit_flops.get(matmul, chip.flops)
    return sum(flops / (rounded if part in EIGHT_BIT_PARTS else chip.flops) for part, flops in step_flops.items())


def peak_flops(device_kind: str) -> float | None:
    """The published peak of a device of this kind (`jax.Device.device_kind`); None if it is not in the table."""
    chip = DEVICE_KINDS.get(device_kind)
    return CHIPS[chip].flops if chip else None


class Topology(NamedTuple):
    """Devices that need not be here."""

    name: str
    chip: str
    devices: list[Any]
    num_slices: int


def num_devices(name: str, *, num_slices: int = 1) -> int:
    """How many devices JAX sees in a slice such as "v5p:4x4x4", or in several, by its name alone."""
    chip, shape = chip_of(name), name.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"topology={name!r}: expected CHIP:SHAPE, e.g. v5p:4x4x4.")
    return math.prod(map(int, shape.split("x"))) * DEVICES_PER_CHIP.get(chip, 1) * num_slices


def chip_of(name: str) -> str:
    """The chip of a slice such as "v5p:4x4x4".

    Raises:
      ValueError: if it is not in `CHIPS`.
    """
    chip = name.partition(":")[0]
    if chip not in CHIPS:
        raise ValueError(f"topology={name!r}: expected CHIP:SHAPE with a chip of {', '.join(CHIPS)}, e.g. v5p:4x4x4.")
    return chip


def topology(name: str, *, num_slices: int = 1) -> Topology:
    """The devices of a TPU slice such as "v5p:4x4x4", for the compiler alone; or of several equal slices.

    Raises:
      ValueError: for a chip or shape that the compiler does not know, or if the TPU compiler is not installed.
    """
    from jax.experimental import topologies

    chip = chip_of(name)
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={name!r}: the TPU compiler is not installed (no TPU is needed for it): "
            "pip install -e '.[tpu]' on Linux, or plan without --compile."
        )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise ValueError(f"topology={name!r}: the TPU compiler does not know it: {error}") from error
    return Topology(name, chip, list(found.devices), num_slices)
