# SPDX-License-Identifier: Apache-2.0
"""Float32 weights kept in two halves, of which the upper is what bfloat16 products read.

    x = high + low,    high = x rounded to bfloat16,    low = what is left of its bits, as a signed 16-bit number

A training in bfloat16 with float32 weights reads a copy of them in every step, half as large again; a compiler that
sees it may make that copy of all layers at once (XLA's for TPU does). Kept apart the halves take the 4 bytes of the
whole, the upper one needs no copy, and the sum is exact: every update is the one that float32 weights would have had.
Rounding is to the nearest, of two that are equally near to the one farther from 0.

    params = split(params, are_chosen)          # in the state
    loss(multiplied(params), batch)             # what products read
    split(updated(whole(params)), are_chosen)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Halves(NamedTuple):
    """One float32 array in two."""

    high: Any  # bfloat16
    low: Any  # int16


@jax.jit
def halves_of(x: jax.Array) -> Halves:
    """The halves of a finite float32 array; one that is not finite does not come back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = (bits + 0x8000) >> 16  # keeps the sign; the carry, if any, rounds up
    return Halves(
        high=jax.lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16),
        low=(bits - (high << 16)).astype(jnp.int16),
    )


@jax.jit
def sum_of(halves: Halves) -> jax.Array:
    """The float32 array, bit for bit."""
    high = jax.lax.bitcast_convert_type(halves.high, jnp.int16).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((high << 16) + halves.low.astype(jnp.int32), jnp.float32)


def are_halves(leaf: Any) -> bool:
    return isinstance(leaf, Halves)


def split(params: Tree, is_chosen: Callable[[tuple[Any, ...]], bool]) -> Tree:
    """The parameters, those whose path is chosen in halves."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return halves_of(leaf) if is_chosen(path) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def whole(params: Tree) -> Tree:
    """The parameters in float32, whether they are in halves or not."""
    return jax.tree.map(lambda leaf: sum_of(leaf) if are_halves(leaf) else leaf, params, is_leaf=are_halves)


def multiplied(params: Tree) -> Tree:
    """The parameters as products read them: of halves the upper."""
    return jax.tree.map(lambda leaf: leaf.high if are_halves(leaf) else leaf, params, is_leaf=are_halves)


def like(params: Tree, model: Tree) -> Tree:
    """Whole parameters, in halves where those of ``model`` are."""
    return jax.tree.map(lambda old, new: halves_of(new) if are_halves(old) else new, model, params, is_leaf=are_halves)
