# SPDX-License-Identifier: Apache-2.0
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import shapes
from stvdm.models import attention as module
from stvdm.models.patterns import PATTERNS

attention = jax.jit(module.attention, static_argnames=("grid", "pattern", "window"))
joint_attention = jax.jit(module.joint_attention, static_argnames=("grid", "pattern", "window"))
cross_attention = jax.jit(module.cross_attention)

GRID = (3, 2, 4)
N, A, d = 24, 2, 6
WINDOW = (1, 0, 2)
PLACES = list(itertools.product(*(range(n) for n in GRID)))


def sees(pattern, query, key):
    """Whether a pattern lets the token at one place see the one at another: the definition, written out."""
    dt, dh, dw = (abs(a - b) for a, b in zip(query, key, strict=True))
    return {
        "full": True,
        "frame": dt == 0,
        "time": dh == 0 and dw == 0,
        "window": dt <= WINDOW[0] and dh <= WINDOW[1] and dw <= WINDOW[2],
        "block_causal": key[0] <= query[0],
    }[pattern]


def visible(pattern):
    return np.array([[sees(pattern, q, k) for k in PLACES] for q in PLACES])


def reference(q, k, v, mask):
    """Masked attention in float64 loops; q (B, n, A, d), mask (B, n, m)."""
    out = np.zeros(q.shape)
    for b, n, a in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        seen = np.flatnonzero(mask[b, n])
        if len(seen):
            logits = k[b, seen, a].astype(np.float64) @ q[b, n, a] / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[b, n, a] = weights / weights.sum() @ v[b, seen, a]
    return out


def draw(seed, num_tokens, batch=2):
    q, k, v = (np.asarray(x) for x in 2 * jax.random.normal(jax.random.key(seed), (3, batch, num_tokens, A, d)))
    return q, k, v


@pytest.mark.parametrize("pattern", PATTERNS)
def test_video_alone_equals_the_definition(pattern):
    q, k, v = draw(0, N)
    mask = np.broadcast_to(visible(pattern), (2, N, N))
    out = attention(q, k, v, grid=GRID, pattern=pattern, window=WINDOW)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=5e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_joint_text_equals_one_softmax_over_both(pattern):
    q, k, v = draw(0, N)
    text_q, text_k, text_v = draw(1, 5)
    real = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    all_k, all_v = np.concatenate([k, text_k], 1), np.concatenate([v, text_v], 1)

    out, text_out = joint_attention(
        (q, k, v), (text_q, text_k, text_v), grid=GRID, pattern=pattern, window=WINDOW, text_mask_BS=real
    )
    mask = np.concatenate(
        [np.broadcast_to(visible(pattern), (2, N, N)), np.broadcast_to(real[:, None], (2, N, 5))], axis=2
    )
    np.testing.assert_allclose(out, reference(q, all_k, all_v, mask), atol=5e-6)

    sees_video = np.full((2, 5, N), pattern in ("full", "window"))
    mask = np.concatenate([sees_video, np.broadcast_to(real[:, None], (2, 5, 5))], axis=2)
    np.testing.assert_allclose(text_out, reference(text_q, all_k, all_v, mask), atol=5e-6)


def test_cross_attention_equals_the_reference_and_hides_padding():
    q, _, _ = draw(0, 7)
    _, k, v = draw(1, 5)
    real = np.array([[1, 0, 0, 1, 0], [1, 1, 1, 1, 0]], bool)
    out = cross_attention(q, k, v, real)
    np.testing.assert_allclose(out, reference(q, k, v, np.broadcast_to(real[:, None], (2, 7, 5))), atol=5e-6)
    hidden = ~real[..., None, None]
    np.testing.assert_array_equal(out, cross_attention(q, k + 9 * hidden, v - 9 * hidden, real))


def test_a_query_without_keys_gives_zeros_and_finite_gradients():
    q, k, v = draw(0, 4)
    nothing = np.array([[False] * 4, [True] * 4])
    out, gradients = jax.value_and_grad(lambda x: (cross_attention(*x, nothing) ** 2).sum())((q, k, v))
    assert np.isfinite(out)
    np.testing.assert_array_equal(cross_attention(q, k, v, nothing)[0], 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_flows_exactly_where_the_pattern_lets_it(pattern):
    q, k, v = draw(0, N, batch=1)

    def out_N(v):
        return attention(q, k, v, grid=GRID, pattern=pattern, window=WINDOW)[0, :, 0, 0]

    reached = np.abs(jax.jacobian(out_N)(jnp.asarray(v))[:, 0, :, 0, 0]) > 0
    np.testing.assert_array_equal(reached, visible(pattern))


@pytest.mark.parametrize("pattern", ["full", "frame", "time"])
def test_cost_is_what_the_pattern_promises(pattern):
    x = jax.ShapeDtypeStruct((1, N, A, d), jnp.float32)

    flops = attention.lower(x, x, x, grid=GRID, pattern=pattern).compile().cost_analysis()["flops"]
    per_pair = flops / shapes.attention_pairs(GRID, pattern)
    assert 4 * A * d <= per_pair <= 4 * A * d + 20 * A, "two products for each pair, and a few operations of softmax"


@pytest.mark.parametrize("pattern", ["full", "time", "window"])
def test_tokens_in_another_order_of_heads_and_clips_give_the_same(pattern):
    q, k, v = draw(0, N)
    out = attention(q, k, v, grid=GRID, pattern=pattern, window=WINDOW)
    swapped = attention(*(x[::-1, :, ::-1] for x in (q, k, v)), grid=GRID, pattern=pattern, window=WINDOW)
    np.testing.assert_allclose(out, swapped[::-1, :, ::-1], atol=1e-6)


def test_full_attention_does_not_depend_on_the_order_of_keys():
    q, k, v = draw(0, N)
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(
        attention(q, k, v, grid=GRID), attention(q, k[:, order], v[:, order], grid=GRID), atol=1e-5
    )


def test_bfloat16_inputs_keep_a_float32_softmax():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(0, N))
    out = attention(q, k, v, grid=GRID)
    exact = reference(*(np.asarray(x, np.float64) for x in (q, k, v)), np.ones((2, N, N), bool))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_large_logits_do_not_overflow():
    q, k, v = draw(0, N)
    out = attention(100 * q, 100 * k, v, grid=GRID)
    assert np.isfinite(out).all()


def test_errors_teach():
    q, k, v = draw(0, N)
    with pytest.raises(ValueError, match="did you mean 'block_causal'"):
        attention(q, k, v, grid=GRID, pattern="block-causal")
    with pytest.raises(ValueError, match='attention=."frame", "time".'):
        attention(q, k, v, grid=GRID, pattern="factorised")
    with pytest.raises(ValueError, match="holds 12 tokens, but there are 24 queries"):
        attention(q, k, v, grid=(3, 2, 2))
    with pytest.raises(ValueError, match="window=None.*time, height, width"):
        attention(q, k, v, grid=GRID, pattern="window")


@pytest.mark.parametrize(
    "dtype, width, capability, expected",
    [
        ("bfloat16", 64, "9.0", "cudnn"),
        ("float16", 128, "10.0", "cudnn"),
        ("float32", 64, "9.0", "xla"),
        ("bfloat16", 36, "9.0", "xla"),
        ("bfloat16", 256, "9.0", "xla"),
        ("bfloat16", 64, "7.5", "xla"),
        ("bfloat16", 64, "gfx942", "xla"),
    ],
)
def test_cudnn_is_asked_for_what_it_can(monkeypatch, dtype, width, capability, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert module._backend(jax.ShapeDtypeStruct((1, 4, 1, width), dtype)) == expected


def test_a_mesh_of_no_devices_in_particular_is_for_those_that_are_here():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert module._backend(jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.bfloat16)) == "xla"
