# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from stvdm import sharding
from stvdm.models import attention_kernels as kernels
from stvdm.models.context_parallel import Text, attend, split_context
from stvdm.models.patterns import PATTERNS, Pattern
from stvdm.planning import chips

GRID, WINDOW = (3, 2, 5), (1, 0, 2)  # 30 tokens divide over 2 devices, not over 4 or 8
N, S, d = 30, 5, 6

MESHES = {  # axes, heads                                            what happens
    "all-to-all": (dict(data=2, context=4), 4),
    "ring": (dict(data=1, context=8), 3),
    "both": (dict(data=1, context=8), 2),
    "both, beside heads": (dict(data=1, context=4, tensor=2), 4),
    "nothing but clips": (dict(data=2, fsdp=4), 3),
}


def draw(num_heads, *, joint):
    rng = np.random.default_rng(0)
    B = 8
    video = [jnp.asarray(rng.normal(size=(B, N, num_heads, d)), jnp.float32) for _ in range(3)]
    text = [jnp.asarray(rng.normal(size=(B, S, num_heads, d)), jnp.float32) for _ in range(3)] if joint else None
    mask = jnp.asarray(rng.random((B, S)) < 0.7)
    weights = [jnp.asarray(rng.normal(size=(B, length, num_heads, d)), jnp.float32) for length in (N, S)]
    return video, text, mask, weights


def loss(video, text, *, mask, weights, pattern, backend="xla"):
    q, k, v = video
    words = None
    if text is not None:
        words = Text(text[1], text[2], mask, text[0], sees_video=pattern.kind in ("full", "window"))
    out, text_out = attend(q, (k, v), words, pattern=pattern, backend=backend)
    total = (out * weights[0]).sum()
    return total if text_out is None else total + (text_out * weights[1]).sum()


def check(mesh_name, kind, *, joint, backend="xla"):
    axes, num_heads = MESHES[mesh_name]
    video, text, mask, weights = draw(num_heads, joint=joint)
    pattern = Pattern(kind, GRID, WINDOW)
    both = functools.partial(loss, mask=mask, weights=weights, pattern=pattern)
    expected = jax.jit(jax.value_and_grad(both, argnums=(0, 1) if joint else 0))(video, text)
    ours = functools.partial(both, backend=backend)
    with jax.set_mesh(sharding.make_mesh(**axes)):
        found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1) if joint else 0))(video, text)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-4)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("mesh_name", ["all-to-all", "ring", "both"])
def test_tokens_in_pieces_give_the_same_losses_and_gradients(mesh_name, kind):
    check(mesh_name, kind, joint=False)


@pytest.mark.parametrize("kind", ["full", "block_causal"])
@pytest.mark.parametrize("mesh_name", ["ring", "both, beside heads", "nothing but clips"])
def test_text_in_the_same_softmax(mesh_name, kind):
    check(mesh_name, kind, joint=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_mesh_with_every_pattern_and_text(mesh_name, kind):
    check(mesh_name, kind, joint=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name, kind", [("all-to-all", "window"), ("both", "full"), ("ring", "block_causal")])
def test_the_tpu_kernel_in_pieces(monkeypatch, mesh_name, kind):
    monkeypatch.setattr(kernels, "SHORT", 0)
    check(mesh_name, kind, joint=True, backend="splash_interpreted")


def test_the_context_is_split_by_what_the_heads_allow():
    assert split_context(8, 12) == (4, 2)
    assert split_context(16, 40) == (8, 2)
    assert split_context(4, 40) == (4, 1)
    assert split_context(8, 3) == (1, 8)
    assert split_context(1, 5) == (1, 1)


def test_a_clip_alone_on_a_mesh_of_many_is_not_refused():
    (q, k, v), *_ = draw(3, joint=False)
    pattern = Pattern("full", GRID)
    expected, _ = attend(q[:1], (k[:1], v[:1]), None, pattern=pattern, backend="xla")
    with jax.set_mesh(sharding.make_mesh(data=8)):
        found, _ = jax.jit(lambda *x: attend(x[0], x[1:], None, pattern=pattern, backend="xla"))(q[:1], k[:1], v[:1])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("num_clips, local", [(8, 1), (4, 2), (2, 1), (3, 3)])
def test_clips_are_split_over_the_axes_that_divide_them(num_clips, local):
    (q, k, v), *_ = draw(3, joint=False)
    pattern = Pattern("full", GRID)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=4)):
        graph = jax.make_jaxpr(lambda *x: attend(x[0], x[1:], None, pattern=pattern, backend="xla")[0])(
            q[:num_clips], k[:num_clips], v[:num_clips]
        )
    (inside,) = [equation.params["jaxpr"] for equation in graph.eqns if equation.primitive.name == "shard_map"]
    assert inside.invars[0].aval.shape == (local, N, 3, d)


def test_heads_that_do_not_divide_over_their_axis_are_refused():
    (q, k, v), *_ = draw(3, joint=False)
    with (
        jax.set_mesh(sharding.make_mesh(tensor=2)),
        pytest.raises(ValueError, match="num_heads=3: .* the 2 devices of mesh axis 'tensor'; use a multiple of 2"),
    ):
        attend(q, (k, v), None, pattern=Pattern("full", GRID), backend="xla")


def test_who_keeps_attention_does_not_run_it_again():
    """Under the remat policy "attention" the backward pass has the kernel's own products alone."""
    (q, k, v), *_ = draw(2, joint=False)
    pattern = Pattern("full", GRID)
    keep = jax.checkpoint_policies.save_only_these_names("attention")

    def products(policy):
        def block(q, k, v):
            return attend(jnp.sin(q), (k, v), None, pattern=pattern, backend="xla")[0].sum()

        graph = jax.make_jaxpr(jax.grad(jax.checkpoint(block, policy=policy)))(q, k, v)
        return str(graph).count("dot_general")

    assert products(keep) == products(jax.checkpoint_policies.everything_saveable)
    assert products(jax.checkpoint_policies.nothing_saveable) > products(keep)


def test_attention_to_a_text_alone_is_not_kept():
    (q, k, v), *_ = draw(2, joint=False)
    cross = jax.make_jaxpr(jax.grad(lambda q: attend(q, None, Text(k, v), backend="xla")[0].sum()))(q)
    own = jax.make_jaxpr(
        jax.grad(lambda q: attend(q, (k, v), None, pattern=Pattern("full", GRID), backend="xla")[0].sum())
    )(q)
    assert "name=attention" in str(own)
    assert "name=attention" not in str(cross)


def test_a_text_is_not_copied_for_every_place():
    """The tokens of a place are a clip of their own to "time"; the text is looked at by the whole clip."""
    (q, k, v), text, *_ = draw(2, joint=True)
    words, pattern = Text(text[1], text[2]), Pattern("time", GRID)
    graph = jax.make_jaxpr(lambda *x: attend(x[0], x[1:], words, pattern=pattern, backend="xla")[0])(q, k, v)
    of_places = re.findall(r"f32\[80,([\d,]+)\]", str(graph))  # 8 clips of 2 x 5 places
    assert of_places
    assert not any(str(S) in shape.split(",") for shape in of_places)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize(
    "axes, kind",
    [
        (dict(data=8), "window"),
        (dict(data=8), "block_causal"),
        (dict(data=8), "frame"),
        (dict(data=4, context=2), "block_causal"),  # of 3 heads: a ring
        (dict(data=4, context=2), "window"),
        (dict(data=4, context=2), "time"),
    ],
)
def test_the_tpu_compiler_takes_the_kernels(axes, kind):
    mesh = sharding.make_mesh(**axes, devices=chips.topology("v5p:2x2x2").devices)
    pattern = Pattern(kind, (5, 18, 20), (1, 4, 4))  # 1,800 tokens: the last block is filled up
    split = NamedSharding(mesh, sharding.spec("batch", "tokens", None, None))
    x = jax.ShapeDtypeStruct((8, pattern.num_tokens, 3, 128), jnp.bfloat16, sharding=split)

    def loss(q, k, v):
        return attend(q, (k, v), None, pattern=pattern, backend="splash")[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 3
