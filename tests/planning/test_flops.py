# SPDX-License-Identifier: Apache-2.0
"""Counted FLOPs equal those worked out by hand, through loops, gradients and recomputation, whatever the devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from stvdm import shapes, sharding
from stvdm.models.attention import attention
from stvdm.models.causal_conv import CausalConv
from stvdm.models.dit import DiT
from stvdm.planning.flops import count_flops

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)


def total(function, *arguments):
    return sum(count_flops(function, *arguments).values())


def test_a_product_is_two_operations_for_each_of_its_multiplications():
    assert total(jnp.matmul, A, B) == 2 * 3 * 5 * 7
    x, y = jax.ShapeDtypeStruct((2, 4, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3, 6), jnp.float32)
    assert total(jnp.matmul, x, y) == 2 * 2 * 4 * 3 * 6


def test_a_convolution_counts_its_taps():
    def convolve(x, kernel, stride=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    once = 2 * 2 * 8 * 8 * 3 * 3 * 3 * 5
    assert total(convolve, x, kernel) == once
    assert total(functools.partial(convolve, stride=2), x, kernel) == once / 4
    both = total(jax.grad(lambda x, kernel: convolve(x, kernel).sum(), (0, 1)), x, kernel)
    assert both == 3 * once  # the value, its gradient by the input and that by the kernel


def test_a_causal_convolution_counts_the_frames_it_gives():
    """On a CPU it is one over space for each frame it sees, padding too: more products, in less time."""
    convolution = CausalConv(5, (3, 3, 3))
    video = jax.ShapeDtypeStruct((2, 4, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(convolution.init, jax.random.key(0), video)
    assert total(convolution.apply, params, video) == 2 * 2 * 4 * 8 * 8 * 27 * 3 * 5


def test_loops_multiply_and_the_dearest_branch_counts():
    square = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    one = 2 * 5**3
    assert total(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=6)[0], square) == 6 * one
    assert total(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), square) == 2 * one


def test_what_is_computed_again_counts_again():
    def loss(w, remat):
        layer = lambda x: jnp.tanh(x @ w)  # noqa: E731
        layer = jax.checkpoint(layer) if remat else layer
        return layer(layer(w)).sum()

    square = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    plain, again = (total(jax.grad(functools.partial(loss, remat=remat)), square) for remat in (False, True))
    assert plain == 6 * 2 * 5**3
    assert again == 8 * 2 * 5**3


def test_kernels_and_devices_do_not_change_the_count():
    """A kernel's products can't be seen from outside, and a clip alone is attended to on every device of "data"."""
    x = jax.ShapeDtypeStruct((1, 512, 4, 8), jnp.float32)

    def loss(x):
        return attention(x, x, x, grid=(2, 16, 16), pattern="block_causal").sum()

    expected = total(jax.grad(loss), x)
    one_tpu = AbstractMesh(
        (1,) * 4,
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * 4,
        abstract_device=AbstractDevice("TPU v5", 1, "tpu"),
    )
    with use_abstract_mesh(one_tpu):
        assert "pallas_call" in str(jax.make_jaxpr(jax.grad(loss))(x))
        assert total(jax.grad(loss), x) == expected
    with jax.set_mesh(sharding.make_mesh(data=2, context=4)):
        assert total(jax.grad(loss), x) == expected


def test_a_transformer_is_counted_by_part():
    B, N, S, D, F, L, t, h, w, z, E = 2, 24, 5, 12, 20, 3, 2, 6, 8, 4, 7
    dit = DiT(latent_channels=z, width=D, num_layers=L, num_heads=2, mlp_width=F, text_width=E)
    arguments = jnp.zeros((B, t, h, w, z)), jnp.zeros((B, 1)), None, jnp.zeros((B, S, E))
    params = nn.unbox(jax.eval_shape(functools.partial(dit.init, jax.random.key(0)), *arguments))
    counts = count_flops(lambda params: dit.apply(params, *arguments), params)
    assert counts["MLP"] == 2 * L * B * N * 2 * D * F
    assert counts["self-attention"] == 2 * L * B * 2 * N * N * D
    assert counts["cross-attention"] == 2 * L * B * 2 * N * S * D
    assert counts["projections of attention"] == 2 * L * B * (4 * N + 2 * N + 2 * S) * D * D


def test_a_second_stream_and_time_as_a_token_are_counted_by_part():
    """Every product once: of the video's weights at N tokens, of the text's at S, and of the time's where it is one."""
    B, N, S, D, F, L, E = 2, 24, 5, 12, 20, 3, 7
    arguments = jnp.zeros((B, 2, 6, 8, 4)), jnp.zeros((B, 1)), None, jnp.zeros((B, S, E))

    def counts(**paths):
        dit = DiT(latent_channels=4, width=D, num_layers=L, num_heads=2, mlp_width=F, text_width=E, **paths)
        params = nn.unbox(jax.eval_shape(functools.partial(dit.init, jax.random.key(0)), *arguments))
        return count_flops(lambda params: dit.apply(params, *arguments), params)

    found = counts(text_path="dual")
    assert found == {**counts(text_path="joint"), "patches, text and time": found["patches, text and time"]}
    assert found["MLP"] == 2 * L * B * (N + S) * 2 * D * F
    assert found["projections of attention"] == 2 * L * B * (N + S) * 4 * D * D
    assert found["self-attention"] == 2 * L * B * 2 * (N + S) ** 2 * D

    found = counts(time_path="in_context")
    assert found["MLP"] == 2 * L * B * (N + 1) * 2 * D * F
    assert found["self-attention"] == 2 * L * B * 2 * (N + 1) ** 2 * D
    assert found["cross-attention"] == 2 * L * B * 2 * (N + 1) * S * D

    found = counts(time_path="cross_attention")
    assert found["MLP"] == 2 * L * B * N * 2 * D * F
    assert found["cross-attention"] == 2 * L * B * 2 * N * (S + 1) * D
    assert found["projections of attention"] == 2 * L * B * (4 * N + 2 * N + 2 * (S + 1)) * D * D


def test_attention_counts_the_pairs_that_its_pattern_sees():
    grid, window = (4, 3, 5), (1, 1, 2)
    x = jax.ShapeDtypeStruct((2, 60, 3, 8), jnp.float32)
    for pattern in ("full", "frame", "window", "block_causal"):
        function = functools.partial(attention, grid=grid, pattern=pattern, window=window)
        pairs = shapes.attention_pairs(grid, pattern, window=window)
        np.testing.assert_allclose(total(function, x, x, x), 4 * 2 * 3 * 8 * pairs, rtol=1e-5)
