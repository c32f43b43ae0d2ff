# SPDX-License-Identifier: Apache-2.0
"""T5's and UMT5's encoders against transformers on random weights; both layouts; published names, shapes and totals."""

import json
import re

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from stvdm.interop import mapping, towers
from stvdm.models import t5

GOLDEN = foreign.golden()
TOLERANCE = 1e-5  # of the size of the values, float32
TOKENS, MASK = foreign.t5_inputs()


def source_of(kind):
    return foreign.weights(GOLDEN["t5"][kind]["shapes"])


def tiny(kind):
    model = towers.t5_of(foreign.T5_KINDS[kind])
    return model, mapping.into(towers.t5_shapes(model), source_of(kind), towers.T5_RULES)


@pytest.mark.parametrize("kind", foreign.T5_KINDS)
def test_outputs_layers_and_gradients_are_those_of_transformers(kind):
    model, params = tiny(kind)
    probe = foreign.inputs("probe", (*TOKENS.shape, model.width))

    def score(params):
        read = model.apply({"params": params}, TOKENS, MASK)
        return (read.hidden_BND * MASK[..., None] * probe).sum(), read

    (_, read), gradient = jax.jit(jax.value_and_grad(score, has_aux=True))(params)
    found = {
        "hidden": read.hidden_BND,
        **{f"layer_{i}": read.layers_BND[i] for i in range(1, 1 + model.num_layers)},
        "gradient_words": gradient["words"],
        "gradient_distances": gradient["distances_0"],
        "hidden_unmasked": model.apply({"params": params}, TOKENS).hidden_BND,
    }
    expected = GOLDEN["t5"][kind]["outputs"]
    errors = {name: foreign.error(array, expected[name]) for name, array in found.items()}
    assert errors.keys() == expected.keys()
    assert max(errors.values()) < TOLERANCE, errors


def test_padding_does_not_count_behind_a_mask():
    model, params = tiny("umt5")
    other = np.where(MASK, TOKENS, 7)
    one, two = (model.apply({"params": params}, tokens, MASK).hidden_BND for tokens in (TOKENS, other))
    np.testing.assert_array_equal(one[MASK], two[MASK])
    assert np.abs(one[1] - model.apply({"params": params}, TOKENS).hidden_BND[1])[:9].max() > 0.1


@pytest.mark.parametrize("size", GOLDEN["t5_buckets"])
def test_distances_fall_into_the_buckets_of_the_reference(size):
    buckets = t5.distance_buckets(601, *map(int, size.split(",")))
    row = np.concatenate([buckets[-1], buckets[0, 1:]])  # keys before the last query, and behind the first
    np.testing.assert_array_equal(row, np.repeat(*np.transpose(GOLDEN["t5_buckets"][size])))


LAYER = r"encoder.block.(\d+).layer."
WAN_NAMES = (  # transformers' name, and that of Wan's authors
    ("shared.weight", "token_embedding.weight"),
    (LAYER + "0.SelfAttention.relative_attention_bias.weight", r"blocks.\1.pos_embedding.embedding.weight"),
    (LAYER + r"0.SelfAttention.(\w).weight", r"blocks.\1.attn.\2.weight"),
    (LAYER + "0.layer_norm.weight", r"blocks.\1.norm1.weight"),
    (LAYER + "1.layer_norm.weight", r"blocks.\1.norm2.weight"),
    (LAYER + "1.DenseReluDense.wi_0.weight", r"blocks.\1.ffn.gate.0.weight"),
    (LAYER + "1.DenseReluDense.wi_1.weight", r"blocks.\1.ffn.fc1.weight"),
    (LAYER + "1.DenseReluDense.wo.weight", r"blocks.\1.ffn.fc2.weight"),
    ("encoder.final_layer_norm.weight", "norm.weight"),
)


def in_wans_names(name):
    return next(match.expand(theirs) for ours, theirs in WAN_NAMES if (match := re.fullmatch(ours, name)))


@pytest.fixture
def tokenizer_file(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(GOLDEN["t5_tokenizer"]["file"]))
    return folder


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_of_diffusers_is_read_whole(tmp_path, tokenizer_file, again):
    from safetensors.numpy import save_file

    model, params = tiny("umt5")
    source = source_of("umt5")
    if again:  # some files have the table under both its names
        source["encoder.embed_tokens.weight"] = source["shared.weight"]
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save_file(source, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(foreign.T5_KINDS["umt5"]))
    read = towers.t5(folder, max_tokens=16)  # its tokenizer lies beside it
    assert read.model == model
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    with pytest.warns(UserWarning, match="22 tokens, and the model reads 16"):
        tokens, mask = read.tokenizer(foreign.CAPTIONS[::3])
    assert tokens.shape == mask.shape == (2, 16)


def test_the_file_of_wans_authors_needs_no_config(tmp_path, tokenizer_file):
    from safetensors.numpy import save_file

    model, params = tiny("umt5")
    save_file({in_wans_names(name): a for name, a in source_of("umt5").items()}, tmp_path / "umt5.safetensors")
    read = towers.t5(tmp_path / "umt5.safetensors", tokenizer=tokenizer_file)
    assert read.model == model.clone(max_distance=128)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    half = towers.t5(tmp_path / "umt5.safetensors", tokenizer=tokenizer_file, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    near = half.model.clone(max_distance=20).apply({"params": half.params}, TOKENS, MASK).hidden_BND
    assert near.dtype == jnp.float32
    assert 1e-5 < foreign.error(near, GOLDEN["t5"]["umt5"]["outputs"]["hidden"]) < 0.05


def test_a_decoder_is_left_out_and_an_unlike_table_is_not():
    model, params = tiny("t5")
    source = source_of("t5") | {"decoder.block.0.layer.0.layer_norm.weight": np.ones(24), "lm_head.weight": np.ones(3)}
    found = mapping.into(towers.t5_shapes(model), source, towers.T5_RULES)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    source["encoder.embed_tokens.weight"] = source["shared.weight"] + 1
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight: words has shared.weight already"):
        mapping.into(towers.t5_shapes(model), source, towers.T5_RULES)


@pytest.mark.parametrize("name", GOLDEN["t5_published"])
def test_published_names_shapes_and_totals(name):
    """By shapes alone, as 5.7 billion values would not fit: every name has its place, and no place stays empty."""
    golden = GOLDEN["t5_published"][name]
    theirs = golden["shapes"] | {
        one.replace(".block.1.", f".block.{i}."): shape
        for one, shape in golden["of_every_layer"].items()
        for i in range(1, golden["config"]["num_layers"])
    }
    assert len(theirs) == golden["num_tensors"]
    shapes = towers.t5_shapes(towers.t5_of(golden["config"]))
    wanted = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    found = {}
    for foreign_name, shape in theirs.items():
        path = next(p for p in mapping._spellings(mapping._renamed(foreign_name, towers.T5_RULES)) if p in wanted)
        found[path] = tuple(reversed(shape)) if path.endswith("kernel") else tuple(shape)
    assert found == wanted
    assert foreign.num_parameters(shapes) == golden["parameters"]


def test_errors_teach():
    model, params = tiny("t5")
    with pytest.raises(ValueError, match="activation='swish': expected one of gelu"):
        model.clone(activation="swish").apply({"params": params}, TOKENS)
    with pytest.raises(ValueError, match="tables='some': expected 'each' or 'first'"):
        model.clone(tables="some").apply({"params": params}, TOKENS)


def test_the_golden_file_is_what_transformers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    for kind in foreign.T5_KINDS:
        assert foreign.apart(make_towers.t5(kind), GOLDEN["t5"][kind]) < 1e-5
    for name in GOLDEN["t5_published"]:
        assert make_towers.t5_published(name) == GOLDEN["t5_published"][name]
    assert make_towers.t5_buckets() == GOLDEN["t5_buckets"]
