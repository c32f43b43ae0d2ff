# SPDX-License-Identifier: Apache-2.0
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import sharding
from stvdm.models.linear import linear

X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
B = np.random.default_rng(2).normal(size=8).astype(np.float32)


def value_and_gradients(x, w, b):
    layer = linear(8, "width", "mlp", name="layer")
    return jax.value_and_grad(
        lambda x, w, b: (layer.apply({"params": {"kernel": w, "bias": b}}, x) ** 2).sum(), argnums=(0, 1, 2)
    )(x, w, b)


@pytest.mark.parametrize("context", [None, 1, 2])
def test_value_and_gradients_are_those_of_a_matrix_product(context):
    """Without a mesh, and on meshes that split the tokens or don't."""
    y = X @ W + B
    expected = (y**2).sum(), (2 * y @ W.T, np.einsum("bni,bno->io", X, 2 * y), (2 * y).sum((0, 1)))
    if context is None:
        got = jax.jit(value_and_gradients)(X, W, B)
    else:
        with jax.set_mesh(sharding.make_mesh(data=2, context=context, devices=jax.devices()[: 2 * context])):
            got = jax.jit(lambda x, w, b: value_and_gradients(sharding.constrain(x, "batch", "tokens", None), w, b))(
                X, W, B
            )
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_gradient_for_a_weight_is_one_product_without_a_transposed_copy():
    """What this layer is for; the same product over (clips, tokens) as two dimensions has the copy."""

    def copies(product):
        gradient = jax.jit(jax.grad(lambda w, x, y: jnp.vdot(product(w, x), y)))
        program = gradient.lower(W, X, np.ones((2, 4, 8), np.float32)).compile().as_text()
        return re.findall(r" (?:transpose|copy)\(", program)

    layer = linear(8, None, None, name="layer")
    assert not copies(lambda w, x: layer.apply({"params": {"kernel": w, "bias": B}}, x))
    assert copies(lambda w, x: x @ w), "the compiler has learnt to do without: the layer may go"


def test_parameters_are_float32_and_name_their_axes():
    layer = linear(8, "width", "mlp", name="layer", dtype=jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), X)["params"]
    assert params["kernel"].names == ("width", "mlp") and params["bias"].names == ("mlp",)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    drawn = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), nn.unbox(params))
    assert layer.apply({"params": drawn}, X).dtype == jnp.bfloat16
