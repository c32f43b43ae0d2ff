# SPDX-License-Identifier: Apache-2.0
"""CLIP against transformers on random weights; images prepared as the reference does; published sizes."""

import functools
import json

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.interop import judges, mapping, towers
from stvdm.models import clip

GOLDEN = foreign.golden()["clip"]
TOLERANCE = 1e-5  # of the size of the values, float32


@pytest.fixture(scope="module")
def tiny():
    model = towers.clip_of(foreign.CLIP)
    return model, mapping.into(towers.clip_shapes(model), foreign.weights(GOLDEN["shapes"]), towers.CLIP_RULES)


def test_both_towers_give_what_transformers_gives(tiny):
    model, params = tiny
    tokens, mask = np.asarray(GOLDEN["tokens"]), np.asarray(GOLDEN["mask"], bool)
    images = foreign.inputs("images", (3, 15, 15, 3))
    read, look = (jax.jit(functools.partial(model.apply, {"params": params}, method=how)) for how in ("read", "look"))
    text, masked, image = read(tokens), read(tokens, mask), look(images)
    found = {
        "text_embedding": text.embedding_BE,
        "text_hidden": text.hidden_BND,
        "text_layer_2": text.layers_BND[2],
        "text_hidden_masked": masked.hidden_BND,
        "image_embedding": image.embedding_BE,
        "image_hidden": image.hidden_BND,
        "image_layer_0": image.layers_BND[0],
        "logits": model.apply({"params": params}, tokens, images),
    }
    errors = {name: foreign.error(array, GOLDEN["outputs"][name]) for name, array in found.items()}
    assert errors.keys() == GOLDEN["outputs"].keys()
    assert max(errors.values()) < TOLERANCE, errors


def test_text_is_read_forwards_and_padding_does_not_count(tiny):
    model, params = tiny
    tokens = np.asarray(GOLDEN["tokens"])
    assert tokens[1].tolist() == [518] + [519] * 18  # the empty caption: start, end, padding
    other = tokens.copy()
    other[1, -1] = 5
    read = [model.apply({"params": params}, t, method="read") for t in (tokens, other)]
    np.testing.assert_array_equal(read[0].hidden_BND[:, :-1], read[1].hidden_BND[:, :-1])
    np.testing.assert_array_equal(read[0].embedding_BE, read[1].embedding_BE)
    assert np.abs(read[0].hidden_BND[1, -1] - read[1].hidden_BND[1, -1]).max() > 0.1


@pytest.mark.parametrize("name", GOLDEN["prepared"])
def test_images_are_prepared_as_the_reference_does(name):
    size = tuple(map(int, name.split("x")))
    made = clip.prepare([foreign.picture(*size)])
    assert made.dtype == np.float32
    assert foreign.error(made[0], GOLDEN["prepared"][name]) < 1e-6


@pytest.mark.parametrize(
    ("text", "image", "embedding", "millions"),
    [
        ({}, {}, 512, 151.277313),  # ViT-B/32
        (
            {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
            768,
            427.616513,  # ViT-L/14
        ),
    ],
)
def test_published_sizes(text, image, embedding, millions):
    model = towers.clip_of({"text_config": text, "vision_config": image, "projection_dim": embedding})
    assert foreign.num_parameters(towers.clip_shapes(model)) == round(millions * 1e6)


def test_published_size_of_the_tower_that_wan_looks_with():
    """ViT-H/14 without the way to the shared space, as in image_encoder/: 257 tokens of 1280."""
    huge = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=16, num_hidden_layers=32, patch_size=14)
    model = towers.clip_of({"vision_config": huge | {"hidden_act": "gelu"}}).image.clone(embedding=None)
    shapes = mapping.shapes_of(model, jnp.zeros((1, 224, 224, 3)))
    assert foreign.num_parameters(shapes) == 630_766_080
    seen = jax.eval_shape(lambda params: model.apply({"params": params}, jnp.zeros((1, 224, 224, 3))), shapes)
    assert seen.layers_BND[-2].shape == (1, 257, 1280)


def test_a_folder_is_read_whole(tmp_path, tiny):
    from safetensors.numpy import save_file

    model, params = tiny
    source = foreign.weights(GOLDEN["shapes"])
    names = sorted(source)
    save_file({name: source[name] for name in names[:50]}, tmp_path / "model-00001-of-00002.safetensors")
    numbers = {"text_model.embeddings.position_ids": np.arange(19)[None]}  # old files have them
    save_file({name: source[name] for name in names[50:]} | numbers, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.CLIP))
    vocabulary, merges = foreign.byte_pairs()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    read = judges.clip(tmp_path)
    assert read.model == model
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    with pytest.warns(UserWarning, match="23 tokens, and the model reads 19"):
        np.testing.assert_array_equal(read.tokenizer(foreign.CAPTIONS)[0], GOLDEN["tokens"])


def test_products_in_bfloat16_are_near(tiny):
    model, params = tiny
    images = foreign.inputs("images", (3, 15, 15, 3))
    near = model.image.clone(dtype="bfloat16").apply({"params": params["image"]}, images).embedding_BE
    assert near.dtype == jnp.float32
    assert 1e-5 < foreign.error(near, GOLDEN["outputs"]["image_embedding"]) < 0.05


def test_errors_teach(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="20 tokens: this tower reads at most max_tokens=19"):
        model.apply({"params": params}, np.zeros((1, 20), int), method="read")
    with pytest.raises(ValueError, match="images of 15x20: this tower looks at 15x15; `prepare` them"):
        model.apply({"params": params}, np.zeros((1, 15, 20, 3)), method="look")
    with pytest.raises(ValueError, match=r"type float64: expected bytes \(H, W, 3\)"):
        clip.prepare(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="activation='swish': expected one of gelu, gelu_tanh, quick_gelu"):
        model.image.clone(activation="swish").apply({"params": params["image"]}, np.zeros((1, 15, 15, 3)))


def test_the_golden_file_is_what_transformers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    assert foreign.apart(make_towers.clip(), GOLDEN) < 1e-5
