# SPDX-License-Identifier: Apache-2.0
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stvdm import sharding
from stvdm.models.dit import DiT
from stvdm.models.quantized import quantized

NUM_PRODUCTS = 10  # of a block: four of each attention, two of the MLP
INPUTS = (jnp.ones((2, 2, 4, 4, 3)), jnp.full((2, 1), 0.3), None, jnp.ones((2, 5, 6)))


@pytest.fixture(scope="module")
def dit():
    return DiT(
        latent_channels=3,
        text_width=6,
        patch=(1, 2, 2),
        width=32,
        num_layers=2,
        num_heads=2,
        mlp_width=48,
        remat="everything",
    )


@pytest.fixture(scope="module")
def given(dit):
    """(parameters, inputs), all random."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *INPUTS)
    params = jax.tree.map(lambda leaf: 0.2 * random.normal(size=leaf.shape).astype(np.float32), shapes)
    return params, tuple(None if x is None else jnp.asarray(random.uniform(size=x.shape), x.dtype) for x in INPUTS)


@pytest.mark.parametrize(
    ("kind", "wide", "value", "slope"), [("int8", "i8", 0.01, 0.03), ("fp8", "f8_e4m3fn", 0.05, 0.1)]
)
def test_products_and_their_gradients_are_rounded_and_attention_is_not(dit, given, kind, wide, value, slope):
    params, inputs = given

    def loss(model):
        return lambda params: jnp.mean(jnp.square(model.apply(params, *inputs)))

    rounded = quantized(dit, kind)
    products = re.findall(r":\S+ = dot_general", str(jax.make_jaxpr(loss(dit))(params)))
    program = str(jax.make_jaxpr(loss(rounded))(params))
    assert len(re.findall(r":\S+ = dot_general", program)) == len(products)
    assert len(re.findall(rf"\w+:{wide}\[", program)) == 2 * NUM_PRODUCTS  # a row and a column each, in the one scan
    plain, again = (jax.jit(jax.value_and_grad(loss(model)))(params) for model in (dit, rounded))
    assert 0 < abs(again[0] - plain[0]) < value * plain[0]
    errors = jax.tree.map(jnp.subtract, again[1], plain[1])
    assert 0 < optax.tree.norm(errors) < slope * optax.tree.norm(plain[1])


@pytest.mark.parametrize("mesh", [dict(fsdp=2), dict(context=2), dict(tensor=2)], ids=str)
def test_on_a_mesh_they_are_rounded_as_on_one_device(dit, given, mesh):
    params, inputs = given

    def gradients(mesh, kind="int8"):
        with jax.set_mesh(mesh):
            split = jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh)), inputs)
            loss = lambda params: jnp.mean(jnp.square(quantized(dit, kind).apply(params, *split)))  # noqa: E731
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(jax.device_put(params, sharding.replicated(mesh))))

    expected = gradients(sharding.make_mesh(devices=jax.devices()[:1]))
    found = gradients(sharding.make_mesh(**mesh, devices=jax.devices()[:2]))
    plain = gradients(sharding.make_mesh(**mesh, devices=jax.devices()[:2]), kind="")
    # Sums in another order move what lies between two steps to the other, and all that follows: so not the same values,
    # but as near to those that are not rounded.
    far, as_far = (optax.tree.norm(jax.tree.map(np.subtract, one, plain)) for one in (found, expected))
    assert 0.5 * as_far < far < 2 * as_far


def test_the_second_stream_is_rounded_too(dit):
    dual = dit.clone(text_path="dual")
    params = jax.eval_shape(dual.init, jax.random.key(0), *INPUTS)
    program = str(jax.make_jaxpr(quantized(dual, "int8").apply)(params, *INPUTS))
    assert len(re.findall(r"\w+:i8\[", program)) == 2 * 12  # four of attention and two of the MLP, in either stream


def test_parameters_are_those_of_the_network_as_it_was(dit):
    fresh, rounded = (model.init(jax.random.key(1), *INPUTS) for model in (dit, quantized(dit, "int8")))
    jax.tree.map(np.testing.assert_array_equal, fresh, rounded)
    assert quantized(dit, "") is dit


def test_what_cannot_be_is_refused(dit, monkeypatch):
    with pytest.raises(ValueError, match="model.matmul='int4': expected '', 'int8' or 'fp8'"):
        quantized(dit, "int4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match="needs Qwix: pip install"):
        quantized(dit, "fp8")
