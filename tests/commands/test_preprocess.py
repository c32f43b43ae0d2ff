# SPDX-License-Identifier: Apache-2.0
"""What `stvdm preprocess` writes and refuses."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import linen as nn

from stvdm import checkpoint, cli, preprocess
from stvdm.data import loader, records
from stvdm.models.autoencoder3d import Autoencoder


@pytest.fixture
def made(tmp_path):
    """The words that make latents of three clips with an autoencoder whose weights are random, and that one."""
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
    words = ["preprocess", f"--config={tmp_path}/config.py", "--batch=2", f"--checkpoint={tmp_path}/run"]
    return [*words, "--config.seed=3"], model, params


def latents_in(folder):
    """By caption, of which no two are the same here."""
    written = records.RecordSource(folder)
    return {written.read(i)["caption"]: written.read(i)["latent"] for i in range(len(written))}


def test_preprocess_writes_the_latents_that_the_autoencoder_makes(made, tmp_path, capsys):
    words, model, params = made
    assert cli.main([*words, f"--out={tmp_path}/latents"]) == 0
    said = capsys.readouterr()
    assert "encoding 3/3" in said.err and said.out == f"3 latents in {tmp_path}/latents\n"

    source = loader.KineticShapes(num_clips=3, seed=3)
    latents = latents_in(tmp_path / "latents")
    assert len(latents) == 3
    clips = [source.read(i, num_frames=5, height=16, width=16, rng=np.random.default_rng(0)) for i in range(3)]
    videos = np.stack([clip["video"] for clip in clips]).astype(np.float32) / 127.5 - 1
    means, _ = jax.jit(lambda video: model.apply({"params": params}, video, method="encode"))(videos)
    for clip, mean in zip(clips, means, strict=True):
        np.testing.assert_allclose(latents[clip["caption"]], mean, rtol=1e-2, atol=1e-2)


def test_a_config_is_refused_for_what_latents_are_made_by(made, tmp_path, failure):
    words, begun = [*made[0], f"--out={tmp_path}/latents"], tmp_path / "latents"
    error = failure(*words, "--config.data.fps=nan", "--config.seed=-1", "--config.optimizer.learning_rate=0.0")
    assert "this config cannot run" in error and "- data.fps=nan: " in error and "- seed=-1: " in error
    assert "learning_rate" not in error and "autoencoder=''" not in error
    assert not begun.exists()


def test_all_devices_of_a_host_encode_and_make_what_one_makes(made, tmp_path, monkeypatch):
    words, whole, where = made[0], preprocess.preprocess, []

    def watched(encode, *args, **settings):
        def seen(video_BTHWC):
            latent_Bthwz = encode(video_BTHWC)
            where.append((len(latent_Bthwz), len({str(shard.index) for shard in latent_Bthwz.addressable_shards})))
            return latent_Bthwz

        return whole(seen, *args, **settings)

    monkeypatch.setattr(preprocess, "preprocess", watched)
    assert cli.main([*words, f"--out={tmp_path}/eight"]) == 0
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert cli.main([*words, f"--out={tmp_path}/one"]) == 0
    assert where == [(8, 8), (2, 1), (2, 1)]  # clips of a call, each on a device of its own; --batch=2 on one
    eight, one = latents_in(tmp_path / "eight"), latents_in(tmp_path / "one")
    assert eight.keys() == one.keys() and len(one) == 3
    for caption, latent in one.items():
        np.testing.assert_allclose(eight[caption], latent, rtol=1e-3, atol=1e-3)  # stored in float16


@pytest.mark.slow
def test_each_process_of_a_job_finds_its_share(made, tmp_path):
    """As on the workers of a slice: all are given the same words; whoever is first waits for the others."""
    words = [*made[0], "--config.data.num_clips=520"]  # two shards
    command = [sys.executable, "-m", "stvdm.cli", *words]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    alone = [*command, "--host=auto", f"--out={tmp_path}/alone"]
    subprocess.run(alone, env=environment, check=True, capture_output=True)
    supervised = [sys.executable, "-m", "stvdm.cli", "supervise", "--processes=2", "--max-failures=1", "--"]
    shared = [*supervised, *command, "--host=auto", f"--out={tmp_path}/shared"]
    run = subprocess.run(shared, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("520 latents in ") == 2  # both say what there is in the end
    assert "encoding 512/520" in run.stderr or "encoding 520/520" in run.stderr
    whole, parts = (records.read_metadata(tmp_path / name) for name in ("alone", "shared"))
    assert len(whole["shards"]) == 2 and parts == whole  # the same bytes, by their fingerprint
    assert not list((tmp_path / "shared").glob("*.unfinished"))


def test_a_host_that_waits_says_for_what(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # of two, and there is one shard, which is of the other
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert cli.main([*made[0], "--host=auto", f"--out={tmp_path}/latents"]) == 130
    assert f"waiting for the shards of the other hosts, which are to write to this one's {tmp_path}/latents" in (
        capsys.readouterr().err
    )


def test_preprocess_without_an_autoencoder_is_refused(config_file, failure):
    error = failure("preprocess", f"--config={config_file}:autoencoder", "--out=latents")
    assert "expected the folder of a trained autoencoder" in error


def test_preprocess_takes_the_autoencoder_of_the_config(config_file, failure):
    assert "runs/ae: expected a model, found no such folder" in failure(
        "preprocess", f"--config={config_file}", "--out=latents"
    )


def test_hosts_are_counted_from_0(config_file, capsys):
    for said in ("2/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            cli.main(["preprocess", f"--config={config_file}", "--out=latents", f"--host={said}"])
        assert f"{said!r}: expected I/N with I from 0 to N - 1, e.g. 0/4, or auto" in capsys.readouterr().err
