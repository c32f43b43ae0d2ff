# SPDX-License-Identifier: Apache-2.0
"""The mesh, and one strict table that says which dimension of an array is split over which axis of it.

Modules name the dimensions of their arrays with logical names; only this file knows what a name means on a
machine. An unknown name, a name that stands twice in an array, or two names that want the same mesh axis raise:
nothing is ever left unsharded in silence.

    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        tokens_BND = constrain(tokens_BND, "batch", "tokens", None)
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {  # logical name -> mesh axes      what it splits
    "batch": ("data", "fsdp"),  # examples
    "tokens": "context",  # video tokens of one example
    "rows": "context",  # rows of the frames of one example: convolutions exchange their borders
    "columns": "tensor",  # and their columns
    "width": ("fsdp", "context"),  # a weight's D: whoever shares a clip shares the weights too
    "heads": "tensor",  # a weight's heads x head width, and activations by head
    "mlp": "tensor",  # a weight's F
    "adapter": ("tensor", "fsdp", "context"),  # the wide side of a low-rank adapter, as far as it divides
    "layers": None,  # the stacked layers of a scan
    "channels": None,  # convolution channels
    "text": None,  # a weight's E
    "vocab": None,  # rows of an embedding
}
AS_FAR_AS = {"adapter"}  # names whose last mesh axes are left out where they don't divide the dimension


def make_mesh(
    *, data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices with the axes of `MESH_AXES`; one axis may be -1 and takes what is left.

    Where there are several TPU slices, only ``data`` goes from one to the next: their network is far slower than the
    links inside.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or ``data`` to that of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise ValueError(f"mesh={sizes}: expected sizes of at least 1, and -1 (the rest) for at most one axis.")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"mesh={sizes}: its axes multiply to {fixed}, but there are {len(devices)} devices; "
            f"let the product divide {len(devices)} and give one axis -1."
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    on_tpu = devices[0].platform == "tpu"
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if sizes["data"] % num_slices:
        raise ValueError(
            f"mesh={sizes}: data={sizes['data']} is split over {num_slices} slices; make it a multiple of "
            f"{num_slices}, so that no other axis leaves its slice."
        )
    if num_slices > 1:
        inside, between = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
    elif on_tpu:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def meet(mesh: Mesh) -> None:
    """Lets the processes of a job on CPUs meet along every set of mesh axes; on other devices there is no need.

    Gloo, which carries their messages, gives up on a group if one comes 30 s late to its first meeting: on a busy
    machine that is less than the time between the ends of two compilations of the same training step.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    split = PartitionSpec(mesh.axis_names)
    subsets = (itertools.combinations(mesh.axis_names, n) for n in range(1, len(mesh.axis_names) + 1))
    for axes in itertools.chain.from_iterable(subsets):
        count = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=axes), mesh=mesh, in_specs=split, out_specs=split
        )
        jax.block_until_ready(jax.jit(count)(np.ones(mesh.size, np.float32)))


def platform() -> str:
    """Of the devices that the program being traced is for, which need not be here: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # None: no mesh, or one of no devices in particular
    return jax.default_backend() if device is None else device.platform


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical names (None: not split).

    Raises:
      ValueError: for an unknown name (with near matches), or if a mesh axis would be used twice.
    """
    entries = [None if name is None else _mesh_axes(name) for name in logical_axes]
    used = [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
        raise ValueError(
            f"logical axes {logical_axes} map to {tuple(entries)}: mesh axis {sorted(twice)} is used twice; "
            "give one of the dimensions the name None."
        )
    return PartitionSpec(*entries)


def num_parts(logical_axis: str) -> int:
    """Into how many parts a dimension with this name is split on the mesh that is set; 1 if there is none."""
    return num_devices(jax.sharding.get_abstract_mesh(), _mesh_axes(logical_axis))


def num_devices(mesh: Any, entry: str | tuple[str, ...] | None) -> int:
    """Of a mesh along one entry of a PartitionSpec; 1 along axes that it has not."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins the partition of an activation inside jit; the identity where no mesh is set."""
    if len(logical_axes) != x.ndim:
        raise ValueError(f"{len(logical_axes)} logical axes {logical_axes} for an array of shape {x.shape}.")
    partition = spec(*logical_axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x  # inside shard_map the caller splits by hand
    return jax.lax.with_sharding_constraint(x, partition)


def partitioned(init: Callable[..., jax.Array], *logical_axes: str | None) -> Callable[..., Any]:
    """An initialiser whose parameter remembers the logical names of its dimensions."""
    spec(*logical_axes)  # raises here, where the module is written, not at some later restore
    return nn.with_logical_partitioning(init, logical_axes)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of parameters as `Module.init` gives them (boxes and all); the result has no boxes.

    Raises:
      ValueError: if a dimension does not divide over its mesh axes; all such parameters are listed at once.
    """
    problems: list[str] = []

    def one(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        partition, shape = list(spec(*leaf.names)), leaf.value.shape
        for i, (size, entry) in enumerate(zip(shape, partition, strict=True)):
            if leaf.names[i] in AS_FAR_AS:
                while entry and size % num_devices(mesh, entry):
                    entry = entry[:-1]
                partition[i] = entry
            parts = num_devices(mesh, entry)
            if size % parts:
                over = entry if isinstance(entry, str) else " x ".join(entry or ())
                problems.append(f"{jax.tree_util.keystr(path)} {shape}: {size} does not divide over {over}={parts}")
        return NamedSharding(mesh, PartitionSpec(*partition))

    tree = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    if problems:
        raise ValueError("these parameters do not divide over the mesh:\n  " + "\n  ".join(problems))
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch from the loader lies on the mesh: examples over data and fsdp."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def _mesh_axes(name: str) -> str | tuple[str, ...] | None:
    if name not in AXIS_RULES:
        near = difflib.get_close_matches(name, AXIS_RULES) or sorted(AXIS_RULES)
        raise ValueError(f"logical axis {name!r} is not in AXIS_RULES; did you mean {', '.join(near)}?")
    return AXIS_RULES[name]
