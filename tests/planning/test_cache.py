# SPDX-License-Identifier: Apache-2.0
"""Plans that are kept."""

import pytest

from stvdm.planning import cache


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("STVDM_CACHE", str(tmp_path / "cache"))


def never():
    raise AssertionError("this was asked before")


def test_the_second_answer_is_the_first():
    first = cache.answer({"mesh": (2, 4), "remat": "nothing"}, lambda: {"tokens": (5, 4, 4), "bytes": 1.5})
    assert first == {"tokens": [5, 4, 4], "bytes": 1.5}
    assert cache.answer({"remat": "nothing", "mesh": [2, 4]}, never) == first
    assert cache.answer({"remat": "everything", "mesh": [2, 4]}, lambda: {"bytes": 2}) == {"bytes": 2}


@pytest.mark.parametrize("change", ["source_digest", "versions"])
def test_other_sources_or_versions_ask_anew(change, monkeypatch):
    cache.answer({"a": 1}, lambda: {"bytes": 1})
    monkeypatch.setattr(cache, change, lambda: "another")
    assert cache.answer({"a": 1}, lambda: {"bytes": 2}) == {"bytes": 2}


def test_a_damaged_file_is_made_again():
    cache.answer({"a": 1}, lambda: {"bytes": 1})
    (kept,) = cache.folder().iterdir()
    kept.write_text('{"byt')
    assert cache.answer({"a": 1}, lambda: {"bytes": 3}) == {"bytes": 3}
    assert cache.answer({"a": 1}, never) == {"bytes": 3}


def test_a_place_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STVDM_CACHE", str(tmp_path / "file"))
    assert cache.answer({"a": 1}, lambda: {"bytes": 1}) == {"bytes": 1}


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache.folder() == tmp_path / "cache" / "plans"
    monkeypatch.delenv("STVDM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "stvdm" / "plans"
