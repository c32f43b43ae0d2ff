# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685): small weights that are trained beside frozen ones.

    y = x W + (x A) B,      A (in, rank), drawn;  B (rank, out), zero at first

    adapters = fresh(key, shapes, rank=16, targets="attention|mlp")       # {"dit": {... "query": {"down": A, "up": B}}}
    y = model.apply({"params": beside(params, [(adapters, 1.0)])}, ...)   # what `linear.Linear` does with them
    params = merged(params, [(adapters, 0.8), (others, 0.5)])             # W + 0.8 A B + 0.5 A' B'

Adapters lie where the kernel lies that they add to, under the names "down" and "up"; of scanned layers they are stacked
as it is. A kernel has two wide sides, of which one is split over fsdp and the other over tensor; an adapter's matrices
have one each, which takes all of these axes: what is trained is split over all devices that share the weights. What
files call alpha is in B already: there it is alpha / rank times what it is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = Any
Weighted = Sequence[tuple[Tree, float]]  # adapters, each with its weight


def fresh(key: jax.Array, shapes: Tree, *, rank: int, targets: str) -> Tree:
    """New adapters, boxed as `Module.init` boxes parameters.

    Args:
      shapes: of the parameters, with their boxes; e.g. {"dit": ...} of `jax.eval_shape`.
      rank: of each.
      targets: a regular expression; kernels of linear layers in whose path it is found, e.g. "dit/layers/.*attention",
        get one.

    Raises:
      ValueError: if it is found in none, or the rank is none.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1.")
    made: dict[tuple[str, ...], Any] = {}
    kernels = {
        path: box
        for path, box in traverse_util.flatten_dict(shapes).items()
        if path[-1] == "kernel" and box.value.ndim == 2 + _is_stacked(path)
    }
    chosen = [path for path in kernels if re.search(targets, "/".join(path[:-1]))]
    if not chosen:
        some = ", ".join("/".join(path[:-1]) for path in list(kernels)[:3])
        raise ValueError(f"targets={targets!r}: found in no linear layer's path; they are like {some}.")
    for key_here, path in zip(jax.random.split(key, len(chosen)), chosen, strict=True):
        *stack, wide_in, wide_out = kernels[path].value.shape
        *stacked, _, _ = kernels[path].names
        down = jax.random.normal(key_here, (*stack, wide_in, rank)) * wide_in**-0.5
        made[*path[:-1], "down"] = nn.LogicallyPartitioned(down, (*stacked, "adapter", None))
        up = jnp.zeros((*stack, rank, wide_out))
        made[*path[:-1], "up"] = nn.LogicallyPartitioned(up, (*stacked, None, "adapter"))
    return traverse_util.unflatten_dict(made)


def beside(params: Tree, adapters: Weighted) -> Tree:
    """The parameters with adapters in them, several as one of their ranks together.

    Raises:
      ValueError: for adapters of layers that there are not, or of other sizes.
    """
    found = dict(traverse_util.flatten_dict(params))
    for path, parts in _by_layer(found, adapters).items():
        found[*path, "down"] = jnp.concatenate([down for down, _, _ in parts], axis=-1)
        found[*path, "up"] = jnp.concatenate([up * weight for _, up, weight in parts], axis=-2)
    return traverse_util.unflatten_dict(found)


def merged(params: Tree, adapters: Weighted) -> Tree:
    """The parameters with adapters added to their kernels, computed in float32; as many as there were.

    Raises:
      ValueError: for adapters of layers that there are not, or of other sizes.
    """
    found = dict(traverse_util.flatten_dict(params))
    for path, parts in _by_layer(found, adapters).items():
        kernel = found[*path, "kernel"]
        added = sum(weight * jnp.matmul(down, up, precision="highest") for down, up, weight in parts)
        found[*path, "kernel"] = (kernel + added).astype(kernel.dtype)
    return traverse_util.unflatten_dict(found)


def scaled(adapters: Tree, scale: float) -> Tree:
    """Adapters that add ``scale`` times what these do."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * scale if path[-1].key == "up" else leaf, adapters)


def _by_layer(found: dict[tuple[str, ...], Any], adapters: Weighted) -> dict[tuple[str, ...], list[Any]]:
    """(A, B, weight) of each layer that has adapters."""
    layers: dict[tuple[str, ...], list[Any]] = {}
    wrong = []
    for tree, weight in adapters:
        flat = traverse_util.flatten_dict(tree)
        for path in dict.fromkeys(path[:-1] for path in flat):
            down, up, kernel = flat[*path, "down"], flat[*path, "up"], found.get((*path, "kernel"))
            shape = (*down.shape[:-1], up.shape[-1])
            if kernel is None or kernel.shape != shape:
                there = "no linear layer" if kernel is None else f"of {kernel.shape}"
                wrong.append(f"{'/'.join(path)}: an adapter of {shape}, where there is {there}")
            layers.setdefault(path, []).append((down, up, weight))
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError("these adapters are of another model:\n  " + "\n  ".join(wrong[:5]) + more)
    return layers


def _is_stacked(path: tuple[str, ...]) -> bool:
    return "layers" in path
