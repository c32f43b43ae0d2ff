# SPDX-License-Identifier: Apache-2.0
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.models import embeddings


def dot_after_rotation(q, k, place_q, place_k, theta=1e4):
    """<R(m) q, R(n) k> for one head."""
    place_23 = jnp.asarray([place_q, place_k], jnp.float32)
    turns = embeddings.rotary_turns(place_23, q.shape[-1], theta=theta)
    turned = embeddings.rotate(jnp.stack([q, k])[None, :, None], turns)[0, :, 0]
    return turned[0] @ turned[1]


def test_heads_are_shared_out_as_in_wan():
    assert embeddings.split_axes(128) == (44, 42, 42)
    for width in range(2, 130, 2):
        axes = embeddings.split_axes(width)
        assert sum(axes) == width and all(n % 2 == 0 for n in axes)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary_sees_only_differences_of_places(axis):
    q, k = jax.random.normal(jax.random.key(0), (2, 32))
    m, n = np.array([3.0, 1.0, 4.0]), np.array([1.0, 5.0, 2.0])
    step = np.eye(3)[axis]
    base = dot_after_rotation(q, k, m, n)
    for shift in (1, 7, 50):
        np.testing.assert_allclose(dot_after_rotation(q, k, m + shift * step, n + shift * step), base, atol=1e-4)
    assert abs(dot_after_rotation(q, k, m + step, n) - base) > 1e-2, "a real difference must be seen"


def test_rotary_keeps_lengths_and_leaves_the_origin_alone():
    place_N3 = embeddings.grid_places((2, 3, 4))
    x_BNAd = jax.random.normal(jax.random.key(0), (2, 24, 3, 10))
    turned = embeddings.rotate(x_BNAd, embeddings.rotary_turns(place_N3, 10))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x_BNAd, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(turned[:, 0], x_BNAd[:, 0])
    assert np.abs(turned - x_BNAd)[:, 1:].max() > 0.1


def test_rotary_is_complex_multiplication_of_neighbouring_pairs():
    """Against complex numbers in float64, axis by axis."""
    place_N3, width, theta = np.asarray(embeddings.grid_places((2, 3, 4))), 16, 100.0
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 24, 1, width)))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angles = []
    for axis, size in enumerate((8, 4, 4)):  # 16 = 8 + 4 + 4
        frequency = theta ** (-np.arange(0, size, 2) / size)
        angles.append(place_N3[:, axis, None] * frequency)
    expected = pairs * np.exp(1j * np.concatenate(angles, axis=1))[None, :, None]
    turned = np.asarray(embeddings.rotate(jnp.asarray(x), embeddings.rotary_turns(place_N3, width, theta=theta)))
    np.testing.assert_allclose(turned[..., 0::2] + 1j * turned[..., 1::2], expected, atol=1e-5)


def test_places_follow_the_order_of_tokens():
    """Token n of a patchified latent lies at place n: each value of this latent is its own coordinate."""
    grid, patch = (2, 3, 4), (1, 2, 2)
    coordinates = np.stack(
        np.meshgrid(*(np.arange(n * p) // p for n, p in zip(grid, patch, strict=True)), indexing="ij")
    )
    latent_Bthwz = jnp.asarray(coordinates.transpose(1, 2, 3, 0)[None], jnp.float32)
    tokens_BNP = embeddings.shapes.patchify(latent_Bthwz, patch)
    np.testing.assert_array_equal(tokens_BNP[0, :, :3], embeddings.grid_places(grid))


def test_places_may_begin_later_and_run_slower():
    whole = embeddings.grid_places((5, 2, 2))
    np.testing.assert_array_equal(embeddings.grid_places((3, 2, 2), offset=(2, 0, 0)), whole[8:])
    half_speed = embeddings.grid_places((5, 2, 2), scale=(0.5, 1, 1))
    np.testing.assert_array_equal(half_speed * jnp.array([2, 1, 1]), whole)
    traced = jax.jit(lambda start: embeddings.grid_places((3, 2, 2), offset=(start, 0.0, 0.0)))(2.0)
    np.testing.assert_array_equal(traced, whole[8:])


def test_sincos_tells_all_places_apart_and_equals_its_formula():
    places_ND = embeddings.sincos_places(embeddings.grid_places((3, 4, 5)), 12)
    distance = jnp.linalg.norm(places_ND[:, None] - places_ND[None], axis=-1)
    assert (distance + 9 * jnp.eye(60)).min() > 0.1
    np.testing.assert_allclose(places_ND[-1, 0], np.cos(2), rtol=1e-6)  # the last place is (2, 3, 4)
    np.testing.assert_allclose(places_ND[-1, 6], np.sin(2), rtol=1e-6)


def test_time_features_are_sinusoids_of_a_thousandfold_time():
    features = embeddings.time_features(jnp.array([[0.0, 0.25]]), 6)
    frequency = 1e4 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(features[0, 0], [1, 1, 1, 0, 0, 0])
    expected = np.concatenate([np.cos(250 * frequency), np.sin(250 * frequency)])
    np.testing.assert_allclose(features[0, 1], expected, atol=2e-5)
    near = embeddings.time_features(jnp.array([0.500, 0.501]))
    assert jnp.linalg.norm(near[0] - near[1]) > 1, "a thousandth of the way is told apart"


def test_patches_there_and_back_are_the_identity():
    """With mutually inverse weights, unembedding undoes embedding: both use one order of values."""
    patch, grid = (2, 2, 1), (1, 2, 3)
    latent = jax.random.normal(jax.random.key(0), (2, 2, 4, 3, 3))
    weight = np.asarray(jax.random.orthogonal(jax.random.key(1), 12))
    embed, unembed = embeddings.PatchEmbed(12, patch), embeddings.PatchUnembed(3, patch)
    tokens = embed.apply({"params": {"linear": {"kernel": weight, "bias": np.ones(12)}}}, latent)
    back = {"params": {"linear": {"kernel": weight.T, "bias": -np.ones(12) @ weight.T}}}
    np.testing.assert_allclose(unembed.apply(back, tokens, grid), latent, atol=1e-5)


def test_a_patch_may_be_the_whole_latent():
    latent = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    embed = embeddings.PatchEmbed(8, (2, 4, 4))
    params = nn.unbox(embed.init(jax.random.key(1), latent))
    assert embed.apply(params, latent).shape == (2, 1, 8)


def test_errors_teach():
    with pytest.raises(ValueError, match="width=7.*even"):
        embeddings.split_axes(7)
    with pytest.raises(ValueError, match="time_features=5.*even"):
        embeddings.time_features(jnp.zeros(2), 5)
