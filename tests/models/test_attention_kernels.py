# SPDX-License-Identifier: Apache-2.0
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
    monkeypatch.setattr(kernels, "SPLASH_BLOCKS", (128,))
    check("splash_interpreted", kind, starts=(165, 0), masked=masked, traced=True, sizes=(165, 165))
    check("splash_interpreted", kind, starts=(165, 165), masked=masked, traced=True, sizes=(165, 165))


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
    q, k, v = (rng.normal(size=(1, 512, A, d)).astype(np.float32) for _ in range(3))
    hurt = np.where(np.arange(512)[None, :, None, None] < 384, 0.0, np.nan).astype(np.float32)
    found, _ = kernels.forward(backend, q, k + hurt, v + hurt, None, pattern)
    expected, _ = kernels.forward(backend, q, k, v, None, pattern)
    np.testing.assert_array_equal(found[:, :256], expected[:, :256])
