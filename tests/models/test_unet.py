# SPDX-License-Identifier: Apache-2.0
"""The U-Net: frames alone without time, time bolted on as nothing, what it refuses, equal on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from stvdm import sharding
from stvdm.models.unet import UNet

B, t, h, w, z, S, E = 2, 3, 8, 4, 5, 7, 12


def unet(**changes):
    return UNet(
        **{**dict(latent_channels=z, text_width=E, width=16, num_heads=2, patch=(1, 2, 2), num_blocks=0), **changes}
    )


def predict(network, params, *inputs):
    return jax.jit(network.apply)({"params": params}, *inputs)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    mask_BS = jnp.arange(S)[None] < jnp.array([[S], [3]])
    return (
        jax.random.normal(keys[0], (B, t, h, w, z)),
        jax.random.uniform(keys[1], (B, 1)),
        None,
        jax.random.normal(keys[2], (B, S, E)),
        mask_BS,
    )


@pytest.fixture(scope="module")
def fresh(inputs):
    return nn.unbox(jax.jit(unet().init)(jax.random.key(1), *inputs)["params"])


@pytest.fixture(scope="module")
def params(fresh):
    """Of the network with layers over time, all of them random: also what starts at zero."""
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    scaled = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape) / max(1, leaf.ndim and leaf.size // leaf.shape[-1]) ** 0.5
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, scaled)


def of_images(params):
    return {name: leaf for name, leaf in params.items() if not name.endswith("temporal")}


def test_each_level_has_its_blocks_and_passes_them_on(inputs):
    made = jax.eval_shape(unet(num_blocks=2, patch=(1, 4, 4)).init, jax.random.key(1), *inputs)["params"]
    widths = {name: leaf["conv_1"]["kernel"].value.shape[-2:] for name, leaf in made.items() if name.endswith("space")}
    down = {"down_0_0": (16, 16), "down_0_1": (16, 16), "down_1_0": (32, 32), "down_1_1": (32, 32)}
    down |= {"down_2_0": (64, 64), "down_2_1": (64, 64), "middle": (64, 64)}
    up = {"up_2_0": (128, 64), "up_2_1": (128, 64), "up_2_2": (128, 64)}  # what comes up, beside what was passed
    up |= {"up_1_0": (64, 32), "up_1_1": (64, 32), "up_1_2": (64, 32)}
    up |= {"up_0_0": (32, 16), "up_0_1": (32, 16), "up_0_2": (32, 16)}
    assert widths == {f"{name}_space": width for name, width in (down | up).items()}
    assert sum(name.endswith("temporal") for name in made) == len(widths)


def test_fresh_it_predicts_nothing(inputs, fresh):
    assert not np.any(predict(unet(), fresh, *inputs))


def test_without_layers_over_time_each_frame_is_made_alone(inputs, params):
    network, (latent, *rest) = unet(temporal=False), inputs
    whole = predict(network, of_images(params), latent, *rest)
    parts = [predict(network, of_images(params), latent[:, i : i + 1], *rest) for i in range(t)]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), atol=2e-5)
    assert whole.std() > 0.01


def test_time_is_bolted_on_as_nothing_and_then_connects_frames(inputs, fresh, params):
    bolted = predict(unet(), {**fresh, **of_images(params)}, *inputs)
    alone = predict(unet(temporal=False), of_images(params), *inputs)
    np.testing.assert_allclose(bolted, alone, atol=2e-5)

    def first_frame(latent):
        return unet().apply({"params": params}, latent, *inputs[1:])[:, 0].sum()

    reach = jnp.abs(jax.jit(jax.grad(first_frame))(inputs[0])).sum((0, 2, 3, 4))
    assert (reach > 1e-3).all()


def test_it_hears_the_text_that_is_real_and_the_time(inputs, params):
    latent, time, level, text, mask = inputs

    def total(text, time):
        return jnp.square(unet().apply({"params": params}, latent, time, level, text, mask)).sum()

    by_text, by_time = jax.jit(jax.grad(total, argnums=(0, 1)))(text, time)
    heard = jnp.abs(by_text).sum(-1) > 0
    np.testing.assert_array_equal(heard, mask)
    assert (by_time != 0).all()


@pytest.mark.slow
def test_computing_again_changes_nothing(inputs, params):
    def loss(params, network):
        return jnp.square(network.apply({"params": params}, *inputs)).mean()

    kept, again = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, unet(remat=remat)) for remat in ("nothing", "everything")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, again)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(patch=(1, 4, 2)), "halves height and width alike, so use (1, 2**n, 2**n)"),
        (dict(patch=(2, 4, 4)), "halves height and width alike"),
        (dict(patch=(1, 8, 8)), "latent of 8x4: expected multiples of 8x8, as it is halved 3 times"),
        (dict(width=20), "width=20: use a multiple of 8, for groups"),
        (dict(remat="attention"), "remat='attention': expected one of nothing, everything"),
        (dict(latent_channels=4), "expected (B, t, h, w, latent_channels=4)"),
    ],
)
def test_what_does_not_fit_is_refused(change, text, inputs):
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.eval_shape(unet(**change).init, jax.random.key(0), *inputs)


def test_several_noise_levels_are_refused(inputs):
    latent, _, _, *text = inputs
    with pytest.raises(ValueError, match="one noise level a clip"):
        jax.eval_shape(unet().init, jax.random.key(0), latent, jnp.zeros((B, 2)), None, *text)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, context=2), dict(fsdp=4, tensor=2)], ids=str)
def test_sharded_equals_single_device(axes, inputs, params):
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), inputs)

    def loss(params, batch):
        return jnp.square(unet().apply({"params": params}, *batch)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = sharding.make_mesh(**axes)
    boxed = jax.eval_shape(lambda: unet().init(jax.random.key(1), *inputs)["params"])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.shardings(boxed, mesh))
        dealt = jax.device_put(batch, sharding.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(loss))(spread, dealt)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)
