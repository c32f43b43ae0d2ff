# SPDX-License-Identifier: Apache-2.0
"""Wan's transformers against diffusers on random weights; names and shapes of the published sizes, both formats."""

import functools
import json

import flax.linen as nn
import foreign
import foreign_wan
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import sharding
from stvdm.interop import mapping, wan, weights
from stvdm.models.block import Block
from stvdm.models.dit import DiT

GOLDEN = foreign_wan.golden()
TOLERANCE = 1e-5  # of the size of the values, float32
FORMATS = ("diffusers", "original")


@functools.cache
def tiny(case, **fields):
    """The model of a tiny config, and its parameters from diffusers' tensors."""
    shapes = GOLDEN["tiny"][case]["shapes"]
    dit = DiT(**wan.fields_of(foreign_wan.CONFIGS[case], shapes), **fields)
    pairs = wan.pairs(dit, "diffusers")
    mapping.agree(pairs, {name: tuple(shape) for name, shape in shapes.items()})
    return dit, filled(dit, pairs, foreign.weights(shapes))


def filled(dit, pairs, tensors):
    part = weights.of_theirs(pairs, tensors.__getitem__)
    return weights.fill(nn.unbox(wan.shapes_of(dit)), part, stacked=wan.STACKED)


def inputs(case):
    """What the reference saw, as a DiT takes it: (latent, time, level, text), {image}, probe."""
    given = foreign_wan.inputs(case)
    latent, probe = (np.moveaxis(given[name], 1, -1) for name in ("latent", "probe"))
    time_BK, level_BN = given["timestep"] / np.float32(1000), None
    if case == "ti2v":  # two levels: what is known, and what is made
        level_BN = (time_BK > 0).astype(np.int32)
        time_BK = np.stack([np.zeros(2, np.float32), time_BK.max(axis=1)], axis=1)
    else:
        time_BK = time_BK[:, None]
    image = {"image_BSE": given["image"]} if "image" in given else {}
    return (latent, time_BK, level_BN, given["text"]), image, probe


def error(array, case, name):
    """How far an array is from the reference's of that name."""
    return foreign.error(array, GOLDEN["tiny"][case]["outputs"][name])


@pytest.mark.parametrize("case", foreign_wan.CONFIGS)
def test_velocity_blocks_and_gradients_are_those_of_diffusers(case):
    dit, params = tiny(case, scan_layers=False)
    (latent, time, level, text), image, probe = inputs(case)

    def loss(latent, text, image):
        velocity, seen = dit.apply(
            {"params": params},
            latent,
            time,
            level,
            text,
            **image,
            capture_intermediates=lambda module, _: isinstance(module, Block),
        )
        return jnp.vdot(velocity, probe), (velocity, seen["intermediates"])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (velocity, seen)), gradients = run(latent, text, image)
    found = {f"block_{i}": seen[f"layers_{i}"]["block_0"]["__call__"][0][0] for i in range(dit.num_layers)}
    found["velocity"] = np.moveaxis(velocity, -1, 1)
    found["gradient_latent"] = np.moveaxis(gradients[0], -1, 1)
    found["gradient_text"] = gradients[1]
    if image:
        found["gradient_image"] = gradients[2]["image_BSE"]
    errors = {name: error(array, case, name) for name, array in found.items()}
    assert errors.keys() == GOLDEN["tiny"][case]["outputs"].keys()
    print(case, {name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", foreign_wan.CONFIGS)
def test_a_scanned_model_reads_the_same_weights(case):
    dit, params = tiny(case)
    given, image, _ = inputs(case)
    velocity = jax.jit(dit.apply)({"params": params}, *given, **image)
    assert error(np.moveaxis(velocity, -1, 1), case, "velocity") < TOLERANCE


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", foreign_wan.CONFIGS)
def test_what_goes_out_comes_back(case, form):
    dit, params = tiny(case)
    pairs = wan.pairs(dit, form)
    out = {tensor.name: next(iter(tensor.parts())) for tensor in weights.theirs(pairs, weights.of_tree(params))}
    mapping.agree(pairs, {name: array.shape for name, array in out.items()})
    config = json.loads(json.dumps(wan.config_of(dit, form)))
    assert wan.format_of(out) == form
    assert DiT(**wan.fields_of(config, {name: array.shape for name, array in out.items()})) == dit
    back = filled(dit, pairs, out)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if form == "diffusers":
        source = foreign.weights(GOLDEN["tiny"][case]["shapes"])
        assert out.keys() == source.keys()
        for name, array in source.items():
            np.testing.assert_array_equal(out[name], array)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", foreign_wan.PUBLISHED)
def test_published_sizes_have_the_published_names_and_shapes(name, form):
    dit, golden = DiT(**wan.MODELS[name]), GOLDEN["published"][name]
    expected = {key: tuple(shape) for key, shape in foreign_wan.unfolded(golden[form]).items()}
    pairs = wan.pairs(dit, form)
    assert {pair.theirs: pair.shape for pair in pairs} == expected
    assert len(pairs) == len(expected)
    assert sum(int(np.prod(pair.shape)) for pair in pairs) == golden["parameters"]
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.unbox(wan.shapes_of(dit))))
    assert count == golden["parameters"]
    config = wan.config_of(dit, form)
    assert DiT(**wan.fields_of(config, expected)) == dit
    if form == "diffusers":
        assert DiT(**wan.fields_of(foreign_wan.PUBLISHED[name], expected)) == dit  # the class's defaults
        assert config.items() >= foreign_wan.PUBLISHED[name].items()


def test_published_parameters_in_billions():
    made = {name: round(GOLDEN["published"][name]["parameters"] / 1e9, 3) for name in foreign_wan.PUBLISHED}
    assert made == {"t2v-1.3b": 1.419, "t2v-14b": 14.288, "i2v-14b": 16.395, "i2v-a14b": 14.289, "ti2v-5b": 5.0}


def test_all_that_is_wrong_is_said_in_one_error():
    dit, _ = tiny("t2v")
    found = {name: tuple(shape) for name, shape in GOLDEN["tiny"]["i2v"]["shapes"].items()}
    del found["blocks.0.ffn.net.2.bias"], found["blocks.2.ffn.net.2.bias"]
    with pytest.raises(ValueError, match="not this model's") as raised:
        mapping.agree(wan.pairs(dit, "diffusers"), found)
    assert sorted(line.strip() for line in str(raised.value).splitlines()[1:]) == [
        "- blocks.0,2.ffn.net.2.bias (48,): missing",
        "- blocks.0-2.attn2.add_k_proj.bias (48,): left over",
        "- blocks.0-2.attn2.add_k_proj.weight (48, 48): left over",
        "- blocks.0-2.attn2.add_v_proj.bias (48,): left over",
        "- blocks.0-2.attn2.add_v_proj.weight (48, 48): left over",
        "- blocks.0-2.attn2.norm_added_k.weight (48,): left over",
        "- condition_embedder.image_embedder.ff.net.0.proj.bias (28,): left over",
        "- condition_embedder.image_embedder.ff.net.0.proj.weight (28, 28): left over",
        "- condition_embedder.image_embedder.ff.net.2.bias (48,): left over",
        "- condition_embedder.image_embedder.ff.net.2.weight (48, 28): left over",
        "- condition_embedder.image_embedder.norm1.bias (28,): left over",
        "- condition_embedder.image_embedder.norm1.weight (28,): left over",
        "- condition_embedder.image_embedder.norm2.bias (48,): left over",
        "- condition_embedder.image_embedder.norm2.weight (48,): left over",
        "- patch_embedding.weight (48, 11, 1, 2, 2): expected (48, 5, 1, 2, 2)",
    ]


def test_a_norm_of_early_files_is_ignored():
    dit, _ = tiny("t2v")
    found = {name: tuple(shape) for name, shape in GOLDEN["tiny"]["t2v"]["shapes"].items()}
    found["blocks.1.attn2.norm_added_q.weight"] = (48,)
    mapping.agree(wan.pairs(dit, "diffusers"), found, ignored=wan.IGNORED)
    with pytest.raises(ValueError, match="blocks.1.attn2.norm_added_q.weight"):
        mapping.agree(wan.pairs(dit, "diffusers"), found)


def test_configs_of_other_models_are_refused():
    shapes = GOLDEN["tiny"]["t2v"]["shapes"]
    config = dict(foreign_wan.CONFIGS["t2v"], eps=1e-5, pos_embed_seq_len=514, cross_attn_norm=False)
    with pytest.raises(ValueError, match="cannot be this transformer") as raised:
        wan.fields_of(config, shapes)
    assert sorted(line.strip() for line in str(raised.value).splitlines()[1:]) == [
        "- cross_attn_norm=False: expected True",
        "- eps=1e-05: expected 1e-06",
        "- pos_embed_seq_len=514: expected None",
    ]
    dit, _ = tiny("t2v")
    other = dit.clone(attention=("frame", "time", "full"), rope_theta=100.0, text_path="joint", time_path="in_context")
    with pytest.raises(ValueError, match="not of Wan's shape") as raised:
        wan.config_of(other, "diffusers")
    assert len(str(raised.value).splitlines()) == 5
    with pytest.raises(ValueError, match=r"no place for these parameters:\n.*layers_0-2/block_0/text_modulation"):
        wan.pairs(dit.clone(text_path="joint"), "original")


def test_weights_are_loaded_onto_a_mesh(tmp_path):
    dit, params = tiny("i2v")
    wan.save(tmp_path, dit, weights.of_tree(params), "diffusers", dtype="bfloat16", shard_bytes=100_000)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    loaded, placed = wan.load(tmp_path, mesh=mesh, remat="everything")
    assert loaded == dit.clone(remat="everything")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), placed, params)
    kernel = placed["layers"]["block_0"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == sharding.spec("layers", "width", "mlp")
    _, held = wan.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, placed, held)


def test_folders_that_are_none_are_named(tmp_path):
    dit, params = tiny("t2v")
    with pytest.raises(FileNotFoundError, match="expected the folder of a Wan model or of its transformer"):
        wan.folders_of(tmp_path)
    wan.save(tmp_path / "one", dit, weights.of_tree(params), "original")
    (tmp_path / "one" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected the config.json"):
        wan.opened(tmp_path / "one")


def test_the_golden_file_is_what_diffusers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import make_wan_transformer

    for case in foreign_wan.CONFIGS:
        assert foreign.apart(make_wan_transformer.tiny(case), GOLDEN["tiny"][case]) < 1e-5
    for name, config in foreign_wan.PUBLISHED.items():
        assert make_wan_transformer.names(config) == GOLDEN["published"][name]


@pytest.mark.parametrize("case", foreign_wan.CONFIGS)
def test_what_goes_out_is_the_same_model_to_diffusers(case, tmp_path):
    """In both formats: the authors' by way of diffusers' own converter."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")  # diffusers reads models of which some weights stay float32 with it
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    dit, params = tiny(case)
    given = {name: torch.from_numpy(array) for name, array in foreign_wan.inputs(case).items()}
    for form in FORMATS:
        tensors = weights.theirs(wan.pairs(dit, form), weights.of_tree(params))
        state = {t.name: torch.from_numpy(np.ascontiguousarray(next(iter(t.parts())))) for t in tensors}
        state = convert_wan_transformer_to_diffusers(state) if form == "original" else state
        if form == "diffusers":
            wan.save(tmp_path, dit, weights.of_tree(params), form, shard_bytes=100_000)
            model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
            assert model.state_dict().keys() == state.keys()
        else:
            model = diffusers.WanTransformer3DModel.from_config(wan.config_of(dit, "diffusers"))
            model.load_state_dict(state)
        with torch.no_grad():
            velocity = model(given["latent"], given["timestep"], given["text"], given.get("image")).sample
        assert error(velocity.numpy(), case, "velocity") < 1e-6
