# SPDX-License-Identifier: Apache-2.0
"""Programs give, where there is no stvdm, the numbers that it gives here."""

import json
import subprocess
import sys

import foreign
import foreign_wan
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from stvdm import checkpoint, sharding
from stvdm.interop import stablehlo, wan, wan_model
from stvdm.models import autoencoder3d
from stvdm.sampling.pipeline import Pipeline

ELSEWHERE = """
import json, sys
import numpy as np
from jax import export
from safetensors.numpy import load_file

folder, given, to = sys.argv[1:]
given, made = np.load(given), {}
for name, about in json.load(open(f"{folder}/programs.json"))["programs"].items():
    program = export.deserialize(bytearray(open(f"{folder}/{about['file']}", "rb").read()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    inputs = {key: made if key == "remembered" else given[f"{name}/{key}"] for key in about["inputs"]}
    weights = {key: value for file in about["weights"] for key, value in load_file(f"{folder}/{file}").items()}
    made = program.call(weights, **inputs)
    out = {key: value for key, value in zip(about["outputs"], made if isinstance(made, (tuple, list)) else (made,))}
    np.savez(f"{to}/{name}.npz", **{key: value for key, value in out.items() if key != "remembered"})
    made = out.get("remembered")
assert not [name for name in sys.modules if name.split(".")[0] in ("stvdm", "flax")]
"""


def elsewhere(folder, given, to):
    """What the programs of a folder make of {"program/input": array}, in a process that knows nothing of stvdm."""
    np.savez(to / "given.npz", **given)
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(folder), str(to / "given.npz"), str(to)], check=True)
    return {path.stem: np.load(path) for path in to.glob("*.npz") if path.stem != "given"}


def apart(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.sqrt(np.square(other).mean()))


def test_a_trained_model_runs_elsewhere(tiny_model, tmp_path):
    files = stablehlo.write(tiny_model, tmp_path / "out")
    names = "velocity.jax dit.safetensors text.jax text.safetensors"
    names += " decode_first.jax decoder.safetensors decode_next.jax programs.json example.py"
    assert sorted(files) == sorted(str(tmp_path / "out" / name) for name in names.split())
    said = json.loads((tmp_path / "out" / "programs.json").read_text())["programs"]
    remembered = said["decode_next"]["inputs"]["remembered"]
    assert remembered == said["decode_next"]["outputs"]["remembered"] and remembered
    assert said["decode_first"] == {
        "file": "decode_first.jax",
        "weights": ["decoder.safetensors"],
        "inputs": {"latent_B1hwz": "float32[B, 1, 4, 4, 4]"},
        "outputs": {"video_BTHWC": "float32[B, 1, 16, 16, 3]", "remembered": remembered},
    }
    here = Pipeline.load(tiny_model)
    random = np.random.default_rng(0)
    latent = random.normal(size=(3, 3, 4, 4, 4)).astype(np.float32)
    tokens, mask = (np.asarray(x) for x in here.words(["a red ball", "a blue square grows", ""]))
    text = random.normal(size=(3, 12, 8)).astype(np.float32)
    known = np.arange(12) < 4  # the first latent frame
    time = np.asarray([0.9, 0.5, 0.1], np.float32)
    given = {
        "text/tokens_BS": tokens.astype(np.int32),
        "text/mask_BS": mask,
        "velocity/latent_Bthwz": latent,
        "velocity/time_B": time,
        "velocity/known_BN": np.broadcast_to(known, (3, 12)),
        "velocity/text_BSE": text,
        "velocity/mask_BS": mask,
        "decode_first/latent_B1hwz": latent[:, :1],
        "decode_next/latent_B1hwz": latent[:, 1:2],
    }
    there = elsewhere(tmp_path / "out", given, tmp_path)
    assert apart(there["text"]["text_BSE"], here.models.read(here.params, tokens, mask)) < 1e-5
    times, levels = jnp.stack([time, 0 * time], axis=1), jnp.broadcast_to(known.astype(int), (3, 12))
    velocity = here.models.dit.apply({"params": here.params["dit"]}, latent, times, levels, text, mask)
    assert apart(there["velocity"]["velocity_Bthwz"], velocity) < 1e-5
    raw = autoencoder3d.denormalise(latent[:, :2], here.params["statistics"])
    video = here.autoencoder.apply({"params": here.params["autoencoder"]}, raw, method="decode")
    assert apart(there["decode_first"]["video_BTHWC"], video[:, :1]) < 1e-5
    assert apart(there["decode_next"]["video_BTHWC"], video[:, 1:]) < 1e-5


def test_the_example_samples_as_the_pipeline_does(tiny_model, tmp_path):
    stablehlo.write(tiny_model, tmp_path)
    command = [sys.executable, tmp_path / "example.py", "a red ball", "5"]
    subprocess.run(command, check=True, cwd=tmp_path)
    here = Pipeline.load(tiny_model).generate(["a red ball"], seed=5, sampler="euler")
    there = np.load(tmp_path / "clip.npy")
    assert there.shape == here.videos[0].shape and there.std() > 1
    assert np.abs(there.astype(int) - here.videos[0]).max() <= 1


def test_a_model_that_begins_with_an_image_has_no_example_of_sampling_without(tiny_model, tmp_path):
    params, about = checkpoint.load_model(tiny_model)
    kernel = params["dit"]["patch"]["linear"]["kernel"]
    params["dit"]["patch"]["linear"]["kernel"] = np.resize(kernel, (kernel.shape[0] // 4 * 10, kernel.shape[1]))
    about["config"]["model"]["extra_channels"] = 6  # a mask of 2 frames, and 4 of a latent
    checkpoint.save_model(tmp_path / "run", params, about)
    stablehlo.write(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "programs.json").read_text())["programs"]
    assert said["velocity"]["inputs"]["latent_Bthwz"] == "float32[B, 3, 4, 4, 10]"
    assert not (tmp_path / "out" / "example.py").exists()


@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_wan_runs_elsewhere(case, tmp_path, monkeypatch):
    source, (t, h, w) = tmp_path / "transformer", foreign_wan.GRID
    source.mkdir()
    save_file(foreign.weights(foreign_wan.golden()["tiny"][case]["shapes"]), source / "weights.safetensors")
    (source / "config.json").write_text(json.dumps(foreign_wan.CONFIGS[case]))
    with pytest.warns(UserWarning, match="no autoencoder comes with it"):
        wan_model.bring(source, tmp_path / "ours")
    monkeypatch.setattr(stablehlo, "_WAN_IMAGE", 7)
    monkeypatch.setattr(stablehlo, "_WAN_WORDS", 9)
    stablehlo.write(tmp_path / "ours", tmp_path / "out", size=(1 + 4 * (t - 1), 16 * h, 16 * w))
    dit, params = wan.load(source)
    inputs = foreign_wan.inputs(case)
    told = {
        "latent_Bthwz": np.moveaxis(inputs["latent"], 1, -1),
        "time_B": inputs["timestep"] / 1000,
        "known_BN": np.zeros((2, t * h * w), bool),
        "text_BSE": inputs["text"][:, :9],
    }
    image = {"image_BSE": inputs["image"]} if case == "i2v" else {}
    there = elsewhere(tmp_path / "out", {f"velocity/{key}": value for key, value in (told | image).items()}, tmp_path)
    times = told["time_B"][:, None]
    here = dit.apply({"params": params}, told["latent_Bthwz"], times, None, told["text_BSE"], **image)
    assert apart(there["velocity"]["velocity_Bthwz"], here) < 1e-5


def test_other_weights_may_take_the_place_of_some(tiny_model, tmp_path):
    params, _ = checkpoint.load_model(tiny_model)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params["dit"])
    stablehlo.write(tiny_model, tmp_path, params={"dit": doubled})
    programs = json.loads((tmp_path / "programs.json").read_text())["programs"]
    (found,) = (load_file(tmp_path / file) for file in programs["velocity"]["weights"])
    for name, leaf in traverse_util.flatten_dict({"dit": doubled}, sep="/").items():
        np.testing.assert_array_equal(found[name], leaf)
    (found,) = (load_file(tmp_path / file) for file in programs["text"]["weights"])
    for name, leaf in traverse_util.flatten_dict({"text": params["text"]}, sep="/").items():
        np.testing.assert_array_equal(found[name], leaf)


def test_of_two_networks_the_one_that_was_trained_says_which_it_is(tiny_model, tmp_path):
    params, about = checkpoint.load_model(tiny_model)
    settings = about["config"] | {"turn": "high_noise", "start_from": "both"}
    checkpoint.save_model(tmp_path / "run", params, about | {"config": settings})
    with pytest.warns(UserWarning, match="the one that was trained, for high_noise; the other is in both"):
        stablehlo.write(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "programs.json").read_text())["programs"]
    assert said.keys() == {"velocity_high_noise", "text", "decode_first", "decode_next"}
    assert not (tmp_path / "out" / "example.py").exists()


def test_weights_may_be_halves_and_come_in_several_files(tiny_model, tmp_path):
    stablehlo.write(tiny_model, tmp_path, dtype="bfloat16", shard_bytes=8_000)
    about = json.loads((tmp_path / "programs.json").read_text())["programs"]["velocity"]
    found = {name: leaf for file in about["weights"] for name, leaf in load_file(tmp_path / file).items()}
    params, _ = checkpoint.load_model(tiny_model)
    expected = traverse_util.flatten_dict({"dit": params["dit"]}, sep="/")
    assert len(about["weights"]) > 1 and found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf.astype(jnp.bfloat16))
    assert about["outputs"] == {"velocity_Bthwz": "float32[B, 3, 4, 4, 4]"}


def test_kernels_of_an_accelerator_stay_out(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cpu"):
        stablehlo.write(tiny_model, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="expected a model, found no model.safetensors"):
        stablehlo.write(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
