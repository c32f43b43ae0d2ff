# SPDX-License-Identifier: Apache-2.0
"""What `stvdm ablate` runs, lists and refuses."""

import pathlib
import types

import pytest

from stvdm import cli


@pytest.fixture
def ablated(stand_in, monkeypatch):
    """What `cells.main` was called with, and the folders of which a report was written."""
    from stvdm.ablations import report

    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    noted = types.SimpleNamespace(calls=[], reports=[])

    def main(question, bases, **options):
        noted.calls.append((question.name, bases, options))
        return pathlib.Path("results")

    def write(question, folder, *, mixed):
        noted.reports.append((str(folder), mixed))
        return "report.md"

    stand_in("stvdm.ablations.cells", main=main)
    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(report, "check_matplotlib", lambda: None)
    return noted


def test_ablate_runs_the_grid_from_the_bases_of_a_size_and_writes_the_report(ablated, capsys):
    words = "ablate attention --size=small --seeds=5 --num=16 --config.total_steps=70 --results=r --workdir=w"
    assert cli.main(words.split()) == 0
    ((name, bases, options),) = ablated.calls
    assert (name, bases.dit.total_steps, bases.dit.model.width) == ("attention", 70, 256)
    assert bases.autoencoder.kind == "autoencoder" and bases.autoencoder.model.width == 64
    assert options == {
        "size": "small",
        "num_seeds": 5,
        "cell": None,
        "num": 16,
        "batch": 32,
        "workdir": "w",
        "folder": "r",
        "mixed": False,
        "options": ["--num=16", "--config.total_steps=70"],
    }
    assert ablated.reports == [("results", False)] and capsys.readouterr().out == "report.md\n"


def test_ablate_of_one_cell_leaves_the_report(ablated):
    assert cli.main("ablate attention --cell=full:1".split()) == 0
    assert ablated.calls[0][2]["cell"] == "full:1" and ablated.calls[0][2]["options"] == []
    assert ablated.reports == []


def test_ablate_in_several_processes_writes_one_report(ablated, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert cli.main("ablate attention --size=pod".split()) == 0
    assert len(ablated.calls) == 1 and ablated.reports == []


def test_ablate_can_write_the_report_alone(ablated, tmp_path, monkeypatch):
    assert cli.main("ablate attention --report --mixed --results=r".split()) == 0
    assert ablated.calls == [] and ablated.reports == [("r/attention/tiny", True)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main("ablate attention --report --results=~/r".split()) == 0  # which the shell leaves as it is
    assert ablated.reports[1] == (f"{tmp_path}/r/attention/tiny", False)


def test_ablate_lists_what_there_is(tmp_path, capsys):
    assert cli.main(["ablate", "--list", f"--results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "attention: Does attention over time remove flicker" in said and "not run" in said


@pytest.mark.parametrize(
    "words, said",
    [
        ("attention --report --cell=full:0 --num=8", "--cell=full:0 --num=8: without effect beside --report"),
        ("attention --report --config=other.py", "--config=other.py: without effect beside --report"),
        ("attention --cell=full:0 --seeds=5", "--seeds=5: without effect beside --cell"),
        ("--list --mixed", "--mixed=True: without effect beside --list"),
        ("attention --report --config.total_steps=3", "--config.total_steps=3: without effect beside --report"),
        ("atention --list", "--name=atention: without effect beside --list"),
    ],
)
def test_ablate_refuses_options_without_effect(ablated, failure, words, said):
    assert said in failure("ablate", *words.split())
    assert ablated.calls == [] and ablated.reports == []


def test_ablate_refuses_names_that_are_none(ablated, failure):
    assert "did you mean 'attention'?" in failure("ablate", "atention")
    assert "NAME is missing: expected one of attention, objective" in failure("ablate")
    assert "did you mean total_steps?" in failure("ablate", "attention", "--config.total_step=3")
