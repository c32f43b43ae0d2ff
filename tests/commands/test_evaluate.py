# SPDX-License-Identifier: Apache-2.0
"""What `stvdm evaluate` calls in each of its three ways, and what is without effect beside them."""

import shlex

import pytest

from stvdm import cli


def test_evaluate_passes_everything_on(calls):
    assert cli.main(shlex.split("evaluate --checkpoint bundled --num 20 --seed 3 --steps 4 --output r.json")) == 0
    ((_, args, kwargs),) = calls
    assert args == (None,)
    assert kwargs == {
        "num": 20,
        "seed": 3,
        "steps": 4,
        "guidance": None,
        "sampler": None,
        "batch": 16,
        "output": "r.json",
        "features": None,
    }


def test_results_are_not_written_over_unasked(calls, failure, tmp_path):
    (tmp_path / "r.json").write_text("hours of work")
    for how in ([], ["--damage"], ["--compare", "a.json", "b.json"]):
        said = failure("evaluate", f"--output={tmp_path / 'r.json'}", *how)
        assert "this is there already; name another, or add --overwrite" in said
    assert not calls
    assert cli.main(["evaluate", f"--output={tmp_path / 'r.json'}", "--overwrite"]) == 0 and calls


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_clips_beside_a_result_are_not_written_over_unasked(calls, stand_in, failure, tmp_path, suffix):
    picture = tmp_path / f"r{suffix}"
    picture.write_bytes(b"of an earlier result")
    said = failure("evaluate", f"--output={tmp_path / 'r.json'}")
    assert f"{picture}: this is there already; name another, or add --overwrite" in said and not calls
    assert cli.main(["evaluate", f"--output={tmp_path / 'r.json'}", "--overwrite"]) == 0
    assert cli.main(["evaluate", "--damage", f"--output={tmp_path / 'r'}"]) == 0 and len(calls) == 2
    stand_in("stvdm.evaluation.comparison", main=lambda *args, **kwargs: calls.append(args))
    assert cli.main(["evaluate", "--compare", "a.json", "b.json", f"--output={tmp_path / 'r.md'}"]) == 0
    assert len(calls) == 3  # these two leave none


def test_a_home_that_the_shell_left_as_it_is_is_found_once(calls, stand_in, failure, tmp_path, monkeypatch):
    """What is looked for before anything is written is what is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["evaluate", "--output=~/r.json"]) == 0 and calls[0][2]["output"] == f"{tmp_path}/r.json"
    assert cli.main(["evaluate", "--damage", "--output=~/r"]) == 0 and calls[1][2]["output"] == f"{tmp_path}/r"
    stand_in("stvdm.evaluation.comparison", main=lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(["evaluate", "--compare", "a.json", "b.json", "--output=~/t.md"]) == 0
    assert calls[2][1]["output"] == f"{tmp_path}/t.md"
    (tmp_path / "r.json").write_text("hours of work")
    assert "this is there already" in failure("evaluate", "--output=~/r.json")


def test_clips_in_a_bucket_are_not_written_over_unasked(calls, failure, bucket):
    (bucket / "r.gif").write_bytes(b"of an earlier result")
    assert "gs://bucket/r.gif: this is there already" in failure("evaluate", "--output=gs://bucket/r.json")


def test_evaluate_writes_where_it_always_did(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate"]) == 0
    assert calls[0][2]["output"] == "results.json" and calls[0][2]["num"] == 200


def test_evaluate_damage_goes_to_the_metrics(calls):
    words = ["evaluate", "--damage", "--num=20", "--seed=3", "--output=a folder"]
    assert cli.main(words) == 0
    command = "stvdm evaluate --damage --num=20 --seed=3 '--output=a folder'"
    assert calls == [("damage", (), {"num": 20, "seed": 3, "output": "a folder", "command": command})]


def test_evaluate_compare_sets_results_side_by_side(calls, stand_in):
    stand_in("stvdm.evaluation.comparison", main=lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(["evaluate", "--compare", "a.json", "b.json", "--mixed", "--output=t.md"]) == 0
    assert calls == [((["a.json", "b.json"],), {"mixed": True, "output": "t.md"})]


def test_evaluate_compare_refuses_what_means_nothing_beside_it(calls, failure):
    said = failure("evaluate", "--compare", "a.json", "b.json", "--num=8", "--steps=5")
    assert "--steps=5 --num=8: without effect beside --compare" in said
    assert "--mixed: without effect but for --compare" in failure("evaluate", "--mixed")
    assert "a.json" in failure("evaluate", "--compare", "nowhere/a.json", "b.json")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--damage", "--compare", "a.json", "b.json"])
    assert not calls


def test_evaluate_damage_refuses_options_of_sampling(calls, failure):
    said = failure("evaluate", "--damage", "--steps=5", "--guidance=2")
    assert "--steps=5 --guidance=2.0: without effect beside --damage" in said and not calls
