# SPDX-License-Identifier: Apache-2.0
"""The rule on numbers made up for it; the whole measurement in small; and the committed table is what was measured."""

import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from stvdm.data.kinetic_shapes import sample_scene
from stvdm.evaluation import agreement, distributions, result_file
from stvdm.evaluation.damage import DAMAGES, Shot
from stvdm.evaluation.instruments import Features, Instrument, colours
from stvdm.evaluation.physics import Row

COMMITTED = pathlib.Path(__file__).parents[2] / "results" / "damage"
HIGHER, LOWER = Instrument("one", "clip", "higher"), Instrument("other", "clip", "lower")


def series(*means, spread=0.1, num=40, seed=0):
    """Scores of clips at no damage and at three strengths; each clip has its own level, and its own noise."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0, 5, num)
    return [level + mean + rng.normal(0, spread, num) for mean in means]


@pytest.mark.parametrize(
    ("means", "of_lower", "of_higher"),
    [
        ((0, 1, 2, 3), "sees", "rewards"),
        ((0, 0, 1, 1), "sees", "rewards"),  # not yet, and then no more
        ((0, 0, 0, 0), "misses", "misses"),
        ((0, 0, 0, 3), "misses", "misses"),  # only what is strong
        ((0, 1, 2, 0), "misses", "rewards"),  # it turns back
        ((0, -1, 2, 3), "misses", "rewards"),  # it begins the wrong way
    ],
)
def test_what_counts_as_seeing(means, of_lower, of_higher):
    at = series(*means)
    assert agreement._cell(LOWER, at, 1)["verdict"] == of_lower
    assert agreement._cell(HIGHER, at, 1)["verdict"] == of_higher


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_best_at_0_is_worse_on_both_sides_of_it(sign):
    clips = np.random.default_rng(0).normal(1, 0.1, 40)
    nearer = Instrument("excess_flicker", "pair", "nearer 0")
    assert agreement._cell(nearer, [sign * k * clips for k in range(4)], 1)["verdict"] == "sees"
    assert agreement._cell(nearer, [sign * k * clips for k in range(3, -1, -1)], 1)["verdict"] == "rewards"


def test_what_noise_may_have_made_is_missed():
    at = series(0, 0.2, 0.2, 0.2, spread=3.0)
    cell = agreement._cell(LOWER, at, 1)
    assert cell["verdict"] == "misses" and cell["worse"][1][1] < 0 < cell["worse"][1][2]
    assert agreement._cell(LOWER, series(0, 0.2, 0.2, 0.2, spread=0.1), 1)["verdict"] == "sees"


def test_noise_alone_gives_a_false_alarm_once_in_forty():
    found = [agreement._cell(LOWER, series(0, 0, seed=seed), 0)["verdict"] for seed in range(2000)]
    assert 0.015 < found.count("sees") / 2000 < 0.036
    assert 0.015 < found.count("rewards") / 2000 < 0.036


def test_clips_that_it_says_nothing_of_do_not_count():
    at = series(0, 1, 1, 1)
    for values in at:
        values[7:] = math.nan
    assert agreement._cell(LOWER, at, 1)["verdict"] == "-"
    at = series(0, 1, 1, 1)
    for values in at:
        values[8:] = math.nan
    cell = agreement._cell(LOWER, at, 1)
    assert (cell["verdict"], cell["num"]) == ("sees", 8)


def test_an_item_that_undamaged_clips_fail_is_not_applicable():
    right = [np.ones(100), *(np.zeros(100) for _ in range(3))]
    shape = Instrument("physics shape", "clip", "higher")
    assert agreement._cell(shape, right, 1)["verdict"] == "sees"
    right[0][:6] = 0
    assert agreement._cell(shape, right, 1)["verdict"] == "-"
    assert agreement._cell(shape._replace(name="frame_change"), right, 1)["verdict"] == "sees"


def test_the_interval_over_clips_is_students():
    values = np.random.default_rng(0).normal(1, 2, 30)
    row = agreement.over_clips(np.append(values, math.nan))
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert row == (pytest.approx(values.mean()), pytest.approx(low), pytest.approx(high), 30)


def test_the_jackknife_of_a_mean_is_the_error_of_the_mean_of_its_groups():
    values = np.random.default_rng(0).normal(1, 2, 100)
    group = np.arange(100) % agreement.GROUPS
    without = [values[group != g].mean() for g in range(agreement.GROUPS)]
    row = agreement.over_groups(np.asarray([values.mean(), *without]))
    means = [values[group == g].mean() for g in range(agreement.GROUPS)]
    low, high = stats.t.interval(0.95, agreement.GROUPS - 1, values.mean(), stats.sem(means))
    assert row == (pytest.approx(values.mean()), pytest.approx(low), pytest.approx(high), agreement.GROUPS)


def test_the_interval_of_a_distance_covers_the_truth():
    """Frechet distance of two Gaussians one apart is 1 in expectation of many clips; intervals of 95 % say so."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        real, same, far = (rng.normal(mean, 1, (100, 2)) for mean in ((0, 0), (0, 0), (1, 0)))
        reading = [agreement.Reading({}, {"x": one}) for one in (same, far)]
        near, away = (
            np.asarray(
                [distributions.frechet_distance(real, one.features["x"])]
                + [
                    distributions.frechet_distance(real[kept], one.features["x"][kept])
                    for kept in (np.arange(100) % agreement.GROUPS != g for g in range(agreement.GROUPS))
                ]
            )
            for one in reading
        )
        row = agreement.over_groups(away - near)
        covered += row.low < 1 < row.high
    assert 0.88 < covered / 200 < 0.99


def test_values_of_sets_are_of_all_and_of_all_but_a_group():
    rng = np.random.default_rng(0)
    made, real = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    found = agreement.values(agreement.Reading({"psnr": np.ones(40)}, {"x": made}), {"x": real})
    assert found["psnr"].shape == (40,) and found["frechet (x)"].shape == (1 + agreement.GROUPS,)
    kept = np.arange(40) % agreement.GROUPS != 3
    expected = distributions.frechet_distance(real[kept], made[kept])
    assert found["frechet (x)"][4] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ("sees", "sees", "sees"),
        ("sees", "misses", "MISSES"),
        ("sees", "rewards", "REWARDS"),
        ("blind", "misses", "blind"),
        ("blind", "sees", "REACTS"),
        ("blind", "rewards", "REACTS"),
        ("", "sees", "sees"),
        ("", "rewards", "rewards"),
        ("", "misses", ""),
        ("sees", "-", "-"),
    ],
)
def test_what_goes_against_expectation_is_in_capitals(expected, found, said):
    assert agreement.mark(expected, found) == said


def test_symmetric_clips_obey_their_words_backwards():
    for shot in agreement._shots(4, 0, 0, None, agreement.SYMMETRIC):
        (thing,) = shot.scene.things
        assert thing.motion in ("return_left", "return_right") and shot.scene.camera[0] == 0


def test_too_few_clips_are_refused():
    with pytest.raises(ValueError, match="num=15: expected at least 16 clips"):
        agreement.measure(15)


@pytest.fixture(scope="module")
def small():
    """A whole measurement of two damages, in small clips."""
    shot = Shot(sample_scene(0, 0, split="test"), num_frames=5, height=32, width=32)
    damages = {name: DAMAGES[name] for name in ("flicker", "time_reversal")}
    row = Features("colours", colours, ("colour_drift",), ("flicker", "time_reversal"))
    return agreement.measure(16, shot=shot, damages=damages, features=(row,))


def test_a_measurement_says_what_was_measured_and_how(small):
    found = small["instruments"]
    assert small["conditions"]["num"] == 16 and small["conditions"]["height"] == 32
    assert found["psnr"]["damages"]["flicker"]["verdict"] == "sees"
    assert found["frame_change"]["damages"]["flicker"]["verdict"] == "sees"
    assert found["frame_change"]["damages"]["time_reversal"]["verdict"] == "misses"
    assert found["frechet (colours)"]["damages"]["time_reversal"]["worse"] == [[0, 0, 0]]
    assert found["psnr"]["controls"].keys() == {"symmetric reversal"}
    assert found["frame_change"]["controls"].keys() == set(agreement.CONTROLS)


def test_a_measurement_makes_a_table(small):
    small["conditions"]["command"] = "stvdm evaluate --damage"
    table = agreement.as_markdown(result_file.kept(small, agreement.DIGITS))
    assert "| frame_change | **sees** | *blind* |" in table
    assert "- psnr: symmetric reversal" in table


def test_a_measurement_goes_to_a_bucket(small, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agreement, "measure", lambda num, **_: small)
    agreement.main(num=16, output="gs://bucket/damage", command="stvdm evaluate --damage", say=lambda text: None)
    assert sorted(path.name for path in (bucket / "damage").iterdir()) == ["contact.png", "damage.json", "damage.md"]
    assert (bucket / "damage" / "contact.png").read_bytes()[:4] == b"\x89PNG"


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return result_file.read(COMMITTED / "damage.json")


def test_the_committed_table_is_that_of_the_committed_numbers(committed):
    assert (COMMITTED / "damage.md").read_text("utf-8") == agreement.as_markdown(committed)
    assert (COMMITTED / "damage.json").read_text("utf-8") == result_file.as_json(committed)


def test_the_committed_verdicts_follow_from_the_committed_intervals(committed):
    judged = 0
    for instrument in committed["instruments"].values():
        for name, cell in [*instrument["damages"].items(), *instrument["controls"].items()]:
            worse, steps = ([Row(*row, cell["num"]) for row in cell[key]] for key in ("worse", "steps"))
            middle = len(worse) // 2
            if cell["verdict"] != "-":
                assert agreement.verdict(worse, steps, middle) == cell["verdict"], name
                judged += 1
    assert judged > 200


def test_the_committed_expectations_are_those_of_the_code(committed):
    listed = {instrument.name: instrument for instrument in agreement.instruments()}
    assert listed.keys() == committed["instruments"].keys()
    for name, instrument in committed["instruments"].items():
        assert listed[name].better == instrument["better"]
        for damage, cell in instrument["damages"].items():
            assert listed[name].expected(damage) == cell["expected"], (name, damage)
    assert committed["damages"] == {
        one.name: {"unit": one.unit, "strengths": list(one.strengths)} for one in DAMAGES.values()
    }
