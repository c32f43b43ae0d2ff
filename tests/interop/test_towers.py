# SPDX-License-Identifier: Apache-2.0
"""Towers that read captions: whichever it is, captions become states of its last layer and a mask."""

import json
import shutil

import foreign
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


def test_other_towers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match="a tower of model_type 'bert', expected one of t5, umt5, clip, clip_text_model"
    ):
        towers.reader(tmp_path, max_tokens=20)
