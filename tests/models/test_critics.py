# SPDX-License-Identifier: Apache-2.0
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from stvdm import sharding
from stvdm.models import critics


def clip(seed, shape=(2, 4, 16, 16, 3)):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1)


def test_reconstruction_by_hand():
    video, decoded = jnp.zeros((1, 1, 1, 2, 1)), jnp.array([0.5, -1.0]).reshape(1, 1, 1, 2, 1)
    np.testing.assert_allclose(critics.reconstruction(decoded, video), 0.75)
    np.testing.assert_allclose(critics.reconstruction(decoded, video, absolute=0.0, squared=2.0), 1.25)


@pytest.mark.parametrize("mesh", [dict(context=4), dict(context=2, tensor=2), dict(fsdp=2, tensor=4)], ids=str)
def test_verdicts_on_frames_that_lie_in_pieces_are_those_on_whole_ones(mesh):
    """16 rows and columns become 2: too few to go on lying in pieces."""
    judge, video = critics.Discriminator(), clip(3, (8, 3, 16, 16, 3))
    random = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(judge.init, jax.random.key(0), video))
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    expected = jax.jit(judge.apply)(params, video)
    mesh = sharding.make_mesh(**mesh)
    with jax.set_mesh(mesh):
        pieces = jax.device_put(video, NamedSharding(mesh, sharding.spec("batch", None, "rows", "columns", None)))
        found = jax.jit(judge.apply)(jax.device_put(params, sharding.replicated(mesh)), pieces)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_perceptual_distance():
    net, video = critics.FeatureNet(widths=(8, 16)), clip(0)
    params = nn.unbox(jax.jit(net.init)(jax.random.key(1), video))["params"]

    @jax.jit
    def distance(decoded, params=params):
        return critics.perceptual_distance(net, params, decoded, video)

    assert distance(video) < 1e-10
    blurred = (video + jnp.roll(video, 1, axis=2) + jnp.roll(video, 1, axis=3)) / 3
    assert 1e-6 < distance(0.9 * video + 0.1 * blurred) < distance(blurred) < 4
    # Frames are looked at one by one, and the network itself gets no gradient.
    assert distance(video[:, ::-1]) > 0
    np.testing.assert_allclose(
        critics.perceptual_distance(net, params, blurred[:, ::-1], video[:, ::-1]), distance(blurred), rtol=1e-4
    )
    assert jnp.abs(jax.grad(distance)(blurred)).max() > 0
    to_params = jax.grad(lambda p: critics.perceptual_distance(net, p, blurred, video))(params)
    assert all(jnp.abs(g).max() == 0 for g in jax.tree.leaves(to_params))


def test_discriminator_learns_to_tell_smooth_from_noise():
    model = critics.Discriminator(width=4)
    real, fake = jnp.broadcast_to(clip(0, (4, 1, 1, 1, 3)), (4, 5, 16, 16, 3)), clip(1, (4, 5, 16, 16, 3))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), real))["params"]
    assert model.apply({"params": params}, real).shape == (4, 5, 2, 2, 1)

    @jax.jit
    def step(params):
        def loss(p):
            return critics.discriminator_loss(model.apply({"params": p}, real), model.apply({"params": p}, fake))

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    losses = []
    for _ in range(40):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    verdicts = [model.apply({"params": params}, x).mean() for x in (real, fake)]
    assert verdicts[0] > verdicts[1]
    # The verdict on a clip does not depend on the others of its batch.
    alone = model.apply({"params": params}, real[:1])
    np.testing.assert_allclose(alone, model.apply({"params": params}, real)[:1], atol=1e-5)


def test_hinge_is_flat_where_the_verdict_is_safe():
    assert critics.discriminator_loss(jnp.array([1.0, 3.0]), jnp.array([-1.0, -2.0])) == 0
    assert critics.discriminator_loss(jnp.array([0.0]), jnp.array([0.0])) == 1
    assert jax.grad(lambda f: critics.discriminator_loss(jnp.array(2.0), f))(-1.5) == 0
    assert jax.grad(critics.generator_loss)(0.3) == -1


def test_adaptive_weight_makes_both_pulls_equally_strong():
    a, b = {"kernel": jnp.array([3.0, 4.0])}, {"kernel": jnp.array([0.0, 0.1])}
    balance = critics.adaptive_weight(a, b)
    np.testing.assert_allclose(balance * jnp.linalg.norm(b["kernel"]), 5.0, rtol=2e-3)
    assert critics.adaptive_weight(a, jax.tree.map(jnp.zeros_like, b)) == 1e4
    assert jax.grad(lambda s: critics.adaptive_weight(jax.tree.map(lambda x: s * x, a), b))(1.0) == 0


@pytest.mark.parametrize("step, expected", [(0, 0.0), (9, 0.0), (10, 0.5), (99, 0.5)])
def test_ramp(step, expected):
    assert critics.ramp(step, weight=0.5, start=10) == expected


def test_each_side_of_the_adversarial_terms_reaches_only_its_own_parameters():
    model, video, decoded = critics.Discriminator(width=4), clip(0), clip(1)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), video))["params"]

    def terms(params, decoded):
        return critics.adversarial_terms(
            model, params, decoded, video, reconstruction=lambda x: critics.reconstruction(x, video, squared=1.0)
        )

    def gradients(side):
        return jax.jit(jax.grad(lambda p, d: terms(p, d)[side], argnums=(0, 1)))(params, decoded)

    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    to_params, to_decoded = gradients(0)
    assert largest(to_params) == 0 < largest(to_decoded)
    to_params, to_decoder = gradients(1)
    assert largest(to_decoder) == 0 < largest(to_params)
    # Balanced: at the output the adversary pulls as hard as the reconstruction.
    wanted = jnp.linalg.norm(jax.grad(lambda x: critics.reconstruction(x, video, squared=1.0))(decoded))
    np.testing.assert_allclose(jnp.linalg.norm(to_decoded), wanted, rtol=0.05)
