# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's trainer: resumed = uninterrupted, sharded = single, it learns, and real coded files feed it."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from stvdm import checkpoint, sharding
from stvdm.train import autoencoder
from stvdm.train.telemetry import read_metrics


def _losses(workdir):
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


def _digest(workdir):
    return json.loads((workdir / "model" / checkpoint.DESCRIPTION).read_text())["sha256"]


def test_resumed_equals_uninterrupted_bit_for_bit(autoencoder_config, tmp_path, one_device):
    autoencoder.main(autoencoder_config(total_steps=4), tmp_path / "whole")
    autoencoder.main(autoencoder_config(total_steps=2), tmp_path / "parts")
    assert _digest(tmp_path / "parts") != _digest(tmp_path / "whole")
    autoencoder.main(autoencoder_config(total_steps=4), tmp_path / "parts")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _digest(tmp_path / "parts") == _digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(dict(data=8), marks=pytest.mark.slow), dict(data=1, fsdp=2, context=2, tensor=2)],
    ids=["examples", "borders"],
)
def test_sharded_equals_single_device(autoencoder_config, tmp_path, mesh):
    config = autoencoder_config(total_steps=3)
    config.mesh.update(mesh)
    autoencoder.main(config, tmp_path / "eight")
    with pytest.MonkeyPatch.context() as patch:
        whole = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda **axes: whole(**axes, devices=jax.devices()[:1]))
        autoencoder.main(autoencoder_config(total_steps=3), tmp_path / "one")
    np.testing.assert_allclose(_losses(tmp_path / "eight"), _losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("convolution", ["full", "separable"])
@pytest.mark.parametrize("mesh", [dict(data=2, context=4), dict(data=1, fsdp=2, context=2, tensor=2)], ids=str)
def test_every_gradient_on_a_mesh_is_that_of_one_device(autoencoder_config, mesh, convolution):
    whole = dict(model__convolution=convolution, model__shortcuts=True, model__middle_attention=True)
    config = autoencoder_config(loss__perceptual=0.1, loss__adversarial=0.1, **whole)
    run = runs.anywhere(autoencoder.program(config))
    params, key = run.init(), jax.random.key(3)
    video = np.random.default_rng(5).integers(0, 256, (8, 5, 16, 16, 3), np.uint8)

    def gradients(mesh):
        with jax.set_mesh(mesh):
            batch = {"video": jax.device_put(video, sharding.batch_sharding(mesh))}
            here = jax.device_put(params, sharding.replicated(mesh))
            return jax.device_get(jax.jit(jax.value_and_grad(run.loss, has_aux=True))(here, batch, key))

    expected = gradients(sharding.make_mesh(devices=jax.devices()[:1]))
    found = gradients(sharding.make_mesh(**mesh))
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
    for (path, there), here in zip(
        jax.tree_util.tree_leaves_with_path(expected[1]), jax.tree.leaves(found[1]), strict=True
    ):
        scale = np.abs(there).max()
        assert scale > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(here, there, atol=2e-4 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_a_step_that_is_not_finite_is_skipped(autoencoder_config, tmp_path, one_device, monkeypatch):
    program = autoencoder.program

    def poisoned(config):
        run = program(config)

        def step(state, batch):
            video = jnp.where(state.step == 2, jnp.nan, batch["video"].astype(jnp.float32))
            return run.step(state, {**batch, "video": video})

        return run._replace(step=step)

    monkeypatch.setattr(autoencoder, "program", poisoned)
    autoencoder.main(autoencoder_config(total_steps=6), tmp_path)
    assert [record["num_skipped"] for record in read_metrics(tmp_path) if "loss" in record] == [0, 0, 1, 1, 1, 1]
    losses = _losses(tmp_path)
    assert losses[2] is None and np.isfinite(losses[:2] + losses[3:]).all()
    params, _ = checkpoint.load_model(tmp_path / "model")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_it_overfits_one_batch_and_reports_on_held_out_clips(autoencoder_config, tmp_path, one_device):
    config = autoencoder_config(total_steps=40, overfit=True, eval_every=40, eval_batches=1, optimizer__name="muon")
    config.optimizer.learning_rate = 2e-2
    autoencoder.main(config, tmp_path)
    assert np.mean(_losses(tmp_path)[-5:]) < 0.6 * _losses(tmp_path)[0]
    report = [record for record in read_metrics(tmp_path) if "eval/psnr" in record][-1]
    assert {"eval/psnr", "eval/ssim", "eval/excess_flicker"} <= report.keys()
    assert (tmp_path / "previews" / "reconstruction-00000040.png").exists()
    params, description = checkpoint.load_model(tmp_path / "model")
    assert description["kind"] == "autoencoder"
    assert params["statistics"]["std_z"].shape == (4,)
    assert (params["statistics"]["std_z"] > 0).all()


def test_clips_and_images_train_and_are_scored_together(autoencoder_config, tmp_path, one_device):
    buckets = ((5, 16, 16, 8, 1.0), (1, 16, 16, 8, 1.0))
    autoencoder.main(autoencoder_config(total_steps=2, data__buckets=buckets, eval_every=2, eval_batches=2), tmp_path)
    report = [record for record in read_metrics(tmp_path) if "eval/psnr" in record][-1]
    assert np.isfinite([report["eval/psnr"], report["eval/excess_flicker"]]).all()


def test_real_coded_files_feed_it_and_bad_ones_are_named(autoencoder_config, tmp_path, one_device):
    """h264, hevc, vp9, av1, mjpeg ...; odd sizes, rotated, variable rate; truncated, empty, not a video at all."""
    path = pathlib.Path(__file__).parent.parent / "data" / "coded_files.py"
    specification = importlib.util.spec_from_file_location("coded_files", path)
    coded_files = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(coded_files)
    coded_files.make_folder(tmp_path / "clips")
    config = autoencoder_config(total_steps=20, data__source="folder", data__path=str(tmp_path / "clips"))
    autoencoder.main(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert np.isfinite(_losses(tmp_path / "run")).all()
    assert len(_losses(tmp_path / "run")) == 20
    assert report["num_used"] >= 12
    for name, reason in (("truncated.mp4", "truncated"), ("empty.mp4", "empty file"), ("text.mp4", "not a video")):
        assert reason in report["skipped"][name]


@pytest.mark.slow
def test_critics_join_by_config_and_the_discriminator_learns_too(autoencoder_config, tmp_path, one_device):
    config = autoencoder_config(total_steps=3, loss__perceptual=0.1, loss__adversarial=0.1, loss__adversarial_start=1)
    autoencoder.main(config, tmp_path)
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert all(np.isfinite([record[name] for name in ("perceptual", "discriminator")]).all() for record in records)
    assert records[0]["discriminator"] != records[-1]["discriminator"]
    params, _ = checkpoint.load_model(tmp_path / "model")
    assert params.keys() == {"autoencoder", "statistics"}  # critics are not part of the model
