# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from stvdm import sharding
from stvdm.models import embeddings
from stvdm.models.dit import SIZES, TEXT_PATHS, TIME_PATHS, DiT

GRID = (3, 2, 3)  # tokens, all different along t, h, w where it matters
LATENT = (3, 4, 6)  # patches of 1 x 2 x 2
N, z, E, S = 18, 3, 5, 4

PATHS = [  # (text_path, time_path): all that go together
    (text, time)
    for text, time in itertools.product(TEXT_PATHS, TIME_PATHS)
    if time != "cross_attention" or text == "cross"
]
AS_TOKEN = [(text, time) for text, time in PATHS if time in ("in_context", "cross_attention")]

SMALL = DiT(latent_channels=z, width=24, num_layers=2, num_heads=2, mlp_width=20, text_width=E, time_features=8)
jitted = jax.jit(DiT.apply, static_argnums=0)


def few(presets, *quick):
    """Those that are tested each time; the others are slow."""
    return [pytest.param(*preset, marks=() if preset in quick else pytest.mark.slow) for preset in presets]


def variant(**fields):
    return dataclasses.replace(SMALL, **fields)


@functools.cache
def randomised(dit, seed=0):
    """Parameters of a model, every one drawn at random: what starts at zero or one would hide mistakes."""
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(dit.init, jax.random.key(0), *inputs(dit))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), nn.unbox(boxed))


def inputs(dit=SMALL, *, batch=2, latent=LATENT, levels=1, seed=1):
    """Random (latent, time, level, text, text_mask) for a model."""
    rng = np.random.default_rng(seed)
    num_tokens = int(np.prod(latent) / np.prod(dit.patch))
    return (
        rng.normal(size=(batch, *latent, dit.latent_channels + dit.extra_channels)).astype(np.float32),
        rng.uniform(size=(batch, levels)).astype(np.float32),
        None if levels == 1 else rng.integers(levels, size=(batch, num_tokens)).astype(np.int32),
        rng.normal(size=(batch, S, dit.text_width)).astype(np.float32),
        np.array([[True] * S, [True, True] + [False] * (S - 2)])[:batch],
    )


@functools.partial(jax.jit, static_argnums=0)
def sensitivity(dit, params, query, latent, *rest):
    """Gradient of one value of the output, at latent place (t, h, w), for the whole input."""
    t, h, w = query
    return jax.grad(lambda x: dit.apply(params, x, *rest)[0, t, h, w, 0])(latent)[0]


def reached(dit, params, query):
    """Which tokens' input moves the output of the token at (t, h, w): reached_thw, by gradient."""
    place = np.array(query) * dit.patch
    cells = np.abs(sensitivity(dit, params, place, *inputs(dit, batch=1)))
    return cells.reshape(GRID[0], GRID[1], 2, GRID[2], 2, z).max(axis=(2, 4, 5)) > 1e-9


# What it computes.


def reference(dit, params, latent, time_BK, level_BN, text, mask):
    """The docstrings of model and block in numpy and float64, clip by clip, layer by layer: full pattern."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    d = dit.width // dit.num_heads

    def linear(x, w):
        return x @ w["kernel"] + w["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def layer_norm(x, w=None):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return y if w is None else y * w["scale"] + w["bias"]

    def rms_norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"]

    def heads(x):
        return x.reshape(len(x), dit.num_heads, d).transpose(1, 0, 2)

    def turn(x, place_N3):
        out = np.empty_like(x)
        pair = 0
        for axis, size in enumerate(embeddings.split_axes(d)):
            for i in range(size // 2):
                angle = place_N3[:, axis] * dit.rope_theta ** (-2 * i / size)
                a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
                out[..., 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
                out[..., 2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
                pair += 1
        return out

    def project(w, x, source, place_N3=None):
        q, k = rms_norm(linear(x, w["query"]), w["query_norm"]), rms_norm(linear(source, w["key"]), w["key_norm"])
        q, k, v = heads(q), heads(k), heads(linear(source, w["value"]))
        return (q, k, v) if place_N3 is None else (turn(q, place_N3), turn(k, place_N3), v)

    def softmax(q, k, v):
        weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(d))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(1, 0, 2).reshape(out.shape[1], dit.width)

    def told(time):
        """The time MLP's vectors of some times."""
        half = dit.time_features // 2
        angle = np.asarray(time, np.float64)[:, None] * 1000 * 1e4 ** (-np.arange(half) / half)
        hidden = linear(np.concatenate([np.cos(angle), np.sin(angle)], -1), p["time_in"])
        return linear(silu(hidden), p["time_out"])

    def rows(time_ND, name):
        return linear(silu(time_ND), p[name]).reshape(-1, 6, dit.width)

    def entered(x, w, rows_N6D, i):
        if rows_N6D is None:
            return layer_norm(x, w[f"norm_{i + 1}"])
        return layer_norm(x) * (1 + rows_N6D[:, 3 * i + 1]) + rows_N6D[:, 3 * i]

    nt, nh, nw = GRID
    place_N3 = np.array([(t, h, w) for t in range(nt) for h in range(nh) for w in range(nw)], np.float64)
    modulated, dual = dit.time_path.startswith("adaln"), dit.text_path == "dual"
    clips = []
    for b in range(len(latent)):
        patches = [latent[b, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].ravel() for t, h, w in place_N3.astype(int)]
        x = linear(np.array(patches, np.float64), p["patch"]["linear"])
        words = linear(gelu(linear(text[b][mask[b]].astype(np.float64), p["text_in"])), p["text_out"])
        time_ND = told(time_BK[b][[0] if level_BN is None else level_BN[b]])
        noisiest_1D = told([time_BK[b].max()])

        read = [words] * (dit.text_path == "cross") + [noisiest_1D] * (dit.time_path == "cross_attention")
        beside = [words] * (dit.text_path != "cross") + [noisiest_1D] * (dit.time_path == "in_context")
        streams = [x, np.concatenate(beside)] if beside else [x]
        places = [place_N3, None]
        said = [None, None]
        if modulated:
            text_name = "text_time_modulation" if dual else "time_modulation"
            said = [rows(time_ND, "time_modulation"), rows(noisiest_1D, text_name) if beside else None]

        for layer in range(dit.num_layers):
            w = jax.tree.map(lambda a: a[layer], p["layers"]["block_0"])  # noqa: B023
            own = [w, w["text"] if dual else {**w, "modulation": w.get("text_modulation")}]
            of_block = [None if s is None else s + own[i]["modulation"] for i, s in enumerate(said)]
            entering = [entered(y, own[i], of_block[i], 0) for i, y in enumerate(streams)]
            qkv = [project(own[i]["self_attention"], y, y, places[i]) for i, y in enumerate(entering)]
            _, k, v = (np.concatenate(parts, axis=1) for parts in zip(*qkv, strict=True))
            for i, (q, _, _) in enumerate(qkv):
                gates = (1, 1) if of_block[i] is None else (of_block[i][:, 2], of_block[i][:, 5])
                y = streams[i] + gates[0] * linear(softmax(q, k, v), own[i]["self_attention"]["out"])
                if read:
                    c = w["cross_attention"]
                    found = softmax(*project(c, layer_norm(y, w["cross_norm"]), np.concatenate(read)))
                    y = y + linear(found, c["out"])
                y_F = gelu(linear(entered(y, own[i], of_block[i], 1), own[i]["mlp_in"]))
                streams[i] = y + gates[1] * linear(y_F, own[i]["mlp_out"])

        if modulated:
            shift, scale = p["head_modulation"][:, None] + time_ND
            y = layer_norm(streams[0]) * (1 + scale) + shift
        else:
            y = layer_norm(streams[0], p["head_norm"])
        out = linear(y, p["head"]["linear"]).reshape(nt, nh, nw, 2, 2, -1)
        clips.append(out.transpose(0, 1, 3, 2, 4, 5).reshape(nt, 2 * nh, 2 * nw, -1))
    return np.stack(clips)


@pytest.mark.parametrize(
    "text, time", [("cross", "adaln_zero"), ("joint", "adaln_zero"), ("dual", "adaln_zero"), *AS_TOKEN]
)
def test_equals_its_docstrings_in_numpy(text, time):
    dit = variant(text_path=text, time_path=time)
    params, given = randomised(dit), inputs(levels=2 if time == "adaln_zero" else 1)
    expected = reference(dit, params, *given)
    np.testing.assert_allclose(jitted(dit, params, *given), expected, atol=1e-4 * np.abs(expected).max())


def test_plain_adaln_is_the_same_function_from_another_start():
    given = inputs(levels=2)
    for text in TEXT_PATHS:
        zero, plain = (variant(text_path=text, time_path=time) for time in ("adaln_zero", "adaln"))
        programs = [str(jax.make_jaxpr(dit.apply)(randomised(zero), *given)) for dit in (zero, plain)]
        assert programs[0] == programs[1]
    block = jax.jit(plain.init)(jax.random.key(0), *given)["params"]["layers"]["block_0"]
    for table in (block["modulation"], block["text"]["modulation"]):
        np.testing.assert_array_equal(nn.unbox(table)[:, [2, 5]], 1)
        np.testing.assert_array_equal(nn.unbox(table)[:, [0, 1, 3, 4]], 0)


@pytest.mark.parametrize(
    "text, time", [*few(PATHS, *((text, "adaln_zero") for text in TEXT_PATHS), ("dual", "in_context"))]
)
def test_a_fresh_model_predicts_zeros_where_it_starts_as_nothing_and_nowhere_else(text, time):
    dit = variant(text_path=text, time_path=time)
    out = jitted(dit, nn.unbox(jax.jit(dit.init)(jax.random.key(0), *inputs())), *inputs())
    if time == "adaln_zero":
        np.testing.assert_array_equal(out, 0)
    else:
        assert np.abs(out).min(axis=-1).max() > 0.1


def test_what_models_were_made_of_before_they_are_made_of_now():
    """Names and shapes of parameters, so that checkpoints go on loading; those of the other paths are their own."""

    def paths(**fields):
        boxed = jax.eval_shape(variant(scan_layers=False, num_layers=1, **fields).init, jax.random.key(0), *inputs())
        flat = traverse_util.flatten_dict(nn.unbox(boxed)["params"]["layers_0"]["block_0"], sep="/")
        return {path: leaf.shape for path, leaf in flat.items()}

    D, F = SMALL.width, SMALL.mlp_width
    dense = lambda name, i, o: {f"{name}/kernel": (i, o), f"{name}/bias": (o,)}  # noqa: E731
    attention = lambda name: {  # noqa: E731
        **{
            key: value
            for part in ("query", "key", "value", "out")
            for key, value in dense(f"{name}/{part}", D, D).items()
        },
        **{f"{name}/{part}_norm/scale": (D,) for part in ("query", "key")},
    }
    common = {**attention("self_attention"), **dense("mlp_in", D, F), **dense("mlp_out", F, D)}
    modulated = {**common, "modulation": (6, D)}
    cross = {**attention("cross_attention"), "cross_norm/scale": (D,), "cross_norm/bias": (D,)}
    assert paths() == paths(time_path="adaln") == {**modulated, **cross}
    assert paths(text_path="joint") == {**modulated, "text_modulation": (6, D)}
    assert paths(text_path="dual") == {**modulated, **{f"text/{name}": shape for name, shape in modulated.items()}}
    normed = {**common, **{f"norm_{i}/{part}": (D,) for i in (1, 2) for part in ("scale", "bias")}}
    assert paths(time_path="in_context") == paths(time_path="cross_attention") == {**normed, **cross}


def test_a_fresh_block_is_the_identity():
    """With a head that lets tokens through, a fresh model does the same without its blocks."""
    shallow, deep = (variant(scan_layers=False, num_layers=layers) for layers in (1, 2))
    params = nn.unbox(jax.jit(deep.init)(jax.random.key(0), *inputs()))["params"]
    params["head"] = jax.tree.map(jnp.ones_like, params["head"])
    out = jitted(deep, {"params": params}, *inputs())
    assert np.abs(out).max() > 0.1
    fewer = {name: value for name, value in params.items() if name != "layers_1"}
    np.testing.assert_array_equal(out, jitted(shallow, {"params": fewer}, *inputs()))


def test_no_jit_gives_the_same():
    dit = variant(num_layers=1)
    params = randomised(dit)
    np.testing.assert_allclose(dit.apply(params, *inputs()), jitted(dit, params, *inputs()), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "attention, text, time",
    few(
        [(("full",), *paths) for paths in PATHS] + [(("frame", "time"), *paths) for paths in PATHS],
        *((("full",), "cross", "adaln_zero"), (("frame", "time"), "cross", "adaln_zero")),
        *((("frame", "time"), "dual", "adaln_zero"), (("full",), "joint", "in_context")),
    ),
)
def test_scanned_layers_equal_a_loop(attention, text, time):
    scanned = variant(attention=attention, num_layers=4, text_path=text, time_path=time)
    looped = dataclasses.replace(scanned, scan_layers=False)
    params = randomised(scanned)["params"]
    unstacked = {name: value for name, value in params.items() if name != "layers"}
    for i in range(4 // len(attention)):
        unstacked[f"layers_{i}"] = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
    out = jitted(scanned, {"params": params}, *inputs())
    np.testing.assert_allclose(out, jitted(looped, {"params": unstacked}, *inputs()), rtol=1e-4, atol=1e-4)


@functools.cache
def loss_and_gradient(dit):
    given = inputs(levels=2 if dit.time_path == "adaln_zero" else 1)
    params = randomised(dataclasses.replace(dit, remat="nothing"))
    return jax.jit(jax.value_and_grad(lambda p: (dit.apply(p, *given) ** 2).mean()))(params)


@pytest.mark.parametrize(
    "remat, text, time",
    few(
        [(remat, *paths) for remat in ("everything", "projections", "attention", "offload") for paths in PATHS],
        ("everything", "cross", "adaln_zero"),
        ("everything", "dual", "in_context"),
    ),
)
def test_remat_gives_the_same_values_and_gradients(remat, text, time):
    plain = variant(text_path=text, time_path=time)
    (loss, gradient), (loss_again, gradient_again) = map(
        loss_and_gradient, (plain, dataclasses.replace(plain, remat=remat))
    )
    np.testing.assert_allclose(loss_again, loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_bfloat16_stays_near_float32():
    params = jax.tree.map(lambda x: 0.5 * x, randomised(SMALL))
    exact = jitted(SMALL, params, *inputs())
    rough = jitted(variant(dtype=jnp.bfloat16), params, *inputs())
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


MESHES = {
    "fsdp-context-tensor": dict(data=1, fsdp=2, context=2, tensor=2),
    "data-tensor": dict(data=2, fsdp=1, context=2, tensor=2),
    "context": dict(data=1, fsdp=2, context=4),  # two heads: all-to-all over two, a ring of two
}
PATTERNS = ("full", "frame", "time", "window", "block_causal")
PRESETS = [
    *((mesh, pattern, text, "adaln_zero") for mesh, pattern, text in itertools.product(MESHES, PATTERNS, TEXT_PATHS)),
    *((mesh, pattern, *paths) for mesh, pattern, paths in itertools.product(MESHES, ("full", "frame"), AS_TOKEN)),
]
QUICK = [
    ("context", "full", "cross", "adaln_zero"),
    ("context", "window", "cross", "adaln_zero"),
    ("fsdp-context-tensor", "frame", "joint", "adaln_zero"),
    ("fsdp-context-tensor", "full", "dual", "in_context"),
]


@pytest.mark.parametrize("mesh, pattern, text, time", few(PRESETS, *QUICK))
def test_a_mesh_gives_what_one_device_gives_with_all_gradients(mesh, pattern, text, time):
    dit = variant(text_path=text, time_path=time, attention=(pattern,), window=(1, 0, 1))
    made = sharding.make_mesh(**MESHES[mesh])
    params, given = randomised(dit), inputs(dit, levels=2 if time == "adaln_zero" else 1)
    weights = np.random.default_rng(2).normal(size=given[0].shape).astype(np.float32)

    def loss(params, latent, *rest):
        out = dit.apply(params, latent, *rest)
        return jnp.sum(weights * out) / weights.size, out

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, expected), expected_grads = jax.jit(both)(params, *given)
    places = sharding.shardings(jax.eval_shape(dit.init, jax.random.key(0), *given), made)
    with jax.set_mesh(made):
        (_, out), grads = jax.jit(both)(jax.device_put(params, places), *given)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    named = jax.tree_util.tree_leaves_with_path(expected_grads)
    for (path, one), other in zip(named, jax.tree.leaves(grads), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max() + 1e-7, err_msg=name)
        assert np.abs(one).max() > 0, name  # a gradient of nothing compares with nothing


@pytest.mark.parametrize("text, time", [("joint", "adaln_zero"), ("dual", "adaln_zero"), ("cross", "in_context")])
def test_every_parameter_names_its_dimensions(text, time):
    boxed = jax.eval_shape(variant(text_path=text, time_path=time).init, jax.random.key(0), *inputs())
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in leaves)


# Time.


@pytest.mark.parametrize("text, time", few(PATHS, ("cross", "adaln_zero"), *AS_TOKEN))
def test_the_time_matters_to_every_clip_and_token(text, time):
    dit = variant(text_path=text, time_path=time, attention=("frame",))
    latent, time_B1, _, *texts = inputs()
    out = jitted(dit, randomised(dit), latent, time_B1, None, *texts)
    later = jitted(dit, randomised(dit), latent, time_B1 + np.array([[0.0], [0.1]], np.float32), None, *texts)
    np.testing.assert_allclose(later[0], out[0], atol=1e-5)
    assert np.abs(later[1] - out[1]).max(axis=-1).min() > 1e-3


def test_time_as_a_token_is_refused_for_several_levels_a_clip():
    for time in ("in_context", "cross_attention"):
        with pytest.raises(
            ValueError, match=rf"time of shape \(2, 3\): time_path='{time}' tells a clip one time.*adaln_zero"
        ):
            jax.eval_shape(variant(time_path=time).init, jax.random.key(0), *inputs(levels=3))


@pytest.mark.parametrize("text_path", ["cross", "joint", "dual"])
def test_equal_levels_are_one_time(text_path):
    dit = variant(text_path=text_path)
    latent, time_B1, _, *text = inputs()
    level_BN = np.arange(2 * N, dtype=np.int32).reshape(2, N) % 3
    out = jitted(dit, randomised(dit), latent, np.repeat(time_B1, 3, axis=1), level_BN, *text)
    np.testing.assert_allclose(out, jitted(dit, randomised(dit), latent, time_B1, None, *text), rtol=1e-4, atol=1e-4)


def test_levels_of_separate_frames_equal_separate_runs():
    """With frames apart, frames at level 0 come out as in a run at time 0 alone, those at level 1 as at time 1."""
    dit = variant(attention=("frame",))
    params = randomised(dit)
    latent, time_BK, _, *text = inputs(levels=2)
    level_of_frame = np.array([[0, 1, 0], [1, 1, 0]])
    level_BN = np.repeat(level_of_frame, N // GRID[0], axis=1)
    out = jitted(dit, params, latent, time_BK, level_BN, *text)
    low, high = (jitted(dit, params, latent, time_BK[:, k : k + 1], None, *text) for k in (0, 1))
    stitched = np.where(level_of_frame[:, :, None, None, None] == 0, low, high)
    np.testing.assert_allclose(out, stitched, rtol=1e-4, atol=1e-4)
    assert np.abs(low - high).max() > 0.1


@pytest.mark.parametrize("text_path", ["joint", "dual"])
def test_text_beside_the_video_is_told_the_noisiest_time_of_its_clip(text_path):
    """Raising a lower level that no token has changes nothing; raising the highest does."""
    dit = variant(text_path=text_path)
    latent, _, _, *text = inputs()
    level_BN = np.ones((2, N), np.int32)

    def out(*times):
        return jitted(dit, randomised(dit), latent, np.array([times, times], np.float32), level_BN, *text)

    np.testing.assert_allclose(out(0.1, 0.5, 0.6), out(0.3, 0.5, 0.6), atol=1e-6)
    assert np.abs(out(0.1, 0.5, 0.6) - out(0.1, 0.5, 0.9)).max() > 1e-3


# Who sees whom.


@pytest.mark.parametrize(
    "text, time", few(PATHS, ("cross", "adaln_zero"), ("dual", "adaln_zero"), ("joint", "in_context"))
)
def test_block_causal_never_looks_ahead(text, time):
    """Also by way of text or time, which all frames see."""
    dit = variant(attention=("block_causal",), text_path=text, time_path=time)
    params = randomised(dit)
    for t in range(GRID[0]):
        seen = reached(dit, params, (t, 1, 2))
        assert seen[: t + 1].all() and not seen[t + 1 :].any()

    latent, *rest = inputs(dit)
    later = latent.copy()
    later[:, 2] += 1
    before, after = jitted(dit, params, latent, *rest), jitted(dit, params, later, *rest)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2] - after[:, 2]).max() > 0.1


@pytest.mark.parametrize(
    "text, time",
    few(PATHS, ("cross", "adaln_zero"), ("joint", "adaln_zero"), ("dual", "adaln_zero"), ("cross", "in_context")),
)
def test_frames_apart_stay_apart(text, time):
    """Also where all of them talk with the same text."""
    dit = variant(attention=("frame",), text_path=text, time_path=time)
    seen = reached(dit, randomised(dit), (1, 0, 1))
    assert seen[1].all() and not seen[[0, 2]].any()


def test_full_attention_connects_all_in_one_layer_and_factorised_needs_two():
    far = (slice(1, None), slice(1, None), slice(1, None))  # another time and another place than (0, 0, 0)

    def sees_far(*attention):
        dit = variant(attention=attention, num_layers=len(attention))
        return reached(dit, randomised(dit), (0, 0, 0))[far]

    assert sees_far("full").all()
    assert not sees_far("frame").any()
    assert not sees_far("time").any()
    assert sees_far("frame", "time").all()


def test_windows_reach_further_layer_by_layer():
    dit = variant(attention=("window",), window=(1, 0, 1), num_layers=1)
    seen = reached(dit, randomised(dit), (0, 0, 0))
    np.testing.assert_array_equal(np.argwhere(seen), [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    twice = dataclasses.replace(dit, num_layers=2)
    np.testing.assert_array_equal(reached(twice, randomised(twice), (0, 0, 0))[:, 0], True)


# Places, sizes.


def test_frames_apart_may_be_shuffled():
    dit = variant(attention=("frame",))
    latent, *rest = inputs(dit)
    order = np.array([2, 0, 1])
    out = jitted(dit, randomised(dit), latent, *rest)
    np.testing.assert_allclose(jitted(dit, randomised(dit), latent[:, order], *rest), out[:, order], atol=1e-4)


def test_full_attention_tells_orders_apart():
    latent, *rest = inputs()
    order = np.array([2, 0, 1])
    out = jitted(SMALL, randomised(SMALL), latent, *rest)
    assert np.abs(jitted(SMALL, randomised(SMALL), latent[:, order], *rest) - out[:, order]).max() > 1e-2


def test_rotary_places_are_relative_and_sincos_places_are_not():
    later_N3 = embeddings.grid_places(GRID, offset=(5, 2, 3))
    for positions, moves in (("rotary", False), ("sincos", True)):
        dit = variant(positions=positions)
        params = randomised(dit)
        out = jitted(dit, params, *inputs())
        difference = np.abs(jitted(dit, params, *inputs(), place_N3=later_N3) - out).max() / np.abs(out).max()
        assert difference > 1e-2 if moves else difference < 1e-3


def test_images_and_other_sizes_use_the_same_parameters():
    """A clip of one frame is an image; and with frames apart, a clip is its frames as images."""
    dit = variant(attention=("frame",))
    params = randomised(dit)
    latent, *rest = inputs(dit)
    whole = jitted(dit, params, latent, *rest)
    for t in range(3):
        image = jitted(dit, params, latent[:, t : t + 1], *rest)
        np.testing.assert_allclose(image, whole[:, t : t + 1], rtol=1e-3, atol=1e-4)
    wide = jitted(SMALL, randomised(SMALL), *inputs(latent=(5, 2, 10)))
    assert wide.shape == (2, 5, 2, 10, z) and np.isfinite(wide).all()


def test_extra_channels_are_seen_but_not_predicted():
    dit = variant(extra_channels=4)
    latent, *rest = inputs(dit)
    out = jitted(dit, randomised(dit), latent, *rest)
    assert out.shape == (*latent.shape[:-1], z)
    changed = latent.copy()
    changed[..., z:] += 1
    assert np.abs(jitted(dit, randomised(dit), changed, *rest) - out).max() > 1e-2


# Text.


@pytest.mark.parametrize("attention", [("full",), ("frame", "time")])
@pytest.mark.parametrize(
    "text_path, time_path",
    few(PATHS, ("cross", "adaln_zero"), ("joint", "adaln_zero"), ("dual", "adaln_zero"), *AS_TOKEN),
)
def test_words_matter_and_padding_does_not(text_path, time_path, attention):
    dit = variant(text_path=text_path, time_path=time_path, attention=attention)
    latent, time_BK, _, text, mask = inputs()
    out = jitted(dit, randomised(dit), latent, time_BK, None, text, mask)
    padding = np.where(mask[..., None], text, 7.0).astype(np.float32)
    np.testing.assert_allclose(jitted(dit, randomised(dit), latent, time_BK, None, padding, mask), out, atol=1e-5)
    words = np.where(mask[..., None], -text, text)
    assert (
        np.abs(jitted(dit, randomised(dit), latent, time_BK, None, words, mask) - out).max((1, 2, 3, 4)) > 1e-3
    ).all()


def test_no_mask_means_that_all_words_are_real():
    latent, time_BK, _, text, mask = inputs()
    params = randomised(SMALL)
    everything = jitted(SMALL, params, latent, time_BK, None, text, np.ones_like(mask))
    np.testing.assert_allclose(jitted(SMALL, params, latent, time_BK, None, text), everything, atol=1e-6)


# Sizes and errors.


@pytest.mark.parametrize(
    "name, latent_channels, text_width, expected",
    [
        ("tiny", 16, 128, 3_963_520),
        ("S", 16, 128, 29_808_064),
        ("B", 16, 128, 118_598_464),
        ("L", 16, 128, 412_193_856),
        ("XL", 16, 128, 606_570_688),
        ("wan-1.3b", 16, 4096, 1_418_996_800),
        ("wan-5b", 48, 4096, 4_999_787_712),
        ("wan-14b", 16, 4096, 14_288_491_584),
    ],
)
def test_sizes_have_the_parameters_they_should(name, latent_channels, text_width, expected):
    dit = DiT(latent_channels=latent_channels, text_width=text_width, **SIZES[name])
    latent, text = np.zeros((1, 1, 2, 2, latent_channels)), np.zeros((1, 1, text_width))
    params = jax.eval_shape(dit.init, jax.random.key(0), latent, np.zeros((1, 1)), None, text)
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_layers=3, attention=("frame", "time")), "num_layers=3.*multiple of 2"),
        (dict(num_heads=5), "width=24: use a multiple of num_heads=5"),
        (dict(remat="nothin"), "remat='nothin': did you mean 'nothing'"),
        (dict(remat="xyz"), "expected one of nothing, projections, attention"),
        (dict(text_path="crossed"), "text_path='crossed': did you mean 'cross'"),
        (dict(time_path="adaln_one"), "time_path='adaln_one': did you mean 'adaln_zero'"),
        (dict(time_path="cross_attention", text_path="dual"), "text_path='dual' has no cross-attention; use"),
        (dict(positions="learned"), "positions='learned': expected one of rotary, sincos"),
        (dict(attention=("ful",)), "attention pattern='ful': did you mean 'full'"),
        (dict(attention=("window",)), "window=None"),
        (dict(extra_channels=2), r"latent of shape \(2, 3, 4, 6, 3\): expected \(B, t, h, w, 5\)"),
        (dict(patch=(2, 2, 2)), r"not a whole number of patches \(2, 2, 2\)"),
        (dict(num_heads=8), "width=3.*even"),
    ],
)
def test_errors_teach(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(variant(**fields).init, jax.random.key(0), *inputs())


@pytest.mark.parametrize(
    "fields, width, message",
    [
        (dict(image_width=7), None, r"no image: expected \(B, S, 7\), as image_width=7"),
        (dict(image_width=7), 6, r"an image of shape \(2, 3, 6\): expected \(B, S, 7\)"),
        (dict(), 7, r"an image of shape \(2, 3, 7\): expected none, as image_width=0"),
        (dict(image_width=7, text_path="joint"), 7, "image_width=7: an image is read beside the text by cross"),
    ],
)
def test_an_image_is_there_where_it_is_read(fields, width, message):
    image_BSE = None if width is None else np.zeros((2, 3, width))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(variant(**fields).init, jax.random.key(0), *inputs(), image_BSE=image_BSE)


def test_a_time_without_levels_is_refused():
    latent, time_BK, *rest = inputs()
    with pytest.raises(ValueError, match=r"time of shape \(2,\): expected \(B, K\)"):
        jax.eval_shape(SMALL.init, jax.random.key(0), latent, time_BK[:, 0], *rest)
