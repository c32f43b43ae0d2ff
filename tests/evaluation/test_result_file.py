# SPDX-License-Identifier: Apache-2.0
"""A result comes back from its file as it was, and its file can be read by people."""

import json
import math

import pytest

from stvdm.evaluation import result_file

RESULT = {
    "conditions": {"world": {"pan": 0.1, "speed": [0.2, 0.3]}, "steps": 25},
    "items": {f"item {n}": {"mean": n / 7, "low": None, "words": 'of "all" kinds'} for n in range(9)},
    "scores": [n / 3 for n in range(200)],
    "empty": {},
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "results.json"
    result_file.write(path, RESULT)
    assert result_file.read(path) == RESULT
    assert [one.name for one in path.parent.iterdir()] == ["results.json"]  # nothing half-written


def test_what_is_not_whole_has_not_its_name(tmp_path):
    path = tmp_path / "clips.gif"
    path.write_bytes(b"of an earlier run")
    with pytest.raises(TypeError, match="bytes-like"), result_file.whole(path) as file:
        file.writelines([b"half", "and what no such file takes"])
    assert path.read_bytes() == b"of an earlier run"
    with result_file.whole(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all" and list(tmp_path.iterdir()) == [path]


def test_it_is_json_in_few_lines():
    text = result_file.as_json(RESULT)
    assert json.loads(text) == RESULT and text.endswith("}\n")
    assert ' "conditions": {"world": {"pan": 0.1, "speed": [0.2, 0.3]}, "steps": 25},\n' in text
    assert '  "item 3": {' in text and len(text.splitlines()) == 2 + 1 + (2 + 9) + 1 + 1


def test_numbers_are_rounded_to_digits_not_places():
    assert result_file.rounded({"a": (1 / 3, 2e-9 / 3), "b": 7}) == {"a": [0.333333, 6.66667e-10], "b": 7}
    assert result_file.kept([math.nan, 123456.0, True], 3) == [None, 123000.0, True]


def test_nothing_has_no_sign():
    assert result_file.as_json(result_file.rounded([-0.0, -1e-9])) == "[0.0, -1e-09]\n"


def test_what_is_not_a_number_is_null():
    assert result_file.as_json({"a": math.nan, "b": [1.5, math.nan]}) == '{"a": null, "b": [1.5, null]}\n'


def test_a_file_that_holds_no_result_is_named(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("| a | table |")
    with pytest.raises(ValueError, match=r"results.json: expected a result in JSON, got '\| a"):
        result_file.read(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="results.json: expected a result, a JSON object, got list"):
        result_file.read(path)
    with pytest.raises(FileNotFoundError, match="other.json: no such result; `stvdm evaluate --output="):
        result_file.read(tmp_path / "other.json")
