# SPDX-License-Identifier: Apache-2.0
"""What `stvdm preprocess` writes and refuses."""

import numpy as np
import pytest
from flax import linen as nn

from stvdm import cli


def test_preprocess_writes_the_latents_that_the_autoencoder_makes(tmp_path, capsys):
    import jax

    from stvdm import checkpoint
    from stvdm.data import loader, records
    from stvdm.models.autoencoder3d import Autoencoder

    (tmp_path / "config.py").write_text(
        "from stvdm import config as base\n"
        "def get_config():\n"
        "    config = base.dit()\n"
        "    config.data.num_clips = 3\n"
        "    config.data.buckets = ((5, 16, 16, 8, 1.0),)\n"
        "    return config\n"
    )
    settings = {
        "latent_channels": 4,
        "width": 8,
        "multipliers": [1, 1],
        "num_res_blocks": 1,
        "spatial_down": [True],
        "temporal_down": [True],
        "middle_attention": False,
    }
    model = Autoencoder(**settings)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 5, 16, 16, 3), np.float32)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    checkpoint.save_model(
        tmp_path / "run" / "model", {"autoencoder": params}, {"kind": "autoencoder", "autoencoder": settings}
    )
    words = ["preprocess", f"--config={tmp_path}/config.py", f"--out={tmp_path}/latents", "--batch=2"]
    assert cli.main([*words, f"--checkpoint={tmp_path}/run", "--config.seed=3"]) == 0
    assert "encoding 3/3" in capsys.readouterr().err

    source = loader.open_source("kinetic_shapes", num_clips=3, seed=3)
    written = records.RecordSource(tmp_path / "latents")
    assert len(written) == 3
    latents = {written.read(i)["caption"]: written.read(i)["latent"] for i in range(3)}
    clips = [source.read(i, num_frames=5, height=16, width=16, rng=np.random.default_rng(0)) for i in range(3)]
    videos = np.stack([clip["video"] for clip in clips]).astype(np.float32) / 127.5 - 1
    means, _ = jax.jit(lambda video: model.apply({"params": params}, video, method="encode"))(videos)
    for clip, mean in zip(clips, means, strict=True):
        np.testing.assert_allclose(latents[clip["caption"]], mean, rtol=1e-2, atol=1e-2)


def test_preprocess_without_an_autoencoder_is_refused(config_file, failure):
    error = failure("preprocess", f"--config={config_file}:autoencoder", "--out=latents")
    assert "expected the folder of a trained autoencoder" in error


def test_preprocess_takes_the_autoencoder_of_the_config(config_file, failure):
    assert "runs/ae: expected an exported model" in failure("preprocess", f"--config={config_file}", "--out=latents")


def test_hosts_are_counted_from_0(config_file, capsys):
    for said in ("2/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            cli.main(["preprocess", f"--config={config_file}", "--out=latents", f"--host={said}"])
        assert f"{said!r}: expected I/N with I from 0 to N - 1, e.g. 0/4" in capsys.readouterr().err
