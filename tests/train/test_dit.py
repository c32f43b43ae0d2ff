# SPDX-License-Identifier: Apache-2.0
"""The transformer's trainer: resumed = uninterrupted, sharded = single, it can overfit, what it leaves samples."""

import json

import jax
import numpy as np
import pytest
import runs
from flax import traverse_util
from runs import losses_and_gradients

from stvdm import checkpoint, sharding
from stvdm import config as base
from stvdm.data import kinetic_shapes
from stvdm.data.loader import KineticShapes, make_loader
from stvdm.models import lora
from stvdm.sampling.pipeline import Pipeline
from stvdm.train import autoencoder, dit
from stvdm.train import state as state_lib
from stvdm.train.telemetry import Telemetry, read_metrics


def _losses(workdir):
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


def _digest(workdir):
    return json.loads((workdir / "model" / checkpoint.DESCRIPTION).read_text())["sha256"]


def test_resumed_equals_uninterrupted_bit_for_bit(dit_config, tmp_path, one_device):
    dit.main(dit_config(total_steps=4), tmp_path / "whole")
    dit.main(dit_config(total_steps=2), tmp_path / "parts")
    assert _digest(tmp_path / "parts") != _digest(tmp_path / "whole")
    dit.main(dit_config(total_steps=4), tmp_path / "parts")  # reads the checkpoint of step 2, and batch 3 comes next
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _digest(tmp_path / "parts") == _digest(tmp_path / "whole")


def test_a_run_refuses_to_go_on_with_other_data(dit_config, tmp_path, one_device):
    dit.main(dit_config(total_steps=1), tmp_path)
    with pytest.raises(ValueError, match="the data is not what step 1 was trained on"):
        dit.main(dit_config(total_steps=2, data__num_clips=65), tmp_path)


def test_an_autoencoder_that_is_not_there_is_named_by_its_key(tmp_path):
    with pytest.raises(FileNotFoundError, match="^autoencoder: .*nowhere: expected a model, found no such folder"):
        dit.load_autoencoder(tmp_path / "nowhere")


@pytest.mark.slow
def test_overfitting_goes_on_with_the_same_batch(dit_config, tmp_path, one_device):
    dit.main(dit_config(total_steps=2, overfit=True), tmp_path / "whole")
    for steps in (1, 2):
        dit.main(dit_config(total_steps=steps, overfit=True), tmp_path / "parts")
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "mesh",
    [pytest.param({}, marks=pytest.mark.slow), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, context=2)],
    ids=["data=8", "fsdp=4 tensor=2", "data=2 fsdp=2 context=2"],
)
def test_sharded_equals_single_device(mesh, dit_config, tmp_path, anywhere, single_device):
    settings = {f"mesh__{axis}": size for axis, size in mesh.items()}
    dit.main(dit_config(total_steps=3, **settings), tmp_path)
    np.testing.assert_allclose(losses_and_gradients(tmp_path), single_device, rtol=1e-4)


@pytest.fixture
def anywhere(monkeypatch):
    """Trainings start from random weights: with fresh ones three steps hardly see attention."""
    program = dit.program
    monkeypatch.setattr(dit, "program", lambda config, coder: runs.anywhere(program(config, coder)))


SINGLE = []  # what one device gives; made by the first test that asks


@pytest.fixture
def single_device(dit_config, tmp_path_factory, anywhere):
    from stvdm import sharding

    if not SINGLE:
        workdir = tmp_path_factory.mktemp("single")
        with pytest.MonkeyPatch.context() as patch:
            whole = sharding.make_mesh
            patch.setattr(sharding, "make_mesh", lambda **axes: whole(devices=jax.devices()[:1]))
            dit.main(dit_config(total_steps=3), workdir)
        SINGLE.append(losses_and_gradients(workdir))
    return SINGLE[0]


def test_it_overfits_one_batch_of_clips_and_exports_a_model_that_samples(dit_config, tmp_path, one_device):
    config = dit_config(total_steps=60, overfit=True, eval_every=60, eval_batches=1, optimizer__name="muon")
    config.optimizer.learning_rate = 2e-2
    dit.main(config, tmp_path)
    losses = _losses(tmp_path)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    held_out = [record for record in read_metrics(tmp_path) if "eval/velocity_mse" in record]
    assert held_out[-1]["step"] == 60
    assert (tmp_path / "previews" / "samples-00000060.png").exists()
    result = Pipeline.load(tmp_path).generate(["a blue square grows"], seed=3)
    assert result.videos.shape == (1, 5, 16, 16, 3)


def test_clips_images_and_sizes_train_together_in_buckets(dit_config, tmp_path, one_device):
    buckets = ((5, 16, 16, 8, 1.0), (1, 16, 16, 8, 1.0), (9, 16, 32, 8, 1.0))
    dit.main(dit_config(total_steps=6, data__buckets=buckets), tmp_path)
    assert len(_losses(tmp_path)) == 6
    assert np.isfinite(_losses(tmp_path)).all()


def test_a_change_since_the_checkpoint_is_said(dit_config, tmp_path, one_device, monkeypatch):
    dit.main(dit_config(total_steps=1), tmp_path)
    said = []
    monkeypatch.setattr(Telemetry, "say", lambda self, text: said.append(text))
    dit.main(dit_config(total_steps=1, flow__prediction="x0"), tmp_path)
    assert [line for line in said if line.startswith("changed")] == [
        "changed since the checkpoint: flow.prediction was 'velocity', is 'x0'"
    ]
    assert "goes on from step 1" in said


def test_the_vocabulary_is_of_clips_from_everywhere(dit_config, monkeypatch):
    monkeypatch.setattr(dit, "MAX_CAPTIONS", 4)
    worlds = [kinetic_shapes.World(colours=(colour,), num_things=(1.0,), held_out=0.0) for colour in ("red", "blue")]
    sources = [KineticShapes(num_clips=20, world=world) for world in worlds]
    batches = make_loader(sources, buckets=[(5, 8, 8, 4)], seed=0)
    assert {"red", "blue"} <= set(dit.words_of(dit_config(), None, None, batches))


def test_the_workdir_of_the_other_training_is_refused(dit_config, autoencoder_config, tmp_path, one_device):
    autoencoder.main(autoencoder_config(total_steps=1), tmp_path)
    with pytest.raises(ValueError, match="are of kind 'autoencoder': expected 'dit'"):
        dit.main(dit_config(total_steps=1), tmp_path)


def test_accumulation_takes_the_same_kind_of_step(dit_config, tmp_path, one_device):
    dit.main(dit_config(total_steps=2, optimizer__accumulate=4), tmp_path)
    assert np.isfinite(_losses(tmp_path)).all()


@pytest.mark.slow
def test_an_image_model_has_time_bolted_on(dit_config, tmp_path, one_device, monkeypatch):
    """A U-Net of frames is trained; then layers over time and nothing else, from its weights."""

    def config(**changes):
        made = dit_config(total_steps=2, **changes)
        model = base.unet().model
        model.update(width=16, num_heads=2, patch=(1, 2, 2), num_blocks=0, temporal=bool(made.start_from))
        with made.unlocked():
            made.model = model
        return made

    said = []
    monkeypatch.setattr(Telemetry, "say", lambda self, text: said.append(text))
    dit.main(config(), tmp_path / "images")
    dit.main(config(start_from=str(tmp_path / "images"), train_only="temporal|conv_out"), tmp_path / "clips")
    assert any(text.endswith("dit/middle_temporal, dit/up_0_0_temporal, dit/up_1_0_temporal") for text in said)
    images, clips = (checkpoint.load_model(tmp_path / name / "model")[0] for name in ("images", "clips"))
    images, clips = (traverse_util.flatten_dict(one, sep="/") for one in (images, clips))
    trained = {name for name in clips if name not in images or not np.array_equal(images[name], clips[name])}
    assert trained == {name for name in clips if "temporal" in name or name.startswith("dit/conv_out")}
    assert images.keys() < clips.keys()
    videos = Pipeline.load(tmp_path / "clips").generate(["a red ball bounces to the right"]).videos
    assert videos.shape == (1, 5, 16, 16, 3)


def test_where_a_training_may_start_from(dit_config, autoencoder_config, tiny_model, tmp_path, one_device):
    autoencoder.main(autoencoder_config(total_steps=1), tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="a model of kind 'autoencoder', expected 'dit'"):
        dit.main(dit_config(start_from=str(tmp_path / "autoencoder")), tmp_path / "a")
    of_another = dit_config(start_from=str(tiny_model), autoencoder=str(tmp_path / "autoencoder"))
    with pytest.raises(ValueError, match="on the latents of another autoencoder"):
        dit.main(of_another, tmp_path / "b")
    with pytest.raises(ValueError, match=r"text.words: 1 words, expected none, or the \d+ of the model"):
        dit.main(dit_config(start_from=str(tiny_model), text__words=("red",)), tmp_path / "c")


@pytest.mark.parametrize(
    ("text_path", "padding"), [("cross", "masked"), pytest.param("joint", "zeros", marks=pytest.mark.slow)]
)
def test_a_published_tower_reads_before_each_step_or_once_for_all(
    text_path, padding, tower_config, tower, tmp_path, one_device, monkeypatch
):
    monkeypatch.setattr(dit, "program", lambda config, coder, whole=dit.program: runs.anywhere(whole(config, coder)))
    settings = dict(text_path=text_path, padding=padding)
    dit.main(tower_config(stored=False, eval_every=2, eval_batches=1, **settings), tmp_path / "now")
    dit.main(tower_config(stored=True, **settings), tmp_path / "before")
    np.testing.assert_allclose(_losses(tmp_path / "now"), _losses(tmp_path / "before"), rtol=1e-5)
    assert (tmp_path / "now" / "previews").exists()

    params, _ = checkpoint.load_model(tmp_path / "now" / "model")
    assert params.keys() == {"autoencoder", "statistics", "dit"}  # the tower stays where it is
    made = Pipeline.load(tmp_path / "now")
    one, other = (made.generate([prompt], steps=2).latents for prompt in ("a red ball", "a blue ball"))
    assert np.abs(one - other).max() > 1e-3
    moved = tower.rename(tower.parent / "moved")
    try:
        with pytest.raises(FileNotFoundError, match="expected a folder of safetensors"):
            Pipeline.load(tmp_path / "now")
        again = Pipeline.load(tmp_path / "now", tower=moved).generate(["a red ball"], steps=2).latents
        np.testing.assert_array_equal(again, one)
    finally:
        moved.rename(tower)


@pytest.fixture
def lora_config(dit_config, tiny_model):
    """Adapters for a random model: with a fresh one their gradient would be zero."""

    def make(**changes):
        return dit_config(start_from=str(tiny_model), lora__rank=2, sample__previews=("a red ball",), **changes)

    return make


def test_adapters_are_trained_beside_weights_that_stay(lora_config, tiny_model, tmp_path, one_device):
    dit.main(lora_config(total_steps=3, eval_every=3, eval_batches=1, lora__scale=2.0), tmp_path / "whole")
    for steps in (2, 3):  # stopped, and gone on
        dit.main(lora_config(total_steps=steps, lora__scale=2.0), tmp_path / "parts")
    assert _digest(tmp_path / "parts") == _digest(tmp_path / "whole")
    trained, about = checkpoint.load_model(tmp_path / "whole" / "model")
    names = traverse_util.flatten_dict(trained, sep="/")
    assert about["kind"] == "lora" and about["base"] == str(tiny_model)
    assert all(name.startswith("dit/layers") and name.endswith(("/down", "/up")) for name in names)
    assert all(np.abs(leaf).max() > 0 for leaf in names.values())

    def made(*arguments, **options):
        return Pipeline.load(*arguments, **options).generate(["a red ball"], steps=2).latents

    tuned, plain = made(tmp_path / "whole"), made(tiny_model)
    several = made(tiny_model, adapters=[(tmp_path / "whole", 0.25), (tmp_path / "parts", 0.75)])
    np.testing.assert_allclose(several, tuned, atol=1e-4 * np.abs(tuned).max())
    none = made(tiny_model, adapters=[(tmp_path / "whole", 0.0)])
    np.testing.assert_allclose(none, plain, atol=1e-6 * np.abs(plain).max())
    assert np.abs(tuned - plain).max() > 1e-2 * np.abs(plain).max()

    base_params, description = checkpoint.load_model(tiny_model)
    merged = {**base_params, **lora.merged({"dit": base_params["dit"]}, [(trained, 1.0)])}
    checkpoint.save_model(tmp_path / "merged", merged, description)
    np.testing.assert_allclose(made(tmp_path / "merged"), tuned, atol=1e-4 * np.abs(tuned).max())


@pytest.mark.parametrize(
    "mesh", [pytest.param(dict(fsdp=4, tensor=2), marks=pytest.mark.slow), dict(data=2, fsdp=2, context=2)], ids=str
)
def test_adapters_that_are_split_train_as_whole_ones(mesh, lora_config, tmp_path, anywhere, monkeypatch):
    kept = []
    monkeypatch.setattr(
        state_lib, "to_save", lambda state, to_save=state_lib.to_save: kept.append(state) or to_save(state)
    )
    dit.main(lora_config(total_steps=3, **{f"mesh__{axis}": size for axis, size in mesh.items()}), tmp_path / "split")
    for leaf in jax.tree.leaves(kept[-1]):  # weights, averages and moments
        assert (
            leaf.ndim == 0 or np.prod(leaf.sharding.shard_shape(leaf.shape)) * (8 // mesh.get("data", 1)) == leaf.size
        )
    whole = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: whole(devices=jax.devices()[:1]))
    dit.main(lora_config(total_steps=3), tmp_path / "whole")
    np.testing.assert_allclose(
        losses_and_gradients(tmp_path / "split"), losses_and_gradients(tmp_path / "whole"), rtol=1e-4
    )


def test_adapters_of_another_model_or_without_one_are_refused(lora_config, dit_config, tmp_path, one_device):
    with pytest.raises(ValueError, match="start_from='': lora.rank=2 needs the folder of the model"):
        base.validate(dit_config(lora__rank=2))
    with pytest.raises(ValueError, match="train_only='mlp': with lora.rank=2 choose layers by lora.targets"):
        base.validate(lora_config(train_only="mlp"))
    with pytest.raises(ValueError, match="the model of this config is not the one in that folder; they differ in"):
        dit.main(lora_config(total_steps=1, model__mlp_width=48), tmp_path)
