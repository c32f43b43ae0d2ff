# SPDX-License-Identifier: Apache-2.0
"""Results come back as they were written; those of other conditions are named with what differs."""

import json

import pytest

from stvdm.ablations import results


def test_what_is_written_is_read_in_order(written, grid):
    found = results.read(written)
    assert [(one["variant"], one["seed"]) for one in found] == [(v, s) for v in ("frame", "full") for s in range(3)]
    assert found == json.loads(json.dumps(grid), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    assert results.read(written / "nowhere") == []
    results.check(found)


def test_numbers_keep_six_digits_and_files_stay_small(tmp_path, made_up):
    results.write(tmp_path, made_up("full", 0, 1 / 3, 2e-9 / 3))
    scores = results.read(tmp_path)[0]["samplings"]["default"]["scores"]
    assert scores == {"persistence": 0.333333, "flicker": 6.66667e-10}
    assert results.file_of(tmp_path, "full", 0).stat().length < 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["full-0.json"]  # nothing half-written


def test_other_conditions_are_refused_by_file_and_key(grid):
    grid[4]["conditions"] = {**grid[4]["conditions"], "dit.total_steps": 10, "device": "TPU"}
    with pytest.raises(ValueError, match=r"other conditions") as refused:
        results.check(grid)
    text = str(refused.value)
    assert 'full-1.json: device="TPU", expected "cpu"; dit.total_steps=10, expected 20' in text
    assert "--mixed" in text and "frame-0" not in text


def test_a_key_that_only_some_have_is_a_difference(grid):
    grid[0]["conditions"] = {**grid[0]["conditions"], "dit.model.new": 3}
    assert list(results.differences(grid)) == ["frame-0.json: dit.model.new=3, expected nothing"]


def test_a_key_that_was_added_since_has_its_default(grid):
    grid[0]["conditions"] = {**grid[0]["conditions"], "dit.model.qk_norm": True}
    assert list(results.differences(grid)) == []
    grid[0]["conditions"] = {**grid[0]["conditions"], "dit.model.qk_norm": False}
    assert list(results.differences(grid)) == ["frame-0.json: dit.model.qk_norm=false, expected true"]


def test_a_variant_whose_edit_changed_does_not_mix(grid):
    grid[1]["edit"] = {"dit.model.attention": ["time"]}
    assert list(results.differences(grid)) == ['frame-1.json: dit.model.attention=["time"], expected ["frame"]']


def test_expected_conditions_count_for_all(grid):
    now = {**grid[0]["conditions"], "versions.jax": "2"}
    assert len(list(results.differences(grid, expected=now))) == 6
    assert list(results.differences([], expected=now)) == []


def test_tuples_and_digits_that_a_file_loses_are_no_difference(written, grid):
    now = {**grid[0]["conditions"], "world": (("pan", 1 / 3),)}
    for one in grid:
        one["conditions"] = now
        results.write(written, one)
    results.check(results.read(written), expected=now)
