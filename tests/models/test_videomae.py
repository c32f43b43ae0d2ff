# SPDX-License-Identifier: Apache-2.0
"""VideoMAE against transformers on random weights, in both published layouts; its preparation; its published sizes."""

import json

import foreign
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm.interop import judges, mapping
from stvdm.models import videomae

GOLDEN = foreign.golden()["videomae"]
TOLERANCE = 1e-5  # of the size of the values, float32
VIDEOS = foreign.inputs("videos", (2, 4, 15, 15, 3))


def applied(model, params):
    return jax.jit(model.apply)({"params": params}, VIDEOS)


def test_hidden_states_and_features_are_those_of_transformers(tmp_path):
    save_file(foreign.weights(GOLDEN["shapes"]), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"expected the config.json of VideoMAE"):
        judges.videomae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(foreign.VIDEOMAE))
    seen = applied(*judges.videomae(tmp_path))
    assert foreign.error(seen.hidden_BND, GOLDEN["outputs"]["hidden"]) < TOLERANCE
    assert foreign.error(seen.features_BD, GOLDEN["outputs"]["features"]) < TOLERANCE


def test_published_files_have_other_names_for_two_biases(tmp_path):
    """As transformers saved them before its version 5, and reads them still."""
    source = foreign.weights(GOLDEN["shapes"])
    before = {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): a for name, a in source.items()}
    assert before.keys() != source.keys()
    save_file(before, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.VIDEOMAE))
    seen = applied(*judges.videomae(tmp_path))
    assert foreign.error(seen.features_BD, GOLDEN["outputs"]["features"]) < TOLERANCE


def test_the_encoder_alone_has_its_norm_before_the_mean(tmp_path):
    save_file(foreign.weights(GOLDEN["shapes_norm_first"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.VIDEOMAE))
    seen = applied(*judges.videomae(tmp_path))
    assert foreign.error(seen.hidden_BND, GOLDEN["outputs"]["hidden_norm_first"]) < TOLERANCE
    np.testing.assert_allclose(seen.features_BD, seen.hidden_BND.mean(1), rtol=1e-5, atol=1e-6)


def test_the_layout_of_its_authors_gives_the_same(tmp_path):
    source = foreign.weights(GOLDEN["shapes"])
    theirs = {
        "patch_embed.proj.weight": source["videomae.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": source["videomae.embeddings.patch_embeddings.projection.bias"],
        **{f"fc_norm.{part}": source[f"fc_norm.{part}"] for part in ("weight", "bias")},
        **{f"head.{part}": source[f"classifier.{part}"] for part in ("weight", "bias")},
    }
    for i in range(3):
        layer, block = f"videomae.encoder.layer.{i}.", f"blocks.{i}."
        attention = layer + "attention.attention."
        kernels = [source[f"{attention}{name}.weight"] for name in ("query", "key", "value")]
        theirs[block + "attn.qkv.weight"] = np.concatenate(kernels)
        theirs[block + "attn.q_bias"] = source[attention + "query.bias"]
        theirs[block + "attn.v_bias"] = source[attention + "value.bias"]
        for name, path in {
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
        }.items():
            theirs |= {f"{block}{name}.{part}": source[f"{layer}{path}.{part}"] for part in ("weight", "bias")}
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_frames": 4, "image_size": 15, "num_attention_heads": 4}))
    model, params = judges.videomae(tmp_path)
    assert (model.width, model.num_layers, model.mlp_width, model.patch, model.epsilon) == (32, 3, 72, 5, 1e-6)
    assert foreign.error(applied(model, params).features_BD, GOLDEN["outputs"]["features"]) < 1e-4  # another epsilon


def test_a_network_that_was_not_tuned_is_refused(tmp_path):
    source = {name: array for name, array in foreign.weights(GOLDEN["shapes"]).items() if "fc_norm" not in name}
    save_file(source, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.VIDEOMAE))
    with pytest.raises(ValueError, match=r"has no last norm, .* use a tuned one"):
        judges.videomae(tmp_path)


def test_clips_are_prepared_as_the_published_distance_does():
    clip = np.stack([foreign.picture(20, 31)] * 3)[None]
    made = videomae.prepare(clip, num_frames=2, size=24)
    assert foreign.error(made, GOLDEN["prepared"]) < 1e-5
    with pytest.raises(ValueError, match="clips of 3 frames: VideoMAE looks at 16"):
        videomae.prepare(clip)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({}, 86.227200),  # ViT-B
        (dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), 303.883264),
        (
            dict(
                hidden_size=1408, num_hidden_layers=40, num_attention_heads=16, intermediate_size=6144, patch_size=14
            ),  # ViT-g of v2
            1011.594880,
        ),
    ],
)
def test_published_sizes(config, millions):
    shapes = judges.videomae_shapes(judges.videomae_of(config, norm_first=True))
    width, layers, mlp = (
        config.get(k, d) for k, d in (("hidden_size", 768), ("num_hidden_layers", 12), ("intermediate_size", 3072))
    )
    patch = 3 * 2 * config.get("patch_size", 16) ** 2
    layer = 4 * width**2 + 3 * width + 2 * width * mlp + mlp + width + 4 * width
    assert foreign.num_parameters(shapes) == patch * width + width + layers * layer + 2 * width
    assert foreign.num_parameters(shapes) == pytest.approx(millions * 1e6, rel=2e-3)


def test_errors_teach():
    model = judges.videomae_of(foreign.VIDEOMAE, norm_first=False)
    params = mapping.into(judges.videomae_shapes(model), foreign.weights(GOLDEN["shapes"]), judges.VIDEOMAE_RULES)
    with pytest.raises(ValueError, match=r"=\(3, 15, 15\): expected \(4, 15, 15\); `prepare` them"):
        model.apply({"params": params}, VIDEOS[:, :3])


def test_the_golden_file_is_what_transformers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    assert foreign.apart(make_towers.videomae(), GOLDEN) < 1e-5
