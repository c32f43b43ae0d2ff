# SPDX-License-Identifier: Apache-2.0
"""Towers that read captions: whichever it is, captions become states of its last layer and a mask."""

import json
import shutil

import foreign
import foreign_wan_sampling
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stvdm import sharding
from stvdm.interop import towers

GOLDEN = foreign.golden()
CAPTIONS = ["a red ball", "on", ""]


def test_text_of_clip_is_its_last_layer_and_zero_at_padding(tmp_path):
    """From the file of both towers, of which one is left out."""
    save_file(foreign.weights(GOLDEN["clip"]["shapes"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**foreign.CLIP, "model_type": "clip"}))
    vocabulary, merges = foreign.byte_pairs()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    reader = towers.reader(tmp_path, max_tokens=19)
    with pytest.warns(UserWarning, match="23 tokens, and the model reads 19"):
        text_BSE, mask_BS = reader(foreign.CAPTIONS)
    np.testing.assert_array_equal(mask_BS, GOLDEN["clip"]["mask"])
    assert not np.asarray(text_BSE)[~mask_BS].any()
    shown = GOLDEN["clip"]["outputs"]["text_hidden_masked"]
    flat, real = np.asarray(text_BSE).ravel(), np.broadcast_to(mask_BS[..., None], text_BSE.shape).ravel()
    seen = {int(i): value for i, value in shown["values"].items() if real[int(i)]}
    assert len(seen) > 5
    np.testing.assert_allclose([flat[i] for i in seen], list(seen.values()), atol=1e-5 * shown["size"])
    with pytest.raises(ValueError, match="max_tokens=20: .* reads at most 19"):
        towers.reader(tmp_path, max_tokens=20)


def test_a_text_tower_alone_may_lack_the_first_word_of_its_names(tower, tmp_path):
    """As transformers 5 saves a ``CLIPTextModel``."""
    there = shutil.copytree(tower, tmp_path / "bare")
    bare = {name.removeprefix("text_model."): array for name, array in load_file(there / "model.safetensors").items()}
    save_file(bare, there / "model.safetensors")
    expected, found = (towers.reader(place, max_tokens=20)(CAPTIONS)[0] for place in (tower, there))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["umt5", "t5"])
def test_text_of_t5_is_its_last_layer_and_zero_at_padding(tmp_path, kind):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    save_file(foreign.weights(GOLDEN["t5"][kind]["shapes"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.T5_KINDS[kind]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN["t5_tokenizer"]["file"]))
    reader = towers.reader(tmp_path, max_tokens=12)
    text_BSE, mask_BS = reader(CAPTIONS)
    assert text_BSE.shape == (3, 12, 24) and mask_BS.sum(1).tolist() == [4, 4, 1]
    alone_BSE, _ = towers.reader(tmp_path, max_tokens=5)(CAPTIONS)  # padding changes nothing before it
    np.testing.assert_allclose(text_BSE[:, :5], alone_BSE, atol=1e-5)
    assert not np.asarray(text_BSE)[~mask_BS].any()


def test_a_tower_may_know_a_few_captions_alone(tower):
    reader = towers.reader(tower, max_tokens=20)
    known = reader.only(["", "on"])
    np.testing.assert_allclose(known(["on", "", "on"])[0], reader(["on", "", "on"])[0], atol=1e-6)
    np.testing.assert_array_equal(known(["on", ""])[1], reader(["on", ""])[1])
    with pytest.raises(ValueError, match="has let go of its weights, and knows but '', 'on'"):
        known(["off"])


def test_a_tower_that_is_split_over_a_mesh_reads_the_same(tower):
    reader = towers.reader(tower, max_tokens=20)
    mesh = sharding.make_mesh(fsdp=4, data=2)
    with jax.set_mesh(mesh):
        split = reader.on(mesh)
        kernel = split.params["layers"]["layer_0"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        np.testing.assert_allclose(split(CAPTIONS * 2)[0], reader(CAPTIONS * 2)[0], atol=1e-5)


def test_what_a_tower_is_follows_from_its_weights(tower, tmp_path):
    there = shutil.copytree(tower, tmp_path / "copy")
    assert towers.identity(there, max_tokens=20) == towers.identity(tower, max_tokens=20)
    assert towers.identity(there, max_tokens=21) != towers.identity(tower, max_tokens=20)
    weights = load_file(there / "model.safetensors")
    weights["text_model.final_layer_norm.bias"] = weights["text_model.final_layer_norm.bias"] + 1
    save_file(weights, there / "model.safetensors")
    assert towers.identity(there, max_tokens=20) != towers.identity(tower, max_tokens=20)


def image_tower(naming):
    """Tensors of the tiny CLIP's image tower under the names of a layout."""
    whole = foreign.weights(GOLDEN["clip"]["shapes"])
    alone = {name: array for name, array in whole.items() if name.startswith("vision_model")}
    if naming == "whole":
        return whole
    if naming == "alone":
        return alone
    bare = {name.removeprefix("vision_model."): array for name, array in alone.items()}
    if naming == "bare":
        return bare
    tensors = {"log_scale": np.ones(()), "textual.norm.weight": np.ones(3), "visual.head": np.ones((32, 20))}
    for name, array in bare.items():
        if "embedding" in name and not name.endswith("patch_embedding.weight"):
            array = array[None] if array.ndim == 2 else array[None, None]
        tensors[name] = array
    for i in range(2):
        for last in ("weight", "bias"):
            parts = [tensors.pop(f"encoder.layers.{i}.self_attn.{part}_proj.{last}") for part in "qkv"]
            tensors[f"visual.transformer.{i}.attn.to_qkv.{last}"] = np.concatenate(parts)
    words = {
        "embeddings.patch_embedding": "visual.patch_embedding",
        "embeddings.class_embedding": "visual.cls_embedding",
        "embeddings.position_embedding.weight": "visual.pos_embedding",
        "pre_layrnorm": "visual.pre_norm",
        "post_layernorm": "visual.post_norm",
        "encoder.layers": "visual.transformer",
        "self_attn.out_proj": "attn.proj",
        "layer_norm": "norm",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    renamed = {}
    for name, array in tensors.items():
        for theirs, authors in words.items():
            name = name.replace(theirs, authors) if not name.startswith("textual") else name
        renamed[name] = array
    return renamed


@pytest.mark.parametrize("naming", ["whole", "alone", "bare", "authors"])
def test_an_image_tower_gives_the_states_before_its_last_layer(tmp_path, naming):
    """What transformers gives is in wan_sampling.json, by diffusers' pipeline; it is the same tower in all layouts."""
    tensors = {name: np.ascontiguousarray(array) for name, array in image_tower(naming).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    if naming == "authors":
        looker = towers.looker(tmp_path / "a.safetensors")
        assert (looker.model.image_size, looker.model.activation) == (15, "gelu")
        looker = looker._replace(model=looker.model.clone(num_heads=4, activation="quick_gelu"))  # of the tiny one
    else:
        config = {**foreign.CLIP, "model_type": "clip"} if naming == "whole" else foreign.CLIP["vision_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        looker = towers.looker(tmp_path)
    tokens = looker([foreign_wan_sampling.image("i2v")])
    assert foreign.error(tokens, foreign_wan_sampling.golden()["runs"]["i2v"]["outputs"]["tokens"]) < 1e-5


def test_what_is_no_image_tower_is_refused(tmp_path):
    tensors = image_tower("authors")
    del tensors["visual.transformer.1.mlp.2.bias"]
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="layers/layer_1/mlp_out/bias"):
        towers.looker(tmp_path / "a.safetensors")


def test_other_towers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match="a tower of model_type 'bert', expected one of t5, umt5, clip, clip_text_model"
    ):
        towers.reader(tmp_path, max_tokens=20)
