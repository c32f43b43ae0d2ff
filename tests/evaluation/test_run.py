# SPDX-License-Identifier: Apache-2.0
"""The evaluation as a whole: its columns, its conditions, and what it refuses to report."""

import dataclasses
import json

import foreign
import jax
import numpy as np
import pytest

from stvdm import checkpoint
from stvdm.data.kinetic_scene import render
from stvdm.data.kinetic_shapes import World, sample_scene
from stvdm.evaluation import comparison, physics, published, run
from stvdm.sampling.pipeline import Pipeline


@pytest.fixture
def kinetic_model(tiny_model, tmp_path):
    """The tiny model with the whole vocabulary of kinetic shapes (its embedding grows; the new words are random)."""
    from stvdm.models.text_encoders import collect_words

    params, description = checkpoint.load_model(tiny_model)
    words = collect_words(sample_scene(0, i, split="test").caption for i in range(40))
    random, (_, width) = np.random.default_rng(1), params["text"]["words"].shape
    params["text"]["words"] = random.normal(size=(len(words) + 3, width)).astype(np.float32)
    description["config"]["text"].update(words=list(words), max_tokens=48)
    checkpoint.save_model(tmp_path / "kinetic", params, description)
    return tmp_path / "kinetic"


@pytest.mark.filterwarnings("ignore:prompt .* tokens, and the model reads")  # the small CLIP knows few merges
def test_a_model_of_noise_is_told_apart_from_real_clips(kinetic_model, networks, tmp_path, capsys):
    report = run.main(
        kinetic_model, num=5, batch=2, steps=2, output=tmp_path / "out" / "results.json", features=networks
    )
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["conditions"]["steps"] == 2
    assert written["conditions"]["model_sha256"]
    assert written["conditions"]["checkpoint"] == str(kinetic_model)
    named = {"prompts", "prompts_sha256", "world", "num", "num_frames", "height", "width", "fps", "steps", "guidance"}
    assert named | {"sampler", "clip_seeds", "versions", "device"} <= written["conditions"].keys()
    assert written["conditions"]["num"] == 5 == len(written["scores"]["all_right"])
    cells = written["items"]["all_right"]
    assert cells["generated"]["mean"] == 0.0
    assert cells["generated"]["num"] == 5
    assert sum(cell["num"] for cell in written["all_right_by_things"].values()) == 5
    assert (tmp_path / "out" / "results.png").exists()
    assert (tmp_path / "out" / "results.gif").exists()
    said = written["items"]["clip_score"]
    assert said.keys() == {"generated", "reconstructed", "real", "chance"}
    assert said["generated"]["low"] <= said["generated"]["mean"] <= said["generated"]["high"]
    assert said["generated"]["mean"] == pytest.approx(np.mean(written["scores"]["clip_score"]), rel=1e-3)
    assert len(written["scores"]["clip_score"]) == said["generated"]["num"] == 5
    printed = capsys.readouterr().out
    kinds = ("frechet", "kernel", "precision", "recall")
    assert written["distances"].keys() == {f"{name}_{kind}" for name in ("kinetic", "videomae") for kind in kinds}
    far, covered = (written["distances"][f"kinetic_{name}"] for name in ("kernel", "recall"))
    assert far["generated"] > 3 * abs(far["real"])  # told apart by the feature network too, of five clips already
    assert far["reconstructed"] > 3 * abs(far["real"])
    assert covered["generated"] < covered["real"]
    assert len(written["conditions"]["kinetic_features_sha256"]) == 64
    assert "kinetic_frechet: generated " in printed and "reconstructed ones are copies" in printed
    assert written["feature_widths"] == {"kinetic": 64, "videomae": foreign.VIDEOMAE["hidden_size"]}
    for name, width in written["feature_widths"].items():
        assert f"{name}_frechet: covariances of 5 clips in {width} features" in printed
    assert set(written["conditions"]["networks_sha256"]) == {"clip", "videomae"}
    assert set(written["distances"]["videomae_frechet"]) == {"generated", "reconstructed", "real"}
    assert "all_right" in printed and "clip_score  " in printed


def test_a_result_goes_to_a_bucket_and_its_clips_with_it(kinetic_model, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.main(kinetic_model, num=2, batch=2, steps=1, output="gs://bucket/new/results.json")
    assert json.loads((bucket / "new" / "results.json").read_text())["conditions"]["num"] == 2
    assert (bucket / "new" / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert (bucket / "new" / "results.gif").read_bytes()[:4] == b"GIF8"


def test_a_folder_without_networks_is_refused_before_anything_is_made(kinetic_model, tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with any of clip/"):
        run.main(kinetic_model, num=3, features=tmp_path)


def test_clips_that_a_network_cannot_look_at_are_not_made(kinetic_model, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "hold_out", lambda *_, **__: pytest.fail("rendered"))
    judges = published.Judges.load(networks)
    longer = dataclasses.replace(judges.videomae.model, num_frames=6)  # the model makes 5 frames
    judges = dataclasses.replace(judges, videomae=judges.videomae._replace(model=longer))
    monkeypatch.setattr(run.published.Judges, "load", lambda folder: judges)
    with pytest.raises(ValueError, match="clips of 5 frames: VideoMAE looks at 6"):
        run.main(kinetic_model, num=3, features=networks, output=tmp_path / "results.json")


@pytest.mark.parametrize("name", ["results.png", "results.gif", "results"])
def test_a_result_that_its_clips_would_be_written_over_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}: expected a name that ends in .json.*results.json"):
        run.main(tmp_path / "no model", output=tmp_path / name)


def test_results_say_when_their_prompts_differ(kinetic_model):
    loaded = Pipeline.load(kinetic_model)
    one, other, again = (
        run.measure(loaded, run.hold_out(loaded, num=2, seed=seed, batch=2), steps=1, batch=2)[0] for seed in (0, 1, 0)
    )
    assert list(comparison.differing(one["conditions"], again["conditions"])) == []
    keys = {line.partition("=")[0] for line in comparison.differing(one["conditions"], other["conditions"])}
    assert keys == {"prompts", "prompts_sha256", "clip_seeds"}
    coder = {name: loaded.params[name] for name in ("autoencoder", "statistics")}
    assert one["conditions"]["autoencoder_sha256"] == run.digest_of(coder)
    table = comparison.as_markdown({"one": one, "again": again})
    assert "unpaired" not in table and "| all_right | 2 |" in table


def test_any_seed_of_scenes_has_seeds_of_clips(kinetic_model):
    loaded = Pipeline.load(kinetic_model)
    for seed, first, said in ((4000, 4_000_012_000, ""), (20240101, 20240101 * 1_000_003 % 2**32, " modulo 2**32")):
        report, result = run.measure(loaded, run.hold_out(loaded, num=2, seed=seed, batch=2), steps=1, batch=2)
        assert result.seeds == [first, first + 1]
        assert report["conditions"]["clip_seeds"] == f"{seed} * 1000003 + index{said}"


def test_a_model_of_other_words_is_refused_before_its_clips_are_made(tiny_model, monkeypatch):
    monkeypatch.setattr(run.kinetic_scene, "render", lambda *_: pytest.fail("rendered"))
    with pytest.raises(ValueError, match=r"the model never saw the words .* captions of kinetic shapes"):
        run.hold_out(Pipeline.load(tiny_model), num=8)


def test_an_item_that_real_clips_fail_is_not_reported():
    def row(mean, num=100):
        return physics.Row(mean, mean - 0.01, mean + 0.01, num)

    sure = {item: row(1.0) for item in physics.ITEMS}
    doubtful = {**sure, "shape": row(0.9), "occlusion": row(float("nan"), 0)}
    items = run.table({"generated": sure, "reconstructed": sure, "real": doubtful})
    assert items["shape"] == {"not_reported": "real clips score 0.900, below 0.95"}
    assert items["colour"]["generated"]["mean"] == 1.0
    assert "occlusion" not in items  # no prompt asked for it
    report = {"items": items, "reconstruction": dict(psnr_db=1, ssim=0, excess_flicker=0, change_error=0.5)}
    report["flicker"] = {}
    text = run.as_text({**report, "all_right_by_things": {2: dict(mean=0.5, low=0.25, high=0.75, num=8)}})
    assert "of 2 things 0.500 [0.250, 0.750] (8)" in text
    assert "shape               not reported" in text
    assert "change error 0.5000" in text


@pytest.mark.parametrize(("num", "lacking"), [(300, ["i3d"]), (64, ["kinetic", "i3d"]), (401, [])])
def test_a_distance_of_fewer_clips_than_features_says_so(num, lacking):
    report = {"items": {}, "all_right_by_things": {}, "flicker": {}, "conditions": {"num": num}}
    report["reconstruction"] = dict(psnr_db=1, ssim=0, excess_flicker=0, change_error=0.5)
    far = {"distances": {"i3d_frechet": {"generated": 3.0}}, "feature_widths": {"kinetic": 64, "i3d": 400}}
    text = run.as_text(report | far)
    assert [name for name in ("kinetic", "i3d") if f"{name}_frechet: covariances of {num} clips" in text] == lacking
    assert ("say little" in text) == (num < 100)


def test_prompts_do_not_change_with_their_number():
    few = [sample_scene(0, i, split="test").caption for i in range(3)]
    assert few == [sample_scene(0, i, split="test").caption for i in range(9)][:3]


def test_reconstruction_measures_what_they_say():
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    same = run.reconstruction(video, video)
    assert same["psnr_db"] > 100
    assert same["ssim"] == pytest.approx(1, abs=1e-5)
    noisy = np.clip(video.astype(int) + 20 * (-1) ** np.arange(5)[None, :, None, None, None], 0, 255).astype(np.uint8)
    assert run.reconstruction(noisy, video)["psnr_db"] < 25
    assert same["change_error"] == 0
    there_and_back = 2 * 20 / 127.5  # what each change is off by, but where bytes end
    assert 0.8 * there_and_back < run.reconstruction(noisy, video)["change_error"] < there_and_back


def test_a_model_is_held_against_the_scenes_that_were_asked_for(kinetic_model):
    loaded = Pipeline.load(kinetic_model)
    sideways = {"motions": ("left", "right"), "motion_weights": (1.0, 1.0), "num_things": (1.0,), "duration": 1.0}
    held = run.hold_out(loaded, num=4, num_frames=9, world=sideways, batch=3)
    assert {thing.motion for scene in held.scenes for thing in scene.things} <= {"left", "right"}
    assert held.real.shape == (4, 9, 16, 16, 3)
    assert held.latents.shape == (4, 5, 4, 4, 4)
    assert held.columns["chance"].keys() == set(run.OF_THE_PROMPT)
    assert held.reconstruction["latent_flicker"] > 0


def test_chance_is_what_real_clips_of_other_prompts_score():
    scenes = [sample_scene(0, index, split="test") for index in range(24)]
    real = np.stack([render(scene, 17, 64, 64, 8.0) for scene in scenes])
    asked = physics.summarise(run.score_each(real, scenes, fps=8.0, world=World()))
    others = physics.summarise(run.score_each(np.roll(real, 1, axis=0), scenes, fps=8.0, world=World()))
    assert asked["colour"].mean > 0.95
    assert others["colour"].mean < 0.5 and others["all_right"].mean < 0.2


def test_the_loss_of_a_model_that_says_nothing_is_that_of_the_noise(kinetic_model):
    loaded = Pipeline.load(kinetic_model)
    params = dict(loaded.params["dit"])
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    silent = dataclasses.replace(loaded, params={**loaded.params, "dit": params})
    latents = np.random.default_rng(0).normal(size=(5, 3, 4, 4, 4)).astype(np.float32)
    prompts = ["a red ball"] * 5
    loss = run.flow_loss(silent, latents, prompts, batch=5)
    assert loss == pytest.approx(1 + np.square(latents).mean(), rel=0.1)  # (noise - data)², of independent two
    assert run.flow_loss(silent, latents, prompts, batch=2) == pytest.approx(loss, rel=1e-4)
    assert run.flow_loss(silent, latents, prompts, batch=5, seed=1) != pytest.approx(loss, rel=1e-4)


def test_weights_are_told_apart_by_value():
    params = {"a": {"b": np.zeros(3, np.float32)}}
    digest = run.digest_of(params)
    assert digest == run.digest_of({"a": {"b": np.zeros(3, np.float32)}})
    params["a"]["b"][1] = 1e-6
    assert digest != run.digest_of(params)
