# SPDX-License-Identifier: Apache-2.0
"""Cells: what is run, what is skipped, what is shared, what is refused; and one that really runs."""

import dataclasses
import json

import jax
import pytest

from stvdm import checkpoint, sharding
from stvdm import config as base
from stvdm.ablations import cells, edits, report, results, shelf
from stvdm.ablations.questions import Claim, Question, Sampling


@pytest.fixture
def tiny_bases(tiny_model):
    """Bases so small that a test can train them, on an untrained autoencoder."""
    _, description = checkpoint.load_model(tiny_model)
    dit, autoencoder = base.dit(), base.autoencoder()
    autoencoder.model.update(description["autoencoder"])
    dit.autoencoder = str(tiny_model)
    dit.model.update({key: value for key, value in description["config"]["model"].items() if value is not None})
    dit.text.update({**description["config"]["text"], "words": (), "max_tokens": 64})
    dit.sample.update(dict(steps=2, previews=("a red ball bounces to the right",)))
    for config in (dit, autoencoder):
        config.data.buckets = ((5, 16, 16, 8, 1.0),)
        config.data.num_clips = 512  # enough for all words
        config.optimizer.schedule = "constant"
        config.optimizer.warmup_steps = 0
        config.total_steps = 2
        config.eval_every = 2
        config.eval_batches = 1
        config.log_every = 1
    autoencoder.statistics_batches = 1
    return edits.Run(dit, autoencoder)


@pytest.fixture
def ran(monkeypatch):
    """The cells that were run, none of which does anything."""
    noted = []

    def run_cell(question, bases, variant, seed, **_):
        noted.append(f"{variant}:{seed}")
        return {"edit": {}, "curves": {}, "samplings": {}, "cost": {"seconds": {}}}, b"picture"

    monkeypatch.setattr(cells, "run_cell", run_cell)
    return noted


def quiet(_):
    pass


def run(question, bases, tmp_path, **options):
    return cells.main(question, bases, size="tiny", workdir=tmp_path / "w", folder=tmp_path / "r", say=quiet, **options)


def test_a_grid_is_run_seed_by_seed_and_goes_on_where_it_stopped(question, tiny_bases, ran, tmp_path):
    folder = run(question, tiny_bases, tmp_path, num_seeds=2)
    assert ran == ["frame:0", "full:0", "frame:1", "full:1"]
    assert sorted(path.name for path in folder.glob("*.png")) == ["frame.png", "full.png"]  # of seed 0
    run(question, tiny_bases, tmp_path, num_seeds=2)
    assert len(ran) == 4
    (folder / "full-0.json").unlink()
    run(question, tiny_bases, tmp_path, num_seeds=3)
    assert ran[4:] == ["full:0", "frame:2", "full:2"]


def test_results_that_are_all_there_are_taken_as_they_are_unless_something_else_is_asked(
    question, tiny_bases, ran, tmp_path
):
    run(question, tiny_bases, tmp_path, num_seeds=1)
    tiny_bases.dit.model.rope_theta = 10.0  # a default of another version
    run(question, tiny_bases, tmp_path, num_seeds=1)
    assert ran == ["frame:0", "full:0"]
    with pytest.raises(ValueError, match=r"rope_theta=.*, expected 10.0\n.*--results=DIR"):
        run(question, tiny_bases, tmp_path, num_seeds=1, options=["--config.model.rope_theta=10.0"])


def test_a_result_names_the_code_that_made_it(question, tiny_bases, ran, tmp_path):
    (result,) = results.read(run(question, tiny_bases, tmp_path, cell="full:7"))
    assert result["sources"] == shelf.sources() and len(result["sources"]) == 12
    assert result["conditions"]["evaluation.kinetic_features_sha256"]


def test_one_cell_alone(question, tiny_bases, ran, tmp_path):
    folder = run(question, tiny_bases, tmp_path, cell="full:7", options=["--num=8", "--config.total_steps=3"])
    assert ran == ["full:7"]
    (result,) = results.read(folder)
    command = "stvdm ablate attention --size=tiny --cell=full:7 --num=8 --config.total_steps=3"
    assert (result["variant"], result["seed"], result["command"]) == ("full", 7, command)


@pytest.mark.parametrize("cell", ["full", "full:", "full:x", "fulll:0", "full:-1"])
def test_a_cell_that_is_none_is_refused(question, cell):
    with pytest.raises(ValueError, match=r"expected VARIANT:SEED, one of frame, full and a whole number, e.g. frame:0"):
        cells.parse(question, cell)


def test_a_cell_that_fails_leaves_no_result(question, tiny_bases, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(question, tiny_bases, tmp_path)
    assert results.read(tmp_path / "r" / "attention" / "tiny") == []


def test_results_of_other_conditions_are_refused_before_anything_is_run(question, tiny_bases, ran, tmp_path):
    run(question, tiny_bases, tmp_path, cell="full:0")
    tiny_bases.dit.total_steps = 3
    with pytest.raises(ValueError, match=r"full-0.json: dit.total_steps=2, expected 3"):
        run(question, tiny_bases, tmp_path)
    with pytest.raises(ValueError, match=r"evaluation.prompts"):
        run(question, tiny_bases, tmp_path, num=9)
    run(question, tiny_bases, tmp_path, num_seeds=1, mixed=True)
    assert ran == ["full:0", "frame:0"]


def test_how_a_run_is_watched_and_where_it_lies_is_no_condition(question, tiny_bases):
    before = cells.conditions(question, tiny_bases, size="tiny", num=8, batch=4)
    dit = tiny_bases.dit
    dit.log_every, dit.eval_every, dit.data.path, dit.seed = 7, 9, "elsewhere", 5
    dit.mesh.fsdp = 2
    dit.topology, dit.num_slices, dit.model.remat = "v5p:2x2x2", 2, "everything"
    assert cells.conditions(question, tiny_bases, size="tiny", num=8, batch=4) == before
    dit.model.rope_theta = 10.0
    changed = cells.conditions(question, tiny_bases, size="tiny", num=8, batch=4)
    assert {key for key in before if before[key] != changed[key]} == {"dit.model.rope_theta"}
    assert json.loads(json.dumps(before))["autoencoder_sha256"] == before["autoencoder_sha256"]


def test_a_variant_edits_a_copy_and_says_what_it_changed(question, tiny_bases):
    (prepared,) = cells.prepared(question, tiny_bases, "frame", 4)
    assert (prepared.dit.seed, tiny_bases.dit.seed) == (4, 0)
    assert cells.edit_of(tiny_bases, [prepared], with_autoencoder=True) == {
        "dit.model.attention": ("frame",),
        "dit.model.positions": "sincos",
    }


def test_a_training_in_stages_says_what_each_changed(question, tiny_bases):
    halves = (edits.Stage(0.5, edits.attend("frame")), edits.Stage(0.5, edits.as_it_is))
    question = dataclasses.replace(question, variants={**question.variants, "both": halves})
    runs = cells.prepared(question, tiny_bases, "both", 4)
    assert cells.edit_of(tiny_bases, runs, with_autoencoder=False) == {
        "1.dit.model.attention": ("frame",),
        "1.dit.model.positions": "sincos",
    }


def test_a_budget_buys_steps_at_their_price(question, tiny_bases):
    tiny_bases.dit.total_steps = 100
    stages = (edits.Stage(0.2, edits.attend("frame")), edits.Stage(0.8, edits.as_it_is))
    question = dataclasses.replace(question, variants={"both": stages})
    runs = cells.prepared(question, tiny_bases, "both", 0)
    cells.share_out(tiny_bases, runs, stages, lambda config: 2.0 if "frame" in config.model.attention else 3.0)
    assert [run.dit.total_steps for run in runs] == [30, 80]  # 0.2 * 100 * 3 / 2, and 0.8 * 100


def test_a_longer_clip_has_whole_latents_and_a_plan_of_its_length(tiny_model):
    loaded = cells.Pipeline.load(tiny_model)
    asked = cells.clips_asked_for(loaded, Sampling(times_length=2, world=(("pan", 0.0),)))
    assert asked == {"num_frames": 9, "world": {"pan": 0.0, "duration": 4.0}}
    assert cells.clips_asked_for(loaded, Sampling()) == {"num_frames": 5, "world": {}}


def test_scores_and_references_are_taken_out_of_a_report():
    found = {"mean": 0.5, "low": 0.4, "high": 0.6, "num": 9}
    scores = cells.scores_of(
        {
            "items": {
                "colour": {"generated": found, "reconstructed": found, "real": found, "chance": found},
                "residual": {"real": found},  # nothing generated could be tracked
                "shape": {"not_reported": "real clips fail"},
            },
            "flicker": {"generated": 3.0, "reconstructed": 2.0, "real": 1.0},
            "distances": {"kinetic_frechet": {"generated": 5.0, "real": 0.5}},
            "flow_loss": 0.7,
            "reconstruction": {"psnr_db": 30.0},
        }
    )
    assert scores["scores"] == {
        "colour": 0.5,
        "frame_change": 3.0,
        "kinetic_frechet": 5.0,
        "flow_loss": 0.7,
        "psnr_db": 30.0,
    }
    assert scores["references"]["real"] == {
        "colour": 0.5,
        "residual": 0.5,
        "frame_change": 1.0,
        "kinetic_frechet": 0.5,
    }
    assert scores["references"]["chance"] == {"colour": 0.5}
    assert scores["not_reported"] == {"shape": "real clips fail"}


def test_the_wait_of_the_slowest_process_is_not_counted_twice():
    records = [{"step": 1, "seconds/data": 1.0, "seconds/data_max": 5.0, "seconds/step": 2.0}, {"step": 2, "loss": 1.0}]
    assert cells.seconds_of(records) == 3.0


# --- what is made once -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    """A trainer that leaves a model and checkpoints, and the folders it was called with."""
    noted = []

    def train(config, folder):
        noted.append(folder.name)
        (folder / "checkpoints").mkdir()
        (folder / "model").mkdir()
        (folder / "model" / checkpoint.DESCRIPTION).write_text("{}")

    train.noted = noted
    return train


def test_equal_trainings_are_made_once(tiny_bases, trained, tmp_path):
    config, place = tiny_bases.dit, shelf.epath.Path(tmp_path)
    first = shelf.made_once(trained, config, place, ["ae"], quiet)
    config.sample.guidance, config.log_every, config.data.path = 9.0, 7, "elsewhere"  # is none of its business
    assert shelf.made_once(trained, config, place, ["ae"], quiet) == first
    assert len(trained.noted) == 1
    assert not (first / "checkpoints").exists() and (first / "model").exists()
    assert shelf.made_once(trained, config, place, ["another ae"], quiet) != first
    config.seed = 1
    shelf.made_once(trained, config, place, ["ae"], quiet)
    config.sample.guidance_rescale = 0.5  # is exported with the model, and no cell sets it
    shelf.made_once(trained, config, place, ["ae"], quiet)
    assert len(set(trained.noted)) == len(trained.noted) == 4


def test_a_key_with_its_default_makes_no_other_training(tiny_bases, trained, tmp_path, monkeypatch):
    config, place = tiny_bases.dit, shelf.epath.Path(tmp_path)
    first = shelf.made_once(trained, config, place, [], quiet)
    usual = {**base.defaults("dit"), "model.invented": 1}
    monkeypatch.setattr(base, "defaults", lambda kind: usual)
    with config.unlocked():
        config.model.invented = 1
    assert shelf.made_once(trained, config, place, [], quiet) == first
    config.model.invented = 2
    assert shelf.made_once(trained, config, place, [], quiet) != first


def test_a_measurement_is_taken_once_and_kept(tiny_bases, tmp_path):
    taken = []

    def measure(config):
        taken.append(config)
        return 0.5 + len(taken)

    place = shelf.epath.Path(tmp_path)
    config = tiny_bases.dit
    found = shelf.measured_once(measure, config, place, ["ae"], quiet)
    config.seed, config.total_steps, config.optimizer.learning_rate, config.log_every = 3, 9, 0.1, 7
    assert shelf.measured_once(measure, config, place, ["ae"], quiet) == found == 1.5
    config.optimizer.name = "muon"
    assert shelf.measured_once(measure, config, place, ["ae"], quiet) == 2.5


def test_a_training_cut_short_is_called_again(tiny_bases, trained, tmp_path):
    def cut(config, folder):
        (folder / "checkpoints").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.made_once(cut, tiny_bases.dit, shelf.epath.Path(tmp_path), [], quiet)
    (folder,) = tmp_path.iterdir()
    assert (folder / "checkpoints").exists()  # to go on from
    (folder / "checkpoints").rmdir()
    shelf.made_once(trained, tiny_bases.dit, shelf.epath.Path(tmp_path), [], quiet)
    assert trained.noted == [folder.name]


def test_another_process_is_waited_for(tmp_path):
    import fcntl
    import threading

    said, entered = [], threading.Event()

    def enter():
        with shelf.alone(shelf.epath.Path(tmp_path), said.append):
            entered.set()

    with open(tmp_path / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert entered.wait(5.0)
        thread.join()
    assert len(said) == 1 and "waiting for another process" in said[0]


def test_a_training_that_diverges_is_a_result(question, tiny_bases, tmp_path, monkeypatch):
    def diverges(config, folder):
        raise FloatingPointError("101 steps were skipped")

    monkeypatch.setattr(cells.train_dit, "main", diverges)
    folder = run(question, tiny_bases, tmp_path, cell="frame:0")
    (result,) = results.read(folder)
    assert result["diverged"] == "101 steps were skipped" and result["samplings"] == {}
    assert not (folder / "frame.png").exists()
    assert "1 (1 diverged)" in report.as_markdown(question, [result])


# --- really ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_from_configs_to_report(tiny_bases, tmp_path, monkeypatch):
    """Latents once, trainings shared by ways of sampling and by questions, equal FLOPs, a report."""
    pytest.importorskip("matplotlib")
    whole = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: whole(**axes, devices=jax.devices()[:1]))
    dit = tiny_bases.dit
    dit.data.source, dit.data.path, dit.data.validation_path = "latents", "somewhere", "somewhere"
    dit.total_steps = 4
    question = Question(
        name="images",
        asks="Does it help?",
        source="nobody",
        budget="flops",
        variants={"video": edits.as_it_is, "with_images": edits.mix_in((0, 1), share=0.5)},
        samplings={"default": Sampling(), "twice": Sampling(times_length=2), "strong": Sampling(guidance=4.0)},
        scores=("all_right", "frame_change", "flow_loss"),
        claims=(Claim("with_images", "video", "flow_loss", "it helps", higher=False),),
    )
    lengths, hold_out = [], cells.evaluation.hold_out
    monkeypatch.setattr(
        cells.evaluation,
        "hold_out",
        lambda *a, **options: (lengths.append(options["num_frames"]), hold_out(*a, **options))[1],
    )
    folder = run(question, tiny_bases, tmp_path, num_seeds=1, num=4, batch=2)
    assert len(lengths) == 2 == len(set(lengths))  # once for each length, in all cells and ways of sampling
    video, images = sorted(results.read(folder), key=lambda one: one["variant"])
    assert (video["edit"], video["cost"]["steps"]) == ({}, 4)
    assert images["edit"]["dit.total_steps"] == images["cost"]["steps"] > 4
    spent = [one["cost"]["steps"] * one["cost"]["flops_per_step"] for one in (video, images)]
    assert spent[1] == pytest.approx(spent[0], rel=0.15)  # whole steps
    for one in (video, images):
        assert one["samplings"].keys() == question.samplings.keys()
        for sampling in one["samplings"].values():
            assert {"frame_change", "flow_loss", "psnr_db", "latent_flicker"} <= sampling["scores"].keys()
            assert sampling["references"].keys() == {"reconstructed", "real", "chance"}
        assert one["curves"]["held-out error of the velocity"][-1][0] == one["cost"]["steps"]
        assert one["cost"]["seconds"]["training"] > 0 and one["cost"]["seconds"]["evaluation"] > 0
    assert video["conditions"] == images["conditions"]
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "w").iterdir())
    assert made == ["dit", "dit", "latents", "latents"]  # one training a variant, whatever is sampled
    text = report.write(question, folder).read_text()
    assert "undecided" in text and "Held equal: training FLOPs" in text

    # The same training, asked for by another question: nothing is trained anew.
    monkeypatch.setattr(cells.train_dit, "main", lambda *_: pytest.fail("trained again"))
    other = Question(
        name="other",
        asks="And this?",
        source="nobody",
        budget="steps",
        variants={"base": edits.as_it_is},
        scores=("flow_loss",),
        claims=(),
    )
    (again,) = results.read(run(other, tiny_bases, tmp_path, num_seeds=1, num=4, batch=2))
    assert again["model_sha256"] == video["model_sha256"]
    assert again["samplings"]["default"] == video["samplings"]["default"]


@pytest.mark.slow
def test_a_cell_that_trains_its_autoencoder(tiny_bases, tmp_path, monkeypatch):
    whole = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: whole(**axes, devices=jax.devices()[:1]))
    dit = tiny_bases.dit
    dit.data.source, dit.data.path, dit.data.validation_path = "latents", "somewhere", "somewhere"
    question = Question(
        name="autoencoder",
        asks="Frames?",
        source="nobody",
        budget="steps",
        variants={"frame": edits.frame_by_frame, "uniform": edits.in_equal_groups},
        scores=("psnr_db", "latent_flicker"),
        claims=(),
        trains_autoencoder=True,
    )
    folder = run(question, tiny_bases, tmp_path, num_seeds=1, num=4, batch=2)
    frame, uniform = results.read(folder)
    assert frame["edit"]["autoencoder.model.grouping"] == "frame"
    assert frame["cost"]["tokens"] == 5 * 2 * 2 and uniform["cost"]["tokens"] == 2 * 2 * 2
    for one in (frame, uniform):
        assert one["samplings"]["default"]["scores"]["psnr_db"] > 0
        assert one["cost"]["seconds"]["autoencoder"] > 0
    assert "autoencoder_sha256" not in frame["conditions"] and "autoencoder.model.width" in frame["conditions"]
    assert not [path for path in (tmp_path / "w").iterdir() if path.name.startswith("latents")]  # of one cell alone
