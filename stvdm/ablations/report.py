# SPDX-License-Identifier: Apache-2.0
"""The report of a grid, from its results alone: verdicts, tables, learning curves, contact sheets, commands.

results/ablations/NAME/SIZE/report.md, curves.svg

write(find("attention"), "results/ablations/attention/tiny")
print(listing("results/ablations"))
"""

from __future__ import annotations

import collections
import io
import math
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stvdm.ablations import results as records
from stvdm.ablations import verdicts
from stvdm.ablations.questions import QUESTIONS, Question
from stvdm.ablations.results import Result
from stvdm.ablations.verdicts import Interval, Verdict, over_seeds, values_of

REFERENCES = {"real": "*real clips*", "reconstructed": "*through the autoencoder*", "chance": "*chance*"}


def write(question: Question, folder: epath.PathLike, *, mixed: bool = False) -> epath.Path:
    """Writes report.md and curves.svg beside the results; returns the path of the report.

    Raises:
      ValueError: if there are no results, they were made under differing conditions (unless ``mixed``), or matplotlib
        is not installed.
    """
    check_matplotlib()
    target = epath.Path(folder)
    found = records.read(target)
    if not found:
        place = f"--size={target.name} --results={target.parents[1]}"
        raise ValueError(
            f"{target}: no results, expected at least one, so run `stvdm ablate {question.name} {place}` first"
        )
    if not mixed:
        records.check(found)
    sheets = [variant for variant in question.variants if (target / f"{variant}.png").exists()]
    (target / "curves.svg").write_text(learning_curves(question, found), encoding="utf-8")
    path = target / "report.md"
    path.write_text(as_markdown(question, found, sheets=sheets))
    return path


def as_markdown(question: Question, found: Sequence[Result], *, sheets: Sequence[str] = (), curves: bool = True) -> str:
    """The report as text; ``sheets`` are the variants of which there is a picture, ``curves`` says whether of those."""
    size = found[0]["size"]
    parts = [
        f"# {question.name} ({size})",
        question.asks,
        f"Published: {question.source}.",
        "## Verdict",
        *_verdicts(verdicts.judge_all(question, found)),
        "## Scores",
        "Mean over seeds, with Student's 95 % interval. Real clips are the ceiling of the instrument, and what comes "
        "through the autoencoder that of the model; chance is what real clips of other prompts score. Kinetic "
        "distances are from real clips, and the autoencoder's are of the same clips; *real clips* are others there.",
        _table(question, found),
        *_hidden(question, found),
        "## Cost",
        _budget(question, found),
        _costs(question, found),
    ]
    if curves:
        parts += ["## Learning curves", "![learning curves](curves.svg)"]
    name = next(iter(question.samplings))
    parts += ["## Clips", f"The first prompts, seed 0{'' if len(question.samplings) == 1 else f', {name}'}."]
    parts += [f"{variant}\n\n![{variant}]({variant}.png)" for variant in sheets]
    if not sheets:
        parts[-1] += " Each variant's is a picture that its cell leaves beside the result, and is not kept here."
    if question.limits:
        parts += ["## What this cannot tell", question.limits]
    words = [word for word in shlex.split(found[0]["command"]) if not word.startswith("--cell=")]
    again = shlex.join([*words, f"--seeds={1 + max(one['seed'] for one in found)}"])
    parts += [
        "## Commands",
        f"```bash\n{again}\n{shlex.join(words)} --report\n```",
        "Results that are there are not made again, so give `--results=DIR` in a clone, which has these. Cell by cell:",
        "```bash\n" + "\n".join(one["command"] for one in found) + "\n```",
        "## Conditions",
        *_conditions(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def listing(folder: epath.PathLike) -> str:
    """What each question asks, costs and found, at every size that has results under ``folder``."""
    found = {name: _found(epath.Path(folder) / name) for name in QUESTIONS}
    cells: dict[str, list[Result]] = {}
    for sizes in found.values():
        for size, results in sizes.items():
            cells.setdefault(size, []).extend(results)
    prices = [
        f"; a {size} cell of the other grids took about {statistics.median(map(_minutes, results)):.0f} minutes on "
        + _devices(results)
        for size, results in sorted(cells.items())
    ]
    return "\n\n".join(
        "\n".join(_listed(question, found[name], "".join(prices))) for name, question in QUESTIONS.items()
    )


# --- parts of the report ---------------------------------------------------------------------------------------------


def _verdicts(found: Sequence[Verdict]) -> Iterator[str]:
    rows = [
        [
            f"**{one.outcome}**",
            one.claim.says,
            f"{one.claim.better} {'above' if one.claim.higher else 'below'} {one.claim.worse} in {one.claim.score}",
            "" if one.difference is None else str(one.difference),
            one.reason,
        ]
        for one in found
    ]
    yield _markdown_table(["", "claim", "rule", "difference", ""], rows)
    yield (
        "The claims stood in `stvdm/ablations/questions.py` before the grid was run, but for what is said of them "
        "under *What this cannot tell*. Each is decided for itself, by the 95 % interval (Welch) of the difference "
        "over seeds: confirmed or refuted where that leaves 0 on one side, and what is ahead is above chance by its "
        "own interval. Of twenty differences that do not exist it finds one."
    )


def _table(question: Question, found: Sequence[Result]) -> str:
    rows = []
    for sampling in question.samplings:
        for variant in question.variants:
            cells = [one for one in found if one["variant"] == variant]
            name = variant if len(question.samplings) == 1 else f"{variant}@{sampling}"
            scores = [
                over_seeds(values_of(question, cells, f"{variant}@{sampling}", score)) for score in question.scores
            ]
            lost = sum("diverged" in one for one in cells)
            rows.append([name, f"{len(cells)}{f' ({lost} diverged)' if lost else ''}", *map(_cell, scores)])
            if question.trains_autoencoder:
                rows.append(_reference_row(question, cells, sampling, "reconstructed", f"*{name} reconstructed*"))
        for reference, label in REFERENCES.items():
            if reference == "reconstructed" and question.trains_autoencoder:
                continue
            where = "" if len(question.samplings) == 1 else f" @{sampling}"
            rows.append(_reference_row(question, found, sampling, reference, label + where))
    return _markdown_table(["", "seeds", *question.scores], rows)


def _reference_row(question: Question, found: Sequence[Result], sampling: str, reference: str, label: str) -> list[str]:
    """What clips that are not the model's score, averaged over the cells that measured it."""
    row = [label, ""]
    sides = [one["samplings"][sampling]["references"][reference] for one in found if sampling in one["samplings"]]
    for score in question.scores:
        values = [side[score] for side in sides if score in side]
        row.append(f"{float(np.mean(values)):.3g}" if values else "")
    return row


def _hidden(question: Question, found: Sequence[Result]) -> Iterator[str]:
    """Scores that are not told, since real clips fail them."""
    reasons: dict[str, str] = {}
    for one in found:
        for name, sampling in one["samplings"].items():
            for score, why in sampling["not_reported"].items():
                if score in question.scores:
                    reasons.setdefault(f"{score} @{name}", why)
    for name, why in reasons.items():
        yield f"Not reported: {name}, {why}."


def _budget(question: Question, found: Sequence[Result]) -> str:
    """What was held equal, and how far it is."""
    costs = [one["cost"] for one in found if "steps" in one["cost"]]
    values = {
        "steps": [cost["steps"] for cost in costs],
        "parameters": [_parameters(cost) for cost in costs],
        "flops": [cost["steps"] * cost["flops_per_step"] for cost in costs],
        "seconds": [cost["seconds"]["training"] for cost in costs],
    }[question.budget]
    unit = {
        "steps": "optimiser steps",
        "parameters": "parameters",
        "flops": "training FLOPs",
        "seconds": "seconds of training, by a step's measured before",
    }[question.budget]
    if not values:
        return f"Held equal: {unit}."
    spread = max(values) / min(values) - 1
    sizes = {_parameters(cost) for cost in costs}
    too = "; the parameters are equal, too" if question.budget != "parameters" and len(sizes) == 1 else ""
    return (
        f"Held equal: {unit}, {_short(min(values))}"
        + (f", to {100 * spread:.1g} %" if spread > 1e-3 else "")
        + f"{too}."
    )


def _costs(question: Question, found: Sequence[Result]) -> str:
    rows = []
    for variant in question.variants:
        cells = [one for one in found if one["variant"] == variant and "steps" in one["cost"]]
        if cells:
            first = cells[0]["cost"]
            flops = first["flops_per_step"]
            rows.append(
                [
                    variant,
                    _short(_parameters(first)),
                    str(first["tokens"]),
                    str(first["steps"]),
                    _short(flops),
                    _short(flops * first["steps"]),
                    f"{statistics.median(map(_minutes, cells)):.1f}",
                ]
            )
            if question.trains_autoencoder:
                rows[-1][1] += f" + {_short(first['parameters']['autoencoder'])}"
    titles = ["", "parameters", "tokens", "steps", "FLOPs a step", "FLOPs of training", "minutes a cell (median)"]
    return _markdown_table(titles, rows)


def _conditions(found: Sequence[Result]) -> Iterator[str]:
    """What all cells share; and, in a mixed report, who does not."""
    shared = found[0]["conditions"]
    total = sum(sum(one["cost"]["seconds"].values()) for one in found) / 3600
    yield (
        f"{shared['device']}; "
        + ", ".join(f"{key.removeprefix('versions.')} {v}" for key, v in shared.items() if key.startswith("versions."))
        + f"; {shared['evaluation.prompts']}, the same prompts and noise in every cell. {total:.1f} hours in all, "
        "with a training that several cells share counted in each. All keys are in the results beside this report."
    )
    if machines := {one["cost"].get("machine") for one in found} - {None}:
        yield f"On {' or '.join(sorted(machines))}."
    if (codes := {one.get("sources") for one in found}) and len(codes) > 1:
        yield f"Made by {len(codes)} states of the package's code; each result names its own (`sources`)."
    different = list(records.differences(found))
    if different:
        yield "**Mixed**: these results were made under other conditions than most, and do not compare with them:"
        yield "\n".join(f"- {line}" for line in different)


def _markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Interval) -> str:
    return str(value) if value.num else ""


def _parameters(cost: Mapping[str, Any]) -> int:
    """Of what is trained: the transformer and its text encoder."""
    return cost["parameters"]["dit"] + cost["parameters"]["text"]


def _minutes(one: Result) -> float:
    return sum(one["cost"]["seconds"].values()) / 60


def _short(number: float) -> str:
    """1.23 M."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:.3g}"


def _found(folder: epath.Path) -> dict[str, list[Result]]:
    """Of one question, by size."""
    sizes = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return {size: results for size in sizes if (results := records.read(folder / size))}


def _listed(question: Question, sizes: Mapping[str, Sequence[Result]], prices: str) -> Iterator[str]:
    ways = "" if len(question.samplings) == 1 else f", each sampled in {len(question.samplings)} ways"
    trained = "; each cell trains its autoencoder too" if question.trains_autoencoder else ""
    yield f"{question.name}: {question.asks}"
    yield f"  grid   {', '.join(question.variants)}: {len(question.variants)} trainings a seed{ways}{trained}"
    yield f"  equal  {question.budget}"
    for size, found in sizes.items():
        seeds = len({one["seed"] for one in found})
        spent = f"{statistics.median(map(_minutes, found)):.1f} minutes a cell (median) on {_devices(found)}"
        yield f"  {size:6} {len(found)} cells of {seeds} seeds, {spent}"
        if different := list(records.differences(found)):
            yield "         refused as a table, for the conditions differ: " + " | ".join(different)
            continue
        for one in verdicts.judge_all(question, found):
            found_out = [one.reason] if one.reason and one.reason != verdicts.HOLDS_ZERO else []
            if one.difference is not None:
                sides = f"{one.claim.better} against {one.claim.worse}"
                found_out.insert(0, f"{sides}, {one.claim.score}: {one.difference}")
            yield f"         {one.outcome}: {one.claim.says} ({'; '.join(found_out)})"
    if not sizes:
        yield f"  found  nothing yet: not run{prices}"


def _devices(found: Sequence[Result]) -> str:
    return " and ".join(sorted({one["conditions"]["device"] for one in found}))


# --- pictures --------------------------------------------------------------------------------------------------------


def check_matplotlib() -> None:
    """Raises a ValueError that names the extra where matplotlib is missing: before hours of training, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "matplotlib is not installed: the report draws learning curves with it, so `pip install 'stvdm[ablate]'`; "
            "single cells (--cell) run without"
        ) from error


def learning_curves(question: Question, found: Sequence[Result]) -> str:
    """A panel for each curve, a line for each variant (mean over seeds, single seeds faint); SVG, which is text."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for one in found for name in one["curves"]))
    panels = len(names) + question.plots_flops
    figure = Figure(figsize=(6.0 * max(1, panels), 4.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, max(1, panels), squeeze=False)[0]
    colours = {variant: colormaps["tab20"](k % 20) for k, variant in enumerate(question.variants)}
    for axis, name in zip(axes, names, strict=False):
        for variant, colour in colours.items():
            seeds = [one["curves"][name] for one in found if one["variant"] == variant and one["curves"].get(name)]
            for points in seeds:
                axis.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.8)
            if seeds:
                axis.plot(*zip(*mean_curve(seeds), strict=True), color=colour, label=variant)
        axis.set(title=name, xlabel="optimiser steps")
        if "error" in name:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if question.plots_flops:
        _against_flops(question, found, axes[-1], colours)
    opened = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": question.name}):  # the same results, the same bytes
        figure.savefig(opened, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in opened.getvalue().splitlines()) + "\n"


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """(step, mean value) at the steps that all curves have."""
    at: dict[float, list[float]] = collections.defaultdict(list)
    for points in curves:
        for step, value in points:
            at[step].append(value)
    return [(step, float(np.mean(values))) for step, values in sorted(at.items()) if len(values) == len(curves)]


def _against_flops(question: Question, found: Sequence[Result], axis: Any, colours: Mapping[str, Any]) -> None:
    score = question.scores[0]
    for variant, colour in colours.items():
        costs = [one["cost"] for one in found if one["variant"] == variant and "steps" in one["cost"]]
        value = over_seeds(values_of(question, found, variant, score))
        if costs and value.num:
            half = 0.0 if math.isnan(value.low) else value.high - value.mean
            flops = costs[0]["flops_per_step"] * costs[0]["steps"]
            axis.errorbar(flops, value.mean, yerr=half, fmt="o", color=colour, label=variant, capsize=3)
    axis.set(title=f"{score} against the FLOPs of training", xlabel="FLOPs", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
