# SPDX-License-Identifier: Apache-2.0
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stvdm import sharding
from stvdm.models import autoencoder3d, causal_conv
from stvdm.models.autoencoder3d import Autoencoder

SMALL = dict(
    latent_channels=3,
    width=4,
    multipliers=(1, 2, 2),
    num_res_blocks=1,
    spatial_down=(True, False),
    temporal_down=(True, True),
    unshuffle=2,
)
SMALLEST = dict(multipliers=(1, 1), spatial_down=(True,), temporal_down=(True,), unshuffle=1, num_res_blocks=0)
GROUPINGS = ("causal", "uniform", "frame")
NUM_FRAMES = {"causal": 13, "uniform": 16, "frame": 4}  # four latent frames each


def make(grouping="causal", convolution="separable", **changes):
    """A small model, all its parameters random (zero-initialised ones too), and two clips of 8 x 12 pixels.

    The separable models have shortcuts past their stages, the full ones none.
    """
    fields = {**SMALL, "shortcuts": convolution == "separable", **changes}
    model = Autoencoder(**fields, grouping=grouping, convolution=convolution)
    video = jax.random.uniform(jax.random.key(1), (2, NUM_FRAMES[grouping], 8, 12, 3), minval=-1)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), video))["params"]
    random = np.random.default_rng(0)
    return model, jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), jnp.float32), shapes), video


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, video):
    return model.apply({"params": params}, video, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, video, weight_t):
    """Of a weighted sum of latent frames, by the video."""

    def weighted(video):
        return jnp.einsum("bthwz,t->", model.apply({"params": params}, video, method="encode")[0], weight_t)

    return jax.grad(weighted)(video)


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, latent):
    return model.apply({"params": params}, latent, method="decode")


def group_of(model, frame):
    """The latent frame that a frame of video belongs to."""
    return -(-frame // model.temporal) if model.grouping == "causal" else frame // model.temporal


STYLES = [  # every grouping with the quick layers; the full ones in every grouping only with `pytest -m slow`
    *((grouping, "separable") for grouping in GROUPINGS),
    ("causal", "full"),
    *(pytest.param(grouping, "full", marks=pytest.mark.slow) for grouping in ("uniform", "frame")),
]


# ---- what depends on what


@pytest.mark.parametrize("grouping, convolution", STYLES)
def test_nothing_depends_on_the_future_by_value(grouping, convolution):
    model, params, video = make(grouping, convolution)
    latent, _ = encode(model, params, video)
    decoded = decode(model, params, latent)
    assert latent.shape == (2, *model.latent_shape(video.shape[1:4]), 3) and decoded.shape == video.shape
    for frame in range(1, video.shape[1], 3):
        changed, _ = encode(model, params, video.at[:, frame:].add(1.0))
        first = group_of(model, frame)
        np.testing.assert_array_equal(changed[:, :first], latent[:, :first])
        assert jnp.abs(changed[:, first] - latent[:, first]).max() > 1e-3
    for k in range(1, latent.shape[1]):
        changed = decode(model, params, latent.at[:, k:].add(1.0))
        same = np.array([group_of(model, frame) < k for frame in range(video.shape[1])])
        np.testing.assert_array_equal(changed[:, same], decoded[:, same])
        assert (jnp.abs(changed - decoded)[:, ~same].max(axis=(0, 2, 3, 4)) > 1e-3).all()


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_nothing_depends_on_the_future_by_gradient(grouping):
    model, params, video = make(grouping)
    latent, _ = encode(model, params, video)
    for k in range(latent.shape[1]):
        towards = gradient(model, params, video, jnp.arange(latent.shape[1]) == k)
        reached = np.asarray(jnp.abs(towards).max(axis=(0, 2, 3, 4)) > 0)
        last = max(f for f in range(video.shape[1]) if group_of(model, f) == k)
        if grouping == "frame":
            expected = np.arange(video.shape[1]) == k
        else:
            expected = np.arange(video.shape[1]) <= last  # here the field of view covers the whole past
            assert not (reached & ~expected).any()
            expected &= reached
            assert reached[last]
        np.testing.assert_array_equal(reached, expected)


def test_first_frame_is_an_image():
    model, params, video = make()
    latent, _ = encode(model, params, video)
    image, _ = encode(model, params, video[:, :1])
    np.testing.assert_allclose(image, latent[:, :1], atol=1e-5)
    np.testing.assert_allclose(decode(model, params, image), decode(model, params, latent)[:, :1], atol=1e-5)


def test_frames_of_the_control_are_independent():
    model, params, video = make("frame")
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        encode(model, params, video[:, order])[0], encode(model, params, video)[0][:, order], atol=1e-5
    )
    assert model.temporal == 1
    assert all(p.shape[0] == 1 for p in jax.tree.leaves(params) if p.ndim == 5)


def test_the_time_convolution_of_the_decoder_never_sees_frame_0():
    """Wan's rule: with all temporal kernels of the blocks zero but the upsampling's, frame 0 does not reach frame 1."""
    model, params, _ = make(convolution="full", **{**SMALLEST, "spatial_down": (False,)})

    def only_present(path, p):
        inside_upsampling = any(getattr(key, "key", None) == "time" for key in path)
        return p if p.ndim != 5 or p.shape[0] == 1 or inside_upsampling else p.at[:-1].set(0)

    params = jax.tree_util.tree_map_with_path(only_present, params)
    latent = jax.random.normal(jax.random.key(0), (1, 4, 4, 6, 3))
    change = jnp.abs(decode(model, params, latent.at[:, 0].add(1.0)) - decode(model, params, latent))
    assert change[:, 0].max() > 1e-3 and change[:, 1:].max() == 0
    change = jnp.abs(decode(model, params, latent.at[:, 1].add(1.0)) - decode(model, params, latent))
    assert (change[:, 1:].max(axis=(0, 2, 3, 4)) > 1e-3).all() and change[:, 0].max() == 0


# ---- the same numbers in other ways


@pytest.mark.parametrize("grouping, convolution", STYLES)
def test_streamed_equals_whole(grouping, convolution):
    model, params, video = make(grouping, convolution)
    mean, log_variance = encode(model, params, video)
    decoded = decode(model, params, mean)
    lean = convolution == "full" or grouping != "causal"
    for chunks in ((2, 1, 1),) if lean else (1, (1, 1, 2), (2, 1, 1)):
        means, log_variances = zip(
            *autoencoder3d.stream_encode(model, params, video, chunk_latents=chunks), strict=True
        )
        np.testing.assert_allclose(jnp.concatenate(means, axis=1), mean, atol=1e-5)
        np.testing.assert_allclose(jnp.concatenate(log_variances, axis=1), log_variance, atol=1e-5)
        parts = list(autoencoder3d.stream_decode(model, params, mean, chunk_latents=chunks))
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), decoded, atol=1e-5)
        assert len(parts) == (4 if chunks == 1 else len(chunks))


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_weights_on_the_host_go_to_the_device_once_a_stream(monkeypatch, name):
    model, params, video = make("frame")
    given, seen = {"encode": video, "decode": jnp.zeros((2, 4, 2, 3, 3))}[name], []
    chunk = getattr(autoencoder3d, f"{name}_chunk")
    monkeypatch.setattr(
        autoencoder3d, f"{name}_chunk", lambda model, params, *rest: seen.append(params) or chunk(model, params, *rest)
    )
    list(getattr(autoencoder3d, f"stream_{name}")(model, jax.tree.map(np.asarray, params), given))
    assert len(seen) == 4 and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(seen))
    assert len({id(leaf) for leaf in jax.tree.leaves(seen)}) == len(jax.tree.leaves(params))
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("arrays that are on other hosts, too, can't be put"))
    list(getattr(autoencoder3d, f"stream_{name}")(model, params, given))


def test_the_cache_is_a_tree_of_arrays_of_constant_shape():
    model, params, video = make()
    latent, _ = encode(model, params, video)
    *_, cache = autoencoder3d.encode_chunk(model, params, video[:, :1], {})
    *_, later = autoencoder3d.encode_chunk(model, params, video[:, 1:5], cache)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, later)
    assert jax.tree.leaves(cache) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache))
    _, cache = autoencoder3d.decode_chunk(model, params, latent[:, :2], {})
    assert all(leaf.shape[1] == 2 for leaf in jax.tree.leaves(cache))


def test_jit_and_remat_change_nothing():
    model, params, video = make(**SMALLEST)
    video = video[:, :5]

    def loss(params, model=model):
        return jnp.mean(jnp.square(model.apply({"params": params}, video) - video))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    again = functools.partial(loss, model=model.copy(remat="stages"))
    assert "remat" in str(jax.make_jaxpr(again)(params)) and "remat" not in str(jax.make_jaxpr(loss)(params))
    value_again, grads_again = jax.jit(jax.value_and_grad(again))(params)
    np.testing.assert_allclose(value, value_again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, grads_again)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["decoder"]))
    op_by_op, _ = model.apply({"params": params}, video, method="encode")
    np.testing.assert_allclose(op_by_op, encode(model, params, video)[0], atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])  # the arrangement chosen on it, not the machine
@pytest.mark.parametrize(
    "kernel, stride",
    [
        ((3, 3, 3), (1, 1, 1)),
        ((3, 3, 3), (1, 2, 2)),
        ((1, 3, 3), (1, 1, 1)),
        ((1, 3, 3), (1, 2, 2)),
        ((3, 1, 1), (1, 1, 1)),
        ((3, 1, 1), (2, 1, 1)),
    ],
)
def test_convolution_is_xlas_3d_convolution(monkeypatch, backend, kernel, stride):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jax.random.normal(jax.random.key(0), (2, 7, 4, 6, 3))
    w = jax.random.normal(jax.random.key(1), (*kernel, 3, 4))
    space = (0, 0) if kernel[1] == 1 else (1, 1) if stride[1] == 1 else (0, 1)
    expected = lax.conv_general_dilated(
        x, w, stride, ((0, 0), space, space), dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest"
    )
    np.testing.assert_allclose(causal_conv._convolve(x, w, stride), expected, atol=1e-5)


@pytest.mark.parametrize(
    "mesh, size, stride",
    [
        (dict(context=4, tensor=2), (4, 8), 1),  # rows are too few to be split, columns are not
        (dict(context=2, tensor=4), (8, 4), 1),
        (dict(data=2, context=2, tensor=2), (2, 8), 1),
        (dict(context=4, tensor=2), (8, 16), 2),
        (dict(context=4, tensor=2), (12, 20), 2),
    ],
    ids=str,
)
def test_gradients_of_a_convolution_on_a_mesh_are_those_of_one_device(mesh, size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 4, *size, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))

    def loss(x, w):
        return jnp.sin(causal_conv._convolve(x, w, (1, stride, stride))).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    expected = jax.jit(gradients)(x, w)
    with jax.set_mesh(sharding.make_mesh(**mesh)):
        found = jax.jit(gradients)(x, w)
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-5 * np.abs(there).max())


def test_norm_is_l2_over_channels_times_sqrt_and_has_a_finite_slope_at_zero():
    norm, x = causal_conv.RMSNorm(), jax.random.normal(jax.random.key(0), (1, 2, 3, 4, 5))
    params = {"params": {"gamma": jnp.arange(1.0, 6.0)}}
    expected = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * jnp.sqrt(5.0) * jnp.arange(1.0, 6.0)
    np.testing.assert_allclose(norm.apply(params, x), expected, rtol=1e-5)
    slope = jax.grad(lambda x: norm.apply(params, x).sum())(jnp.zeros_like(x))
    assert jnp.isfinite(slope).all() and jnp.abs(slope).max() <= 5e4


# ---- tiles


def test_one_tile_is_the_whole_frame():
    model, params, video = make()
    mean, log_variance = encode(model, params, video)
    tiled_mean, tiled_log_variance = autoencoder3d.tiled_encode(model, params, video, tile=(32, 32))
    np.testing.assert_allclose(tiled_mean, mean, atol=1e-6)
    np.testing.assert_allclose(tiled_log_variance, log_variance, atol=1e-6)
    tiled = autoencoder3d.tiled_decode(model, params, mean, tile=(2, 3), overlap=1)
    np.testing.assert_allclose(tiled, decode(model, params, mean), atol=1e-6)


def test_tiles_equal_the_whole_where_the_margin_covers_the_field_of_view():
    model, params, _ = make(**SMALLEST, middle_attention=False)
    video = jax.random.uniform(jax.random.key(2), (1, 5, 56, 50, 3), minval=-1)
    mean, log_variance = encode(model, params, video)
    tiles = dict(tile=(18, 17), overlap=13, margin=6)  # decoder: 1 + 2 (middle) + 1/2 x 4, encoder: less
    tiled_mean, tiled_log_variance = autoencoder3d.tiled_encode(model, params, video, **tiles)
    np.testing.assert_allclose(tiled_mean, mean, atol=1e-5)
    np.testing.assert_allclose(tiled_log_variance, log_variance, atol=1e-5)
    whole = decode(model, params, mean)
    np.testing.assert_allclose(autoencoder3d.tiled_decode(model, params, mean, **tiles), whole, atol=1e-5)
    np.testing.assert_allclose(
        autoencoder3d.tiled_decode(model, params, mean, **tiles, chunk_latents=2), whole, atol=1e-5
    )
    near = autoencoder3d.tiled_decode(model, params, mean, tile=(18, 17), overlap=4)
    assert jnp.abs(near - whole).max() > 1e-4  # without the margin it is only near: the test above can fail


# ---- the scale of latents, the posterior


def test_statistics_merge_batches_of_any_size():
    random = np.random.default_rng(0)
    batches = [random.normal(3, [1, 2, 5], (n, 2, 3, 4, 3)) for n in (1, 5, 2)]
    statistics = autoencoder3d.latent_statistics(iter(batches))
    everything = np.concatenate(batches).reshape(-1, 3)
    np.testing.assert_allclose(statistics["mean_z"], everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["std_z"], everything.std(0), rtol=1e-6)
    normal = autoencoder3d.normalise(batches[1], statistics)
    np.testing.assert_allclose(autoencoder3d.denormalise(normal, statistics), batches[1], rtol=1e-5, atol=1e-5)
    assert abs(np.concatenate([autoencoder3d.normalise(b, statistics) for b in batches]).std() - 1) < 1e-3
    with pytest.raises(ValueError, match="at least one batch"):
        autoencoder3d.latent_statistics([])


def test_samples_and_divergence_of_the_posterior():
    mean, log_variance = jnp.full((1, 50, 20, 20, 1), 0.7), jnp.full((1, 50, 20, 20, 1), -0.5)
    draws = autoencoder3d.sample_latent(jax.random.key(0), mean, log_variance)
    np.testing.assert_allclose([draws.mean(), draws.var()], [0.7, np.exp(-0.5)], atol=0.02)
    log_ratio = -0.5 * (jnp.square(draws - mean) / jnp.exp(log_variance) + log_variance - jnp.square(draws))
    np.testing.assert_allclose(autoencoder3d.kl(mean, log_variance), log_ratio.mean(), atol=0.02)
    assert autoencoder3d.kl(jnp.zeros(3), jnp.zeros(3)) == 0


# ---- errors, sizes


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: encode(*make()[:2], jnp.zeros((1, 24, 8, 12, 3))), r"num_frames=24: .*4k\+1, e.g. 21 or 25"),
        (lambda: encode(*make("uniform")[:2], jnp.zeros((1, 6, 8, 12, 3))), r"num_frames=6: .*4k, e.g. 4 or 8"),
        (lambda: encode(*make()[:2], jnp.zeros((1, 5, 8, 10, 3))), r"width=10: space is compressed by 4"),
        (lambda: list(autoencoder3d.stream_decode(*make()[:2], jnp.zeros((1, 4, 2, 3, 3)), chunk_latents=(1, 2))), "4"),
        (lambda: Autoencoder(temporal_down=(True,)).init(jax.random.key(0), 0), "temporal_down=.*expected 3 entries"),
        (lambda: Autoencoder(grouping="casual").init(jax.random.key(0), 0), "grouping='casual'"),
        (lambda: autoencoder3d.tiled_decode(*make()[:2], jnp.zeros((1, 1, 9, 9, 3)), tile=(4, 4), overlap=4), "< tile"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_chunks_after_the_first_hold_whole_groups():
    model, params, video = make()
    *_, cache = autoencoder3d.encode_chunk(model, params, video[:, :1], {})
    with pytest.raises(ValueError, match="num_frames=5: .*multiple of 4"):
        autoencoder3d.encode_chunk(model, params, video[:, 1:6], cache)


def test_wan_2_1():
    """Shapes of the full size; parameters counted again from a list of its layers."""
    model = Autoencoder()
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 5, 16, 16, 3), "f4")))
    video = jax.ShapeDtypeStruct((1, 81, 480, 832, 3), jnp.float32)
    mean, log_variance = jax.eval_shape(functools.partial(model.apply, method="encode"), variables, video)
    assert mean.shape == log_variance.shape == (1, 21, 60, 104, 16)
    assert jax.eval_shape(functools.partial(model.apply, method="decode"), variables, mean).shape == video.shape

    def conv(a, b, kernel):
        return a * b * kernel + b

    def block(a, b):
        return a + conv(a, b, 27) + b + conv(b, b, 27) + (conv(a, b, 1) if a != b else 0)

    def middle(c):
        return 2 * block(c, c) + c + conv(c, 3 * c, 1) + conv(c, c, 1)

    down = [(96, 96), (96, 192), (192, 384), (384, 384)]
    encoder = conv(3, 96, 27) + sum(block(a, b) + block(b, b) for a, b in down)
    encoder += conv(96, 96, 9) + conv(192, 192, 9) + conv(384, 384, 9) + conv(192, 192, 3) + conv(384, 384, 3)
    encoder += middle(384) + 384 + conv(384, 32, 27)
    up = [(384, 384), (192, 384), (192, 192), (96, 96)]
    decoder = conv(16, 384, 27) + middle(384) + sum(block(a, b) + 2 * block(b, b) for a, b in up)
    decoder += 2 * conv(384, 768, 3) + 2 * conv(384, 192, 9) + conv(192, 96, 9) + 96 + conv(96, 3, 27)
    total = sum(np.prod(p.shape) for p in jax.tree.leaves(variables))
    assert total == encoder + decoder + conv(32, 32, 1) + conv(16, 16, 1) == 126_892_531


def test_every_parameter_names_its_dimensions():
    model, _, video = make()
    boxed = jax.eval_shape(model.init, jax.random.key(0), video)
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and box.names[-1] == "channels" for box in boxes)


@pytest.mark.slow
def test_it_learns():
    """A few steps on one clip from a fresh initialisation make the reconstruction better."""
    model, _, video = make(**SMALLEST)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), video))["params"]

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.square(model.apply({"params": p}, video) - video)))(
            params
        )
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    losses = []
    for _ in range(30):
        params, loss = step(params)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier * 1.05 for earlier, later in itertools.pairwise(losses))
