# SPDX-License-Identifier: Apache-2.0
"""Adapters beside weights are what they would be merged; fresh ones change nothing; their gradient is the kernel's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import sharding
from stvdm.models import lora
from stvdm.models.dit import DiT

TINY = dict(latent_channels=3, width=16, num_layers=2, num_heads=2, mlp_width=24, text_width=6, time_features=8)


def random_like(tree, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) * 0.3, tree)


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "written out"])
def case(request):
    """(model, its shapes in boxes, random weights, what it makes of random inputs)."""
    dit = DiT(**TINY, scan_layers=request.param)
    latent, time, text = jnp.zeros((2, 2, 4, 6, 3)), jnp.full((2, 1), 0.4), jnp.zeros((2, 5, 6))
    boxed = jax.eval_shape(lambda: {"dit": dit.init(jax.random.key(0), latent, time, None, text)["params"]})
    latent, text = random_like((latent, text), seed=1)
    run = jax.jit(lambda params: dit.apply({"params": params["dit"]}, latent, time, None, text))
    return boxed, random_like(nn.unbox(boxed)), run


def test_fresh_adapters_change_nothing_and_lie_where_their_kernels_do(case):
    boxed, params, run = case
    adapters = lora.fresh(jax.random.key(1), boxed, rank=3, targets="attention|mlp")
    np.testing.assert_array_equal(run(lora.beside(params, [(nn.unbox(adapters), 1.0)])), run(params))
    layers = adapters["dit"].get("layers", adapters["dit"].get("layers_0"))
    query, kernel = layers["block_0"]["self_attention"]["query"], nn.unbox(boxed)["dit"]
    assert query["down"].names[-2:] == ("adapter", None) and query["up"].names[-2:] == (None, "adapter")
    assert query["down"].value.shape[-2:] == (16, 3) and query["up"].value.shape[-2:] == (3, 16)
    assert 0.2 < float(jnp.std(query["down"].value)) < 0.3  # a fourth: one over the root of what it sums
    num = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(adapters)))
    assert num == 2 * 3 * (8 * (16 + 16) + 2 * (16 + 24))
    assert "patch" not in adapters["dit"] and "patch" in kernel


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(fsdp=2, context=2, tensor=2)], ids=str)
def test_no_device_holds_the_whole_of_one(case, axes):
    boxed, _, _ = case
    adapters = lora.fresh(jax.random.key(1), boxed, rank=3, targets="attention|mlp")
    split = sharding.shardings(adapters, sharding.make_mesh(data=1, **axes))
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(nn.unbox(adapters)), jax.tree.leaves(split), strict=True
    ):
        assert np.prod(where.shard_shape(leaf.shape)) * 8 == leaf.size, jax.tree_util.keystr(path)


def test_several_beside_weights_are_as_merged_into_them(case):
    boxed, params, run = case
    one = random_like(nn.unbox(lora.fresh(jax.random.key(1), boxed, rank=3, targets="attention")), seed=2)
    two = random_like(nn.unbox(lora.fresh(jax.random.key(1), boxed, rank=2, targets="query|mlp_in|text_in")), seed=3)
    weighted = [(one, 0.8), (two, -0.5)]
    apart = run(lora.beside(params, weighted))
    merged = lora.merged(params, weighted)
    np.testing.assert_allclose(apart, run(merged), atol=2e-5 * float(jnp.abs(apart).max()))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert float(jnp.abs(apart - run(params)).max()) > 0.1
    doubled = run(lora.beside(params, [(lora.scaled(one, 2.0), 0.4), (two, -0.5)]))
    np.testing.assert_allclose(doubled, apart, atol=2e-5 * float(jnp.abs(apart).max()))


def test_their_gradient_is_the_kernels_seen_through_the_other_half(case):
    """y = x (W + A B): dA = dW Bᵀ, dB = Aᵀ dW."""
    boxed, params, run = case
    adapters = random_like(nn.unbox(lora.fresh(jax.random.key(1), boxed, rank=3, targets="mlp_in")), seed=2)
    ours = jax.grad(lambda a: jnp.square(run(lora.beside(params, [(a, 1.0)]))).sum())(adapters)
    whole = jax.grad(lambda p: jnp.square(run(p)).sum())(lora.merged(params, [(adapters, 1.0)]))
    name = "layers" if "layers" in params["dit"] else "layers_0"
    here, weights, dW = (tree["dit"][name]["block_0"]["mlp_in"] for tree in (ours, adapters, whole))
    turn = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
    for found, expected in (
        (here["down"], dW["kernel"] @ turn(weights["up"])),
        (here["up"], turn(weights["down"]) @ dW["kernel"]),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_adapters_of_another_model_are_refused(case):
    boxed, params, _ = case
    adapters = nn.unbox(lora.fresh(jax.random.key(1), boxed, rank=3, targets="mlp_in"))
    with pytest.raises(ValueError, match=r"targets='conv': found in no linear layer's path; they are like dit/"):
        lora.fresh(jax.random.key(1), boxed, rank=3, targets="conv")
    with pytest.raises(ValueError, match="rank=0: expected at least 1"):
        lora.fresh(jax.random.key(1), boxed, rank=0, targets="mlp")
    wider = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf], -1), adapters)
    with pytest.raises(
        ValueError, match=r"of another model:\n  dit/layers.*/mlp_in: an adapter of .*, where there is of"
    ):
        lora.beside(params, [(wider, 1.0)])
    with pytest.raises(ValueError, match="there is no linear layer"):
        lora.merged(params, [({"dit": {"other": next(iter(_leaves(adapters)))}}, 1.0)])


def _leaves(tree):
    """The {"down", "up"} in a tree."""
    for value in tree.values():
        if "down" in value:
            yield value
        else:
            yield from _leaves(value)
