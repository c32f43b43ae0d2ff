# SPDX-License-Identifier: Apache-2.0
"""Weights in two halves are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np

from stvdm.train import split_weights

BITS = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
EDGES = [0x0, 0x80000000, 0x1, 0x80000001, 0x00007FFF, 0x00008000, 0x3F808000, 0x3F818000, 0xBF808000, 0x3F80FFFF]
FLOATS = np.concatenate([BITS, np.array(EDGES, np.uint32)]).view(np.float32)
FLOATS = FLOATS[np.abs(FLOATS) < 3.38e38]  # above it bfloat16 ends


def test_the_sum_of_the_halves_is_the_whole_bit_for_bit():
    halves = split_weights.halves_of(FLOATS)
    assert (halves.high.dtype, halves.low.dtype) == (jnp.bfloat16, jnp.int16)
    found = np.asarray(split_weights.sum_of(halves))
    np.testing.assert_array_equal(found.view(np.uint32), FLOATS.view(np.uint32))


def test_the_upper_half_is_the_nearest_bfloat16():
    high = np.asarray(split_weights.halves_of(FLOATS).high).astype(np.float32)
    nearest = np.asarray(jnp.asarray(FLOATS).astype(jnp.bfloat16)).astype(np.float32)
    halfway = (FLOATS.view(np.uint32) & 0xFFFF) == 0x8000
    assert halfway.sum() >= 4
    usual = np.abs(FLOATS) >= np.finfo(np.float32).tiny  # XLA's own rounding may flush what is smaller
    np.testing.assert_array_equal(high[usual & ~halfway], nearest[usual & ~halfway])
    assert (np.abs(high[halfway]) > np.abs(FLOATS[halfway])).all()


def test_a_tree_of_which_some_is_in_halves():
    params = {"layers": {"kernel": jnp.asarray([[1.001, -2.5]]), "bias": jnp.ones(2)}}
    kept = split_weights.split(params, lambda path: path[-1].key == "kernel")
    assert split_weights.are_halves(kept["layers"]["kernel"]) and not split_weights.are_halves(kept["layers"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, split_weights.whole(kept), params)
    read = split_weights.multiplied(kept)["layers"]
    assert (read["kernel"].dtype, read["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    again = split_weights.like(params, kept)
    assert jax.tree.structure(again) == jax.tree.structure(kept)
    jax.tree.map(np.testing.assert_array_equal, again, kept)
