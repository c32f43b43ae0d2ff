# SPDX-License-Identifier: Apache-2.0
"""What differs is named, what differs makes no table, and the differences in a table have honest intervals."""

import copy
import math

import numpy as np
import pytest

from stvdm.evaluation import comparison, physics, result_file

CONDITIONS = {
    "prompts": "kinetic shapes, test split, seed 0, 60 scenes",
    "prompts_sha256": "ab",
    "num": 60,
    "world": {"pan": 0.1, "speed": [0.2, 0.3]},
    "steps": 25,
    "guidance": 3.0,
    "num_frames": 17,
    "height": 32,
    "width": 32,
    "clip_seeds": "0 * 1000003 + index",
    "model_sha256": "1234567890abcdef",
    "autoencoder_sha256": "cc",
    "flow_path": "rectified",
    "checkpoint": "bundled",
    "versions": {"stvdm": "0.1.0", "jax": "0.10.2"},
    "device": "cpu",
}


def cell(values):
    return physics.row(values).cell()


def result(colour, motion, **conditions):
    """A result of these scores of each clip."""
    scores = {"colour": colour, "motion": motion}
    items = {name: {"generated": cell(values)} for name, values in scores.items()}
    items["shape"] = {"not_reported": "real clips score 0.900, below 0.95"}
    return {
        "conditions": {**copy.deepcopy(CONDITIONS), **conditions},
        "items": items,
        "scores": {name: list(map(float, values)) for name, values in scores.items()},
        "flicker": {"generated": 0.04, "real": 0.03},
        "flow_loss": 0.5,
    }


@pytest.fixture
def written(tmp_path):
    """Two results that differ in their model alone, and one of other steps on another version."""
    rng = np.random.default_rng(0)
    luck = rng.random(60)
    result_file.write(tmp_path / "full.json", result(np.ones(60), luck < 0.8))
    other = {"model_sha256": "ffff", "checkpoint": "runs/frame"}
    result_file.write(tmp_path / "frame.json", result(np.ones(60), luck < 0.4, **other))
    quick = {**other, "steps": 10, "versions": {"stvdm": "0.1.0", "jax": "9"}}
    result_file.write(tmp_path / "quick.json", result(np.ones(60), luck < 0.3, **quick))
    return tmp_path


def test_equal_conditions_do_not_differ():
    assert list(comparison.differing(CONDITIONS, copy.deepcopy(CONDITIONS))) == []
    as_it_was = {"speed": (0.2, 1 / 3), "pan": 0.1}
    assert list(comparison.differing(as_it_was, {"speed": [0.2, 0.333333], "pan": 0.1})) == []


def test_what_differs_is_named_wherever_it_is():
    other = {**CONDITIONS, "steps": 10, "world": {"pan": 0.2, "speed": [0.2, 0.3]}, "new": 1}
    del other["num"]
    assert list(comparison.differing(other, CONDITIONS)) == [
        "new=1, expected nothing",
        "num=nothing, expected 60",
        "steps=10, expected 25",
        "world.pan=0.2, expected 0.1",
    ]


def test_most_are_what_is_expected():
    assert comparison.commonest([{"a": 1}, {"a": 2}, {"a": 2}]) == {"a": 2}
    assert comparison.commonest([]) == {}


def test_models_may_differ_and_nothing_else(written):
    assert list(comparison.differences(comparison.read([written / "full.json", written / "frame.json"]))) == []
    with pytest.raises(ValueError, match="other conditions") as refused:
        comparison.main([written / name for name in ("full.json", "frame.json", "quick.json")])
    said = str(refused.value)
    path = written / "full.json"
    assert f'{written / "quick.json"}: steps=10, in {path} 25; versions.jax="9", in {path} "0.10.2"' in said
    assert "frame.json" not in said and "--mixed" in said and "evaluate again" in said


def test_a_table_of_two_models(written, capsys):
    text = comparison.main([written / "full.json", written / "frame.json"], output=written / "new" / "table.md")
    assert (written / "new" / "table.md").read_text() == text
    assert text in capsys.readouterr().out
    assert "|  | clips | full | frame | frame - full |" in text
    assert "| colour | 60 | 1.000 [0.940, 1.000] | 1.000 [0.940, 1.000] | +0.000 [" in text
    (motion,) = (line for line in text.splitlines() if line.startswith("| motion"))
    assert "**-0." in motion and "unpaired" not in motion
    assert "| shape |  | not reported | not reported |  |" in text
    assert "| flow loss (of one autoencoder) |  | 0.5 | 0.5 | +0 |" in text
    assert "paired over the same prompts" in text and "Mixed" not in text
    assert "- frame: runs/frame, sha256 ffff" in text and "sha256 1234567890ab\n" in text
    assert "steps 25" in text


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({}, "-0.1"),
        ({"autoencoder_sha256": "dd"}, "other autoencoder"),
        ({"autoencoder_sha256": None}, "autoencoder not said"),
        ({"flow_path": "cosine"}, "other path"),
    ],
)
def test_flow_losses_of_other_units_have_no_difference(conditions, said):
    one, other = result(np.ones(9), np.ones(9)), result(np.ones(9), np.ones(9), **conditions)
    other["flow_loss"] = 0.4
    assert list(comparison.differences({"one": one, "other": other})) == []
    text = comparison.as_markdown({"one": one, "other": other})
    assert f"| flow loss (of one autoencoder) |  | 0.5 | 0.4 | {said} |" in text
    assert "| change from frame to frame |  | 0.04 | 0.04 | +0 |" in text


def test_a_mixed_table_says_that_it_is(written):
    text = comparison.main([written / "full.json", written / "quick.json"], mixed=True)
    assert "**Mixed**" in text and '- quick: steps=10, in full 25; versions.jax="9", in full "0.10.2"' in text


def test_what_published_networks_say_has_rows_too():
    one, other = (result(np.ones(9), np.ones(9)) for _ in range(2))
    one["distances"] = {"i3d_frechet": {"generated": 27.25, "real": 28.0}}
    text = comparison.as_markdown({"one": one, "other": other})
    assert "| i3d_frechet |  | 27.25 |  |  |" in text
    other["distances"] = {"i3d_frechet": {"generated": 27.0, "real": 28.0}}
    assert "| i3d_frechet |  | 27.25 | 27 | -0.25 |" in comparison.as_markdown({"one": one, "other": other})


def test_what_is_said_of_reconstructed_clips_alone_has_no_row():
    one, other = (result(np.ones(9), np.ones(9)) for _ in range(2))
    for found in (one, other):
        found["items"]["lpips"] = {"reconstructed": {"mean": 0.1, "low": 0.0, "high": 0.2, "num": 9}}
    assert "lpips" not in comparison.as_markdown({"one": one, "other": other})


def related(one, other, item):
    return comparison.correlation(comparison.pairs_of(one, other, item))


def test_only_the_same_prompts_are_paired():
    luck = np.random.default_rng(0).random(60)
    one, other = result(luck < 0.5, luck < 0.8), result(luck < 0.5, luck < 0.4)
    assert related(one, other, "colour") == pytest.approx(1)
    assert 0 < related(one, other, "motion") < 1
    assert related(one, result(np.ones(60), np.ones(60)), "motion") == 0
    assert comparison.pairs_of(one, result(luck < 0.5, luck < 0.8, prompts_sha256="cd"), "motion") is None
    del other["scores"]
    assert comparison.pairs_of(one, other, "motion") is None
    assert "unpaired" in comparison.as_markdown({"one": one, "other": other})


def test_a_clip_that_one_of_them_was_not_judged_on_does_not_count():
    luck = np.random.default_rng(0).random(60) < 0.5
    one, other = result(luck, luck), result(luck, luck)
    one["scores"]["motion"][:3] = [None] * 3
    other["scores"]["motion"][:3] = [0.0, 1.0, 0.0]
    assert related(one, other, "motion") == pytest.approx(1)


def test_what_one_of_them_lost_is_left_out_of_both_means():
    """Two models that do alike wherever both have something to measure, but one of them lost what is hard."""
    residual = np.where(np.arange(60) < 40, 0.01, 0.5) + np.linspace(0, 0.001, 60)
    lost = np.where(np.arange(60) < 40, residual, np.nan)
    one, other, none = (result(np.ones(60), np.ones(60)) for _ in range(3))
    for found, values in ((one, residual), (other, lost), (none, np.where(np.isnan(lost), residual, np.nan))):
        found["items"]["residual"] = {"generated": cell(values)}
        found["scores"]["residual"] = result_file.kept(values.tolist())
    text = comparison.as_markdown({"one": one, "other": other})
    (row,) = (line for line in text.splitlines() if line.startswith("| residual"))
    assert "| 60, 40 | 0.174 [" in row and "| 0.010 [" in row
    assert row.endswith("| +0.000 [+0.000, +0.000] *of 40* |")
    assert "*Of n*: over the n clips that both were judged on" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| colour"))
    assert "*of" not in row
    text = comparison.as_markdown({"other": other, "none": none})
    assert "| no clip that both were judged on |" in text and "nan" not in text


def test_one_clip_that_both_were_judged_on_decides_nothing():
    one, other = (result(np.ones(60), np.ones(60)) for _ in range(2))
    for found, kept in ((one, slice(0, 2)), (other, slice(1, 3))):
        values = np.full(60, np.nan)
        values[kept] = [0.1, 0.2]
        found["items"]["residual"] = {"generated": cell(values)}
        found["scores"]["residual"] = result_file.kept(values.tolist())
    text = comparison.as_markdown(result_file.kept({"one": one, "other": other}))
    assert text.count("| -0.100 *of 1* |") == 1 and "nan" not in text and "None" not in text


def test_an_interval_of_a_difference_by_hand():
    one, reference = dict(mean=0.8, low=0.7, high=0.85), dict(mean=0.5, low=0.4, high=0.6)
    d, low, high = comparison.difference(one, reference)
    assert d == pytest.approx(0.3)
    assert low == pytest.approx(0.3 - math.hypot(0.1, 0.1)) and high == pytest.approx(0.3 + math.hypot(0.05, 0.1))
    _, low, high = comparison.difference(one, reference, 1.0)  # wholly together
    assert low == pytest.approx(0.3) and high == pytest.approx(0.35)
    sure = dict(mean=1.0, low=0.94, high=1.0)  # both always right: as sure as the two are, and no surer
    assert comparison.difference(sure, sure) == (0.0, pytest.approx(-0.06), pytest.approx(0.06))


@pytest.mark.parametrize("together", [False, True])
def test_intervals_of_differences_cover_the_truth(together):
    """Two models that are right in 0.9 and 0.8 of prompts, on prompts of their own or on the same, easy or hard."""
    rng, covered, width = np.random.default_rng(0), 0, 0.0
    for _ in range(400):
        luck = rng.random(60)
        one, other = luck < 0.9, (luck if together else rng.random(60)) < 0.8
        results = [result(values, values) for values in (one, other)]
        together_by = related(*results, "motion") if together else 0.0
        cells = [each["items"]["motion"]["generated"] for each in results]
        _, low, high = comparison.difference(*cells, together_by)
        covered += low < 0.1 < high
        width += (high - low) / 400
    assert 0.92 < covered / 400 < 0.995
    assert (width < 0.2) == together  # pairing is what makes it narrow


def test_results_are_called_by_what_tells_them_apart(written):
    assert comparison._names(["a/one.json", "b/two.json"]) == ["one", "two"]
    assert comparison._names(["a/r.json", "b/r.json"]) == ["a/r", "b/r"]
    assert list(comparison.read([str(written / "full.json"), str(written / "frame.json")])) == ["full", "frame"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["full.json"], "1 result: expected two or more"),
        (["full.json", "full.json"], r"full.json: named twice"),
        (["full.json", "damage.json"], "damage.json: without items: expected a result of `stvdm evaluate"),
        (["full.json", "table.md"], "table.md: expected a result in JSON"),
    ],
)
def test_what_is_no_result_is_refused_by_name(written, files, said):
    (written / "table.md").write_text("| a |")
    result_file.write(written / "damage.json", {"conditions": {}, "instruments": {}})
    with pytest.raises(ValueError, match=said):
        comparison.read([written / name for name in files])
