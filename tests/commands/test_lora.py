# SPDX-License-Identifier: Apache-2.0
"""What `stvdm lora` writes and refuses."""

import numpy as np
import pytest

from stvdm import checkpoint, cli
from stvdm.commands import parts
from stvdm.sampling import pipeline


def test_adapters_go_out_and_come_in_and_melt_into_weights(tiny_model, tmp_path, failure):
    import jax

    from stvdm.models import lora

    base, description = checkpoint.load_model(tiny_model)
    kernel = base["dit"]["layers"]["block_0"]["mlp_in"]["kernel"]
    rng = np.random.default_rng(0)
    halves = {
        "down": rng.normal(size=(*kernel.shape[:2], 3)).astype(np.float32),
        "up": rng.normal(size=(kernel.shape[0], 3, kernel.shape[2])).astype(np.float32),
    }
    trained = {"dit": {"layers": {"block_0": {"mlp_in": halves}}}}
    about = {name: description[name] for name in ("autoencoder", "config")}
    about |= {"kind": "lora", "base": str(tiny_model), "base_sha256": description["sha256"]}
    checkpoint.save_model(tmp_path / "run" / "model", trained, about)
    assert cli.main(["lora", "export", f"--from={tmp_path}/run", f"--to={tmp_path}/style.safetensors"]) == 0
    words = ["lora", "import", f"--from={tmp_path}/style.safetensors", f"--base={tiny_model}", f"--to={tmp_path}/back"]
    assert cli.main(words) == 0
    read, said = checkpoint.load_model(tmp_path / "back")
    assert said == about | {"sha256": said["sha256"]}
    jax.tree.map(np.testing.assert_array_equal, read, trained)
    words = ["lora", "merge", f"--base={tiny_model}", f"--lora={tmp_path}/back:0.5", f"--to={tmp_path}/merged"]
    assert cli.main(words) == 0
    merged, said = checkpoint.load_model(tmp_path / "merged")
    assert said["kind"] == "dit"
    expected = lora.merged({"dit": base["dit"]}, [(trained, 0.5)])
    jax.tree.map(np.testing.assert_array_equal, merged["dit"], expected["dit"])
    jax.tree.map(np.testing.assert_array_equal, merged["autoencoder"], base["autoencoder"])
    words = ["lora", "export", f"--from={tmp_path}/run", f"--to={tmp_path}/style.safetensors"]
    assert f"--to={tmp_path}/style.safetensors: this is there already" in failure(*words)
    assert cli.main([*words, "--overwrite"]) == 0
    words = ["lora", "import", f"--from={tmp_path}/style.safetensors", "--to=x"]
    assert "of kind 'lora', expected a whole one" in failure(*words, f"--base={tmp_path}/run")
    assert f"{tmp_path}: expected a model, found no" in failure(*words, f"--base={tmp_path}")
    assert "expected adapters, 'lora'" in failure("lora", "export", f"--from={tiny_model}", "--to=x")
    assert "--base and --lora missing" in failure("lora", "merge", "--to=x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("export --from=run --lora=run:0.8", "--lora=[('run', 0.8)]: without effect beside lora export"),
        ("import --from=a.safetensors --base=b --format=peft", "--format=peft: without effect beside lora import"),
        ("merge --base=b --lora=c --from=d", "--from=d: without effect beside lora merge"),
    ],
)
def test_options_of_another_action_are_refused(words, said, failure):
    assert said in failure("lora", *words.split(), "--to=x")


def test_a_weight_is_a_number(capsys):
    with pytest.raises(SystemExit):
        cli.main(["lora", "merge", "--base=b", "--lora=run:nan", "--to=x"])
    assert "'run:nan': expected a finite weight, e.g. run:0.8" in capsys.readouterr().err
    assert parts.weighted("gs://bucket/run") == ("gs://bucket/run", 1.0)
    assert parts.weighted("gs://bucket/run:-0.5") == ("gs://bucket/run", -0.5)


def test_what_was_merged_into_one_of_two_networks_is_a_whole_model(tiny_model, tmp_path):
    """The base being a run that trained one of them, whose other lies in the model that it started from."""
    params, about = checkpoint.load_model(tiny_model)
    dit = params.pop("dit")
    checkpoint.save_model(tmp_path / "both", {**params, "dit_high_noise": dit, "dit_low_noise": dit}, about)
    settings = about["config"] | {"turn": "high_noise", "start_from": str(tmp_path / "both")}
    checkpoint.save_model(tmp_path / "run", {**params, "dit": dit}, about | {"config": settings})
    kernel = dit["layers"]["block_0"]["mlp_in"]["kernel"]
    halves = {"down": np.ones((*kernel.shape[:2], 1), np.float32), "up": np.ones_like(kernel[:, :1])}
    of_high = about | {"kind": "lora", "base": "run", "network": "dit_high_noise"}
    checkpoint.save_model(tmp_path / "style", {"dit": {"layers": {"block_0": {"mlp_in": halves}}}}, of_high)
    words = [f"--base={tmp_path}/run", f"--lora={tmp_path}/style", f"--to={tmp_path}/merged"]
    assert cli.main(["lora", "merge", *words]) == 0
    merged, _ = pipeline.load_whole(tmp_path / "merged")
    found = {name: merged[name]["layers"]["block_0"]["mlp_in"]["kernel"] for name in merged if name.startswith("dit_")}
    np.testing.assert_allclose(found["dit_high_noise"], kernel + 1, atol=1e-6)
    np.testing.assert_array_equal(found["dit_low_noise"], kernel)
