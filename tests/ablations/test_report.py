# SPDX-License-Identifier: Apache-2.0
"""A report is made of results alone, and says what they show, what they cost and how to get them."""

import pathlib
import re
import sys

import pytest

from stvdm.ablations import questions, report, results


def row(text, start):
    """The cells of the table row that begins with that name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_report_has_verdicts_scores_and_costs(question, grid):
    text = report.as_markdown(question, grid, sheets=["full"])
    assert row(text, "**confirmed**")[1:3] == ["it holds together", "full above frame in persistence"]
    assert row(text, "**undecided**")[2] == "full@diagonal below frame@diagonal in flicker"
    assert row(text, "full@default") == ["full@default", "3", "0.67 [0.595, 0.745]", "0.65 [0.402, 0.898]"]
    assert row(text, "full@diagonal")[2].startswith("0.77 [")
    assert row(text, "*real clips* @default") == ["*real clips* @default", "", "1", ""]
    assert row(text, "*through the autoencoder* @diagonal")[2] == "0.9"
    assert "*chance* @default" in text
    assert row(text, "full") == ["full", "1 M", "80", "20", "2 G", "40 G", "1.5"]
    assert "Held equal: optimiser steps, 20; the parameters are equal, too." in text
    assert "![full](full.png)" in text and "![frame](frame.png)" not in text
    assert "stvdm ablate attention --size=tiny --num=8 --seeds=3\n" in text
    assert "stvdm ablate attention --size=tiny --cell=full:2 --num=8\n" in text
    assert "cpu; jax 1; eight" in text and "0.1 hours" in text
    assert "Mixed" not in text
    assert "](curves.svg)" in text and "is not kept here" not in text
    assert "is not kept here" in report.as_markdown(question, grid)
    assert "curves" not in report.as_markdown(question, grid, curves=False)


def test_a_budget_says_how_equal_it_is(question, grid):
    import dataclasses

    grid[0]["cost"] = {**grid[0]["cost"], "flops_per_step": 2.1e9}
    text = report.as_markdown(dataclasses.replace(question, budget="flops"), grid)
    assert "Held equal: training FLOPs, 40 G, to 5 %; the parameters are equal, too." in text
    grid[0]["cost"]["parameters"] = {"dit": 5, "text": 1, "autoencoder": 2}
    assert "to 5 %.\n" in report.as_markdown(dataclasses.replace(question, budget="flops"), grid)


def test_machines_and_states_of_the_code_are_told(question, grid):
    assert "states of the package's code" not in report.as_markdown(question, grid)
    for number, one in enumerate(grid):
        one["cost"]["machine"], one["sources"] = f"{1 + number % 2} of 2 cores", "abc" if number else "def"
    text = report.as_markdown(question, grid)
    assert "On 1 of 2 cores or 2 of 2 cores." in text and "Made by 2 states of the package's code" in text


def test_the_parameters_of_an_autoencoder_that_is_trained_are_told(question, grid):
    import dataclasses

    assert "| full | 1 M | 80 |" in report.as_markdown(question, grid)
    text = report.as_markdown(dataclasses.replace(question, trains_autoencoder=True), grid)
    assert "| full | 1 M + 5 | 80 |" in text


def test_diverged_trainings_are_counted_and_have_no_scores(question, made_up, grid):
    lost = made_up("frame", 3, 0, 0, samplings={}, curves={}, cost={"seconds": {}}, diverged="not finite")
    text = report.as_markdown(question, [*grid, lost])
    assert row(text, "frame@default")[1:3] == ["4 (1 diverged)", "0.22 [0.17, 0.27]"]
    only = report.as_markdown(question, [lost])
    assert row(only, "frame@default")[1:] == ["1 (1 diverged)", "", ""] and "Held equal: optimiser steps." in only


def test_scores_that_are_not_reported_say_why(question, grid):
    for one in grid:
        del one["samplings"]["default"]["scores"]["persistence"]
        one["samplings"]["default"]["not_reported"]["persistence"] = "real clips score 0.900, below 0.95"
    text = report.as_markdown(question, grid)
    assert "Not reported: persistence @default, real clips score 0.900, below 0.95." in text
    assert row(text, "full@default")[2] == ""


def test_it_is_written_beside_the_results_and_again_the_same(question, written):
    pytest.importorskip("matplotlib")
    (written / "full.png").write_bytes(b"")
    path = report.write(question, written)
    first = [(written / name).read_text() for name in ("report.md", "curves.svg")]
    assert path.name == "report.md" and "</svg>" in first[1] and "persistence" not in first[1]
    report.write(question, written)
    assert [(written / name).read_text() for name in ("report.md", "curves.svg")] == first


def test_mixed_conditions_are_refused_or_said(question, written, made_up):
    pytest.importorskip("matplotlib")
    odd = made_up("full", 3, 0.5, 0.5)
    odd["conditions"] = {**odd["conditions"], "dit.total_steps": 40}
    results.write(written, odd)
    with pytest.raises(ValueError, match=r"full-3.json: dit.total_steps=40, expected 20"):
        report.write(question, written)
    text = report.write(question, written, mixed=True).read_text()
    assert "**Mixed**" in text and "- full-3.json: dit.total_steps=40, expected 20" in text


def test_there_must_be_results(question, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no results, expected at least one"):
        report.write(question, tmp_path)


def test_without_matplotlib_the_extra_is_named(question, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'stvdm\[ablate\]'"):
        report.write(question, written)
    report.as_markdown(question, results.read(written))  # all but the picture


def test_curves_against_flops_are_drawn_where_asked(question, grid):
    pytest.importorskip("matplotlib")
    import dataclasses

    plain = report.learning_curves(question, grid)
    wider = report.learning_curves(dataclasses.replace(question, plots_flops=True), grid)
    widths = [float(re.search(r'width="([\d.]+)pt"', picture)[1]) for picture in (plain, wider)]
    assert widths[1] == 2 * widths[0]


KEPT = sorted((pathlib.Path(__file__).parents[2] / "results" / "ablations").glob("*/*/report.md"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parents[1].name}-{path.parent.name}")
def test_reports_that_are_kept_are_those_of_the_results_beside_them(path):
    """A change of a rule, a claim or a table shows in the tree; `stvdm ablate NAME --size=SIZE --report` rewrites."""
    found = results.read(path.parent)
    results.check(found)
    assert path.read_text() == report.as_markdown(questions.find(path.parents[1].name), found)
    drawn = (path.parent / "curves.svg").read_text()
    assert {one["variant"] for one in found} <= set(re.findall(r">([^<>]+)</text>", drawn))


def test_a_mean_curve_has_the_steps_that_all_seeds_have():
    assert report.mean_curve([[[1, 2.0], [5, 1.0]], [[1, 4.0], [9, 0.5]]]) == [(1, 3.0)]


def test_the_list_says_what_is_asked_and_found(written, made_up):
    text = report.listing(written.parents[1])
    for question in questions.QUESTIONS.values():
        assert f"{question.name}: {question.asks}" in text
    assert "  tiny   6 cells of 3 seeds, 1.5 minutes a cell (median) on cpu" in text
    assert (
        "confirmed: attention over time keeps a thing the same thing (full against frame, persistence: 0.45 [" in text
    )
    costs = "nothing yet: not run; a tiny cell of the other grids took about 2 minutes on cpu"
    assert text.count(costs) == len(questions.QUESTIONS) - 1
    odd = made_up("full", 3, 0.5, 0.5, edit={"dit.total_steps": 9})
    results.write(written, odd)
    assert "refused as a table" in report.listing(written.parents[1])


def test_the_list_of_nothing_names_everything(tmp_path):
    text = report.listing(tmp_path)
    assert text.count("not run") == len(questions.QUESTIONS)
    assert "objective" in text and "12 trainings a seed, each sampled in 3 ways" in text
