# SPDX-License-Identifier: Apache-2.0
"""Training of networks that begin with an image: they are given what sampling gives them, and learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import anywhere
from safetensors.numpy import save_file

from stvdm import checkpoint, preprocess, sharding
from stvdm import config as base
from stvdm.data import loader
from stvdm.interop import towers
from stvdm.sampling import first_frame, pipeline
from stvdm.sampling.denoising import HIGH, LOW
from stvdm.sampling.pipeline import Pipeline
from stvdm.train import batches, dit
from stvdm.train import state as state_lib
from stvdm.train.telemetry import read_metrics

CHANNELS = {"model__extra_channels": 6}  # a mask of 2, and the 4 of the tiny autoencoder's latent
KINDS = {  # as Wan's are
    "i2v": {**CHANNELS, "model__image_width": 32, "image__tower_dtype": "float32"},
    "i2v-a14b": CHANNELS,
    "ti2v": {"image__share": 1.0},
}


def _losses(workdir):
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


@pytest.fixture
def image_config(dit_config, image_tower):
    def make(kind, **changes):
        tower = {"image__tower": str(image_tower)} if kind == "i2v" else {}
        return dit_config(**{**KINDS[kind], **tower, **changes})

    return make


@pytest.fixture
def stored(tiny_model, image_tower, tmp_path):
    """Writes latents of 64 clips, with what a network of a kind takes of their first frames."""
    params, description = checkpoint.load_model(tiny_model)
    coder = pipeline.autoencoder_of(description["autoencoder"])
    encode = jax.jit(lambda video: coder.apply({"params": params["autoencoder"]}, video, method="encode")[0])

    def make(kind, clips):
        """The settings of a config that reads them; ``clips`` becomes their videos, by the bytes of their latents."""

        def noted(video):
            latent = np.asarray(encode(pipeline.to_model_range(video)))
            clips.update({one.tobytes(): clip for one, clip in zip(latent, video, strict=True)})
            return latent

        def begin(video):
            return encode(first_frame.followed_by_grey(pipeline.to_model_range(video), video.shape[1]))

        folder, has_tower = tmp_path / f"latents_{kind}", kind == "i2v"
        preprocess.preprocess(
            noted,
            loader.KineticShapes(num_clips=64),
            folder,
            buckets=[(5, 16, 16)],
            begin=None if kind == "ti2v" else begin,
            look=towers.looker(image_tower) if has_tower else None,
            about={"image": towers.identity(image_tower)} if has_tower else {},
            dtype="float32",
        )
        return {"data__source": "latents", "data__path": str(folder)}

    return make


@pytest.mark.parametrize("ready", [False, True], ids=["videos", "latents"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_given_what_sampling_gives_for_the_clips_own_first_frame(
    kind, ready, image_config, stored, tiny_model, one_device
):
    clips = {}
    config = base.validate(image_config(kind, **(stored(kind, clips) if ready else {})))
    mesh = sharding.make_mesh(**config.mesh)
    params, description = checkpoint.load_model(tiny_model)
    coder = pipeline.autoencoder_of(description["autoencoder"])
    rows = state_lib.open_batches(config, mesh)[0].batch_at(0)
    with jax.set_mesh(mesh):
        arrays = {name: rows[name] for name in ("video", "latent") if name in rows}
        batch = {**arrays, **batches.images_reader(config, mesh)(rows), "tokens": None, "mask": None}
        ours = batches.beginning(config, jax.jit(batches.batch_reader(config, coder))(params, batch))
    assert sum(part is not None for part in ours) == {"i2v": 2, "i2v-a14b": 1, "ti2v": 1}[kind]

    settings = {**config.to_dict(), "text": description["config"]["text"]}
    made = Pipeline.of(params, {**description, "config": settings}, looker=pipeline.looker_of(settings))
    videos = [clips[latent.tobytes()] for latent in rows["latent"]] if ready else rows["video"]
    for i in range(3):
        theirs = made._given(videos[i][0], (5, 16, 16), 1)
        for name in ("extra_Bthwz", "image_BSE", "known_B1hwz"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            assert (found is None) == (expected is None), name
            if found is not None:
                np.testing.assert_allclose(found[i], expected[0], atol=2e-6 * float(jnp.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_overfits_one_batch_and_what_it_leaves_makes_clips_from_images(kind, image_config, tmp_path, one_device):
    config = image_config(kind, total_steps=40, overfit=True, eval_every=40, eval_batches=1, optimizer__name="muon")
    config.optimizer.learning_rate = 2e-2
    dit.main(config, tmp_path)
    losses = _losses(tmp_path)
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert (tmp_path / "previews" / "samples-00000040.png").exists()
    made = Pipeline.load(tmp_path)
    one, other = (
        made.generate(["a blue square grows"], seed=3, image=np.full((16, 16, 3), grey, np.uint8)).latents
        for grey in (40, 220)
    )
    assert np.abs(one - other).max() > 1e-2
    if kind != "ti2v":
        with pytest.raises(ValueError, match="begin with an image: give one"):
            made.generate(["a blue square grows"])


@pytest.mark.parametrize("kind", ["i2v", pytest.param("ti2v", marks=pytest.mark.slow)])
def test_adapters_are_trained_on_what_lies_beside_latents(kind, image_config, stored, tmp_path, one_device):
    ready = stored(kind, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "program", lambda config, coder, whole=dit.program: anywhere(whole(config, coder)))
        dit.main(image_config(kind, total_steps=1, **ready), tmp_path / "whole")
    start = {"start_from": str(tmp_path / "whole"), "sample__previews": ("a red ball",)}
    how = dict(total_steps=2, lora__rank=2, **start, eval_every=2, eval_batches=1)
    dit.main(image_config(kind, **how, **ready), tmp_path / "adapters")
    trained, about = checkpoint.load_model(tmp_path / "adapters" / "model")
    assert about["kind"] == "lora" and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained))
    image = np.full((20, 30, 3), 90, np.uint8)
    assert Pipeline.load(tmp_path / "adapters").generate(["a red ball"], image=image).videos.shape == (1, 5, 16, 16, 3)


def test_where_the_first_frame_is_known_it_does_not_count(image_config, tiny_model):
    """Of clips for which it is drawn to be known; the others are trained as without."""
    config = image_config("ti2v", image__share=0.5)
    latent = jax.random.normal(jax.random.key(0), (32, 3, 4, 4, 4))
    given = batches.beginning(config, {"latent": latent}, jax.random.key(1))
    assert 8 <= int(given.is_known_B.sum()) <= 24
    where = first_frame.is_known(given, 3)
    np.testing.assert_array_equal(where[:, 0].squeeze(), given.is_known_B)
    assert not where[:, 1:].any()
    assert batches.beginning(config, {"latent": latent[:, :1]}, jax.random.key(1)).known_B1hwz is None

    params, _ = checkpoint.load_model(tiny_model)
    models = pipeline.build(config.to_dict(), latent_channels=4)
    time, text, mask = jnp.full(32, 0.7), jnp.ones((32, 3, 8)), jnp.ones((32, 3), bool)
    predict = jax.jit(lambda given: models.predict(params, latent, time, text, mask, given))
    mixed, none, everywhere = map(predict, (given, first_frame.Given(), given._replace(is_known_B=None)))
    chosen = given.is_known_B[:, None, None, None, None]
    np.testing.assert_allclose(mixed, jnp.where(chosen, everywhere, none), atol=1e-5)
    assert float(jnp.abs(everywhere - none).max()) > 1e-3


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("i2v", {"image__tower": ""}, r"image.tower='': model.image_width=32 needs the folder"),
        ("i2v", {"model__extra_channels": 0}, "model.image_width=32: expected 0, or model.extra_channels"),
        ("i2v", {"model__text_path": "joint"}, "model.image_width=32: an image is read by cross-attention"),
        ("i2v", {"image__share": 0.5}, "image.share=0.5: expected 0, as with model.extra_channels=6"),
        ("ti2v", {"image__share": 1.5}, "image.share=1.5: expected 0 <= share <= 1"),
        ("ti2v", {"model__time_path": "in_context"}, "image.share=1.0: expected 0, or a network that can be told"),
        ("ti2v", {"data__buckets": ((1, 16, 16, 8, 1.0),)}, r"data.buckets \(1, 16, 16\): a clip of one frame"),
    ],
)
def test_configs_that_make_no_sense_are_refused(kind, changes, message, image_config):
    with pytest.raises(ValueError, match=message):
        base.validate(image_config(kind, **changes))


def test_what_does_not_fit_the_data_is_refused(image_config, stored, tmp_path, one_device):
    plain, looked_at = stored("ti2v", {}), stored("i2v", {})
    with pytest.raises(
        ValueError, match="no image_latent and no image_tokens beside the latents, .* `stvdm preprocess`"
    ):
        dit.main(image_config("i2v", **plain), tmp_path / "run")
    tower = tmp_path / "tower"
    tower.mkdir()
    config = image_config("i2v", **looked_at)
    save_file({"other": np.zeros(1)}, tower / "model.safetensors")
    config.image.tower = str(tower)
    with pytest.raises(ValueError, match="its images were looked at by .*, expected .* name the tower"):
        dit.main(config, tmp_path / "run")
    with pytest.raises(ValueError, match="extra_channels=8: expected 6, a mask for each of the 2 frames"):
        dit.main(image_config("i2v-a14b", model__extra_channels=8), tmp_path / "run")


@pytest.fixture
def two_networks(tiny_model, tmp_path):
    """The folder of a model of two networks that take turns."""
    params, description = checkpoint.load_model(tiny_model)
    other = jax.tree.map(lambda leaf: leaf[::-1].copy(), params["dit"])
    params = {**{name: params[name] for name in params if name != "dit"}, HIGH: params["dit"], LOW: other}
    description["config"]["sample"].update(boundary=0.7, guidance_low=1.5)
    checkpoint.save_model(tmp_path / "two", params, description)
    return tmp_path / "two"


@pytest.mark.parametrize("how", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_of_two_networks_each_is_trained_in_its_turn_and_sampled_with_the_other(
    how, dit_config, two_networks, tmp_path, one_device
):
    whole = checkpoint.load_model(two_networks)[0]

    def trained(turn, times, start):
        config = dit_config(total_steps=2, turn=turn, start_from=str(start), autoencoder=str(two_networks))
        config.flow.times, config.lora.rank, config.eval_every, config.eval_batches = times, 2 * (how == "lora"), 2, 1
        config.sample.update(dict(boundary=0.7, guidance=2.0))
        dit.main(config, tmp_path / turn)
        scores = next(record for record in read_metrics(tmp_path / turn) if "eval/velocity_mse" in record)
        at = [float(name.rpartition("_")[2]) for name in scores if "_at_" in name]
        assert len(at) == 5 and times[0] < min(at) < max(at) < times[1]
        return tmp_path / turn

    high = trained("high_noise", (0.7, 1.0), two_networks)
    low = trained("low_noise", (0.0, 0.7), high if how == "full" else two_networks)
    if how == "full":
        made = Pipeline.load(low)
        assert made.params.keys() == whole.keys()
        for name, run in ((HIGH, high), (LOW, low)):
            own = checkpoint.load_model(run / "model")[0]["dit"]
            jax.tree.map(np.testing.assert_array_equal, made.params[name], own)
    else:
        made = Pipeline.load(two_networks, adapters=[(high, 1.0), (low, 1.0)])
        for name in (HIGH, LOW):
            query = made.params[name]["layers"]["block_0"]["self_attention"]["query"]
            assert {"down", "up"} < query.keys()
        with (
            pytest.warns(UserWarning, match="these adapters were trained beside weights of sha256"),
            pytest.raises(ValueError, match="for the network 'dit_high_noise', and this model has dit"),
        ):
            Pipeline.load(dit_config().autoencoder, adapters=[(high, 1.0)])
    tuned, plain = (model.generate(["a red ball"], seed=1).latents for model in (made, Pipeline.load(two_networks)))
    assert np.abs(tuned - plain).max() > 1e-4


def test_turns_that_make_no_sense_are_refused(dit_config, two_networks):
    config = dit_config(turn="high_noise")
    with pytest.raises(ValueError, match="turn='high_noise': expected sample.boundary") as error:
        base.validate(config)
    assert "start_from='': turn='high_noise' is of a model of two networks" in str(error.value)
    config.sample.boundary = 0.7
    with pytest.raises(ValueError, match=r"flow.times=\(0.0, 1.0\): expected \(0.7, 1.0\), as turn='high_noise'"):
        base.validate(config)
    with pytest.raises(ValueError, match=r"flow.times=\(0.6, 0.5\): expected 0 <= low < high <= 1"):
        base.validate(dit_config(flow__times=(0.6, 0.5)))
    with pytest.raises(ValueError, match="two transformers that take turns, .* expected turn='high_noise' or"):
        dit.start_of(two_networks, {})
