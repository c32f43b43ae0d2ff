# SPDX-License-Identifier: Apache-2.0
"""`stvdm import` and `stvdm export`: what comes in goes out as it was; what does not fit is refused."""

import json

import foreign
import foreign_wan
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stvdm import cli


@pytest.fixture
def published(tmp_path):
    """A folder as diffusers keeps a tiny Wan, every weight random."""
    folder = tmp_path / "wan" / "transformer"
    folder.mkdir(parents=True)
    save_file(foreign.weights(foreign_wan.golden()["tiny"]["t2v"]["shapes"]), folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(foreign_wan.CONFIGS["t2v"]))
    return folder


def test_weights_come_in_and_go_out_as_they_were(published, tmp_path, capsys, failure):
    assert cli.main(["import", f"--from={published.parent}", f"--to={tmp_path}/ours"]) == 0
    said = capsys.readouterr()
    assert "no autoencoder comes with it" in said.err
    assert json.loads(said.out)["transformers"]["dit"]["latent_channels"] > 0
    assert cli.main(["export", f"--from={tmp_path}/ours", f"--to={tmp_path}/back", "--format=diffusers"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/back/transformer\n"
    given = load_file(published / "weights.safetensors")
    written = load_file(tmp_path / "back" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert given.keys() == written.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor)
    again = ["export", f"--from={tmp_path}/ours", f"--to={tmp_path}/back", "--format=diffusers"]
    assert f"--to={tmp_path}/back: this is there already" in failure(*again)
    assert "there already" in failure("import", f"--from={published.parent}", f"--to={tmp_path}/ours")
    assert "there already" in failure(*again[:-1], "--format=stablehlo")
    assert cli.main([*again, "--overwrite"]) == 0


def test_weights_that_do_not_fit_are_one_error_and_nothing_is_written(published, tmp_path, failure):
    tensors = load_file(published / "weights.safetensors")
    tensors["strange"] = tensors.pop("proj_out.weight")
    save_file(tensors, published / "weights.safetensors")
    said = failure("import", f"--from={published.parent}", f"--to={tmp_path}/ours")
    assert "proj_out.weight" in said and "missing" in said and "strange" in said and "left over" in said
    assert not (tmp_path / "ours").exists()


def test_programs_of_any_model(tiny_model, tmp_path, capsys, failure):
    words = ["export", f"--from={tiny_model}", f"--to={tmp_path}/programs", "--format=stablehlo", "--clip=5x16x32"]
    assert cli.main(words) == 0
    assert f"{tmp_path}/programs/velocity.jax\n" in capsys.readouterr().out
    said = json.loads((tmp_path / "programs" / "programs.json").read_text())["programs"]["velocity"]
    assert said["outputs"] == {"velocity_Bthwz": "float32[B, 3, 4, 8, 4]"}
    assert "multiple" in failure(*words[:-1], "--clip=5x17x32", "--overwrite")
    assert "--clip" in failure(*words[:-2], "--clip=5x16x16")
    assert "no checkpoint here" in failure(*words[:2], f"--to={tmp_path}/raw", *words[3:], "--raw")
