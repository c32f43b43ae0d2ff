# SPDX-License-Identifier: Apache-2.0
"""What `stvdm lora` writes and refuses."""

import numpy as np

from stvdm import cli


def test_adapters_go_out_and_come_in_and_melt_into_weights(tiny_model, tmp_path, failure):
    import jax

    from stvdm import checkpoint
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
