# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.models import attention_kernels as kernels
from stvdm.models.patterns import PATTERNS, Pattern

GRID, WINDOW = (5, 6, 11), (1, 1, 2)
N, A, d = 330, 2, 20


def reference(q, k, v, valid, pattern, starts):
    """The definition, with all scores at once."""
    scores = jnp.einsum("BnAd,BmAd->BAnm", q, k) * d**-0.5
    seen = jnp.ones(scores.shape, bool)
    if pattern is not None:
        seen &= pattern.sees(starts[0] + jnp.arange(q.shape[1])[:, None], starts[1] + jnp.arange(k.shape[1])[None])
    if valid is not None:
        seen &= valid[:, None, None]
    some = seen.any(axis=-1, keepdims=True)
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.where(some, jax.nn.softmax(jnp.where(some, scores, 0.0)), 0.0)
    return jnp.einsum("BAnm,BmAd->BnAd", weights, v)


def check(backend, kind, *, starts, masked, traced, sizes):
    pattern = None if kind is None else Pattern(kind, GRID, WINDOW)
    rng = np.random.default_rng(0)
    n, m = sizes
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, x, A, d)), jnp.float32) for x in (n, m, m, n))
    valid = jnp.asarray(rng.random((2, m)) < 0.8) if masked else None
    out, pull = jax.vjp(lambda *x: reference(*x, valid, pattern, starts), q, k, v)

    @jax.jit
    def ours(q, k, v, traced_starts):
        at = traced_starts if traced else starts
        out, lse = kernels.forward(backend, q, k, v, valid, pattern, at)
        return out, *kernels.backward(backend, q, k, v, valid, pattern, at, out, lse, dout)

    for found, expected in zip(ours(q, k, v, jnp.asarray(starts)), (out, *pull(dout)), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-6)


@pytest.mark.parametrize("kind", [None, *PATTERNS])
def test_xla_blocks_equal_the_definition(monkeypatch, kind):
    monkeypatch.setattr(kernels, "XLA_BLOCK", 100)
    check("xla", kind, starts=(0, 0), masked=kind == "window", traced=False, sizes=(N, N))


@pytest.mark.parametrize("kind", ["full", "window", "block_causal"])
def test_xla_blocks_of_a_ring_equal_the_definition(monkeypatch, kind):
    monkeypatch.setattr(kernels, "XLA_BLOCK", 50)
    check("xla", kind, starts=(110, 220), masked=False, traced=True, sizes=(110, 110))  # partly, or not at all
    check("xla", kind, starts=(220, 110), masked=False, traced=True, sizes=(110, 110))


@pytest.mark.parametrize("kind", [None, "window", "block_causal"])
def test_the_tpu_kernel_equals_the_definition(monkeypatch, kind):
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (128,))
    check("splash_interpreted", kind, starts=(0, 0), masked=kind == "window", traced=False, sizes=(N, N))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_tpu_kernel_on_a_ring_equals_the_definition(monkeypatch, kind, masked):
    monkeypatch.setattr(kernels, "SHORT", 0)
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (128,))
    check("splash_interpreted", kind, starts=(165, 0), masked=masked, traced=True, sizes=(165, 165))
    check("splash_interpreted", kind, starts=(165, 165), masked=masked, traced=True, sizes=(165, 165))


@pytest.mark.parametrize(
    "kind",
    ["full", "window", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("frame", "time", "block_causal"))],
)
def test_fewer_keys_than_queries_in_blocks_of_another_size(monkeypatch, kind):
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (256, 128))
    assert (kernels._splash_block(N), kernels._splash_block(200)) == (128, 256)
    check("splash_interpreted", kind, starts=(0, 0), masked=False, traced=False, sizes=(N, 200))


def test_bfloat16_gradients_are_those_of_float32_rounded():
    rng = np.random.default_rng(3)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(1, 60, A, d)), jnp.bfloat16) for _ in range(4))
    pattern = Pattern("block_causal", (4, 3, 5))
    out, lse = kernels.forward("xla", q, k, v, None, pattern)
    found = kernels.backward("xla", q, k, v, None, pattern, (0, 0), out.astype(q.dtype), lse, dout)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    _, pull = jax.vjp(lambda *x: reference(*x, None, pattern, (0, 0)), *exact)
    for one, other in zip(found, pull(dout.astype(jnp.float32)), strict=True):
        assert one.dtype == jnp.float32, "sums over a ring are rounded once"
        np.testing.assert_allclose(one, other, atol=0.01 * np.abs(other).max())


def test_sets_merge_to_one_softmax():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, A, d)), jnp.float32) for _ in range(3))
    whole = kernels.forward("xla", q, k, v)
    parts = [kernels.forward("xla", q, k[:, a:b], v[:, a:b]) for a, b in ((0, 2), (2, 9))]
    for found, expected in zip(kernels.merge(*parts), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "splash_interpreted"])
def test_a_block_that_a_pattern_leaves_out_is_never_read(monkeypatch, backend):
    """Keys of NaN, where nobody looks: had they been multiplied, something would be NaN."""
    monkeypatch.setattr(kernels, "XLA_BLOCK", 66)
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (128,))
    pattern = Pattern("block_causal", (2, 16, 16))
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.normal(size=(1, 512, A, d)).astype(np.float32) for _ in range(4))
    late, early = (
        np.where(here, np.nan, 0.0).astype(np.float32)[None, :, None, None]
        for here in (np.arange(512) >= 384, np.arange(512) < 128)
    )
    found, _ = kernels.forward(backend, q, k + late, v + late, None, pattern)
    out, lse = kernels.forward(backend, q, k, v, None, pattern)
    np.testing.assert_array_equal(found[:, :256], out[:, :256])

    backward = functools.partial(kernels.backward, backend)
    dq, dk, dv = backward(q, k, v, None, pattern, (0, 0), out, lse, dout)
    hurt, _, _ = backward(q, k + late, v + late, None, pattern, (0, 0), out, lse, dout)
    np.testing.assert_array_equal(hurt[:, :256], dq[:, :256])
    _, *hurt = backward(q + early, k, v, None, pattern, (0, 0), out, lse, dout + early)
    np.testing.assert_array_equal(hurt[0][:, 256:], dk[:, 256:])
    np.testing.assert_array_equal(hurt[1][:, 256:], dv[:, 256:])


@pytest.mark.parametrize("traced", [False, True])
def test_a_step_that_is_left_out_names_the_block_that_is_there(monkeypatch, traced):
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (128,))
    shape, starts = (1, A, 512, 128), (jnp.int32(0), jnp.int32(0)) if traced else (0, 0)
    call = kernels._SplashCall("splash_interpreted", shape, shape, None, Pattern("block_causal", (4, 8, 16)), starts)
    by_query, by_key = call.mask(), call.mask(by_key=True)
    np.testing.assert_array_equal(by_query.data_next[0], [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]])
    np.testing.assert_array_equal(by_query.block_mask[0], np.tril(np.ones((4, 4))))
    assert by_query.data_next.dtype == by_query.block_mask.dtype == jnp.int8
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 2, 0], [3, 3, 3, 3]] if traced else None
    rows = rows or [[0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3], [3, 3, 3, 3]]
    np.testing.assert_array_equal(by_key.data_next[0], rows)


def test_numbers_are_divided_exactly_without_a_division():
    for by in (1, 2, 7, 52, 1560, 3600):
        near = (np.arange(1, kernels._EXACT // by, 97)[:, None] * by + np.array([-1, 0, 1])).ravel()
        np.testing.assert_array_equal(kernels._divide(jnp.asarray(near, jnp.int32), by), near // by)


def test_blocks_weigh_filling_up_against_being_small():
    sizes = {80: 128, 512: 512, 1_560: 384, 3_600: 384, 32_760: 512}
    assert {length: kernels._splash_block(length) for length in sizes} == sizes
