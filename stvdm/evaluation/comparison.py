# SPDX-License-Identifier: Apache-2.0
"""May results stand in one table? Only if they were made under the same conditions; and the table.

A result says under "conditions" what it was made under: prompts, resolution, length, steps, guidance, seeds, how many
samples, versions, device. What differs is named, file by file and key by key. `stvdm evaluate --compare` sets results
of `stvdm evaluate` side by side, of which only the model may differ (where it lies, the digests of its weights and of
its autoencoder's, its path from noise to data), since that is what is compared; cells of ablations have a rule more
(`stvdm.ablations.results`).

    stvdm evaluate --compare one.json other.json
    found = read(paths);  refuse(differences(found), "evaluate again");  print(as_markdown(found))

A difference of two results has the interval that follows from those of the two (MOVER: Newcombe 1998, Stat. Med. 17:873
and 17:2635; Zou & Donner 2008, https://doi.org/10.1002/sim.3095):

    low  = d - sqrt((m1 - l1)² + (u0 - m0)² - 2 r (m1 - l1) (u0 - m0)),     d = m1 - m0
    high = d + sqrt((u1 - m1)² + (m0 - l0)² - 2 r (u1 - m1) (m0 - l0))

with r the correlation over the prompts of the two models' scores where they had the same prompts (*paired*), else 0. It
is sound also where all clips are right, or none. Where a model was not judged on every clip, as it lost what was to be
measured, means and correlation are over the clips that both were judged on.
"""

from __future__ import annotations

import collections
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from stvdm.evaluation import physics, result_file

Result = dict[str, Any]
Conditions = Mapping[str, Any]
Cell = Mapping[str, Any]  # of `physics.Row.cell`

OF_FLOW_LOSS = {"autoencoder_sha256": "autoencoder", "flow_path": "path"}  # give it its unit
OF_THE_MODEL = ("checkpoint", "model_sha256", *OF_FLOW_LOSS)  # what is compared, and so may differ
FLOW_LOSS = "flow loss (of one autoencoder)"
SCALARS = {  # of a result, without intervals, beside distances: row -> where it is
    "change from frame to frame": ("flicker", "generated"),
    FLOW_LOSS: ("flow_loss",),
    "autoencoder PSNR, dB": ("reconstruction", "psnr_db"),
    "autoencoder SSIM": ("reconstruction", "ssim"),
    "autoencoder excess flicker": ("reconstruction", "excess_flicker"),
    "autoencoder change error": ("reconstruction", "change_error"),
    "autoencoder latent flicker": ("reconstruction", "latent_flicker"),
}


# --- the same conditions? --------------------------------------------------------------------------------------------


def differing(got: Conditions, expected: Conditions) -> Iterator[str]:
    """ "key=ours, expected theirs" for each key that differs, or that only one of them has.

    Mappings within are looked into ("versions.jax"); numbers are compared to the six digits that files keep.
    """
    ours, theirs = flat(got), flat(expected)
    for key in sorted({*ours, *theirs}):
        one, other = (_plain(side[key]) if key in side else "nothing" for side in (ours, theirs))
        if one != other:
            yield f"{key}={one}, expected {other}"


def commonest(mappings: Iterable[Conditions]) -> Conditions:
    """The one that most of them equal; the first of them among equals; {} of none."""
    texts = collections.Counter(json.dumps(mapping, sort_keys=True) for mapping in mappings)
    return json.loads(texts.most_common(1)[0][0]) if texts else {}


def refuse(differences: Iterable[str], remedy: str) -> None:
    """Raises if there are any.

    Raises:
      ValueError: a line for each difference, and what to do.
    """
    found = list(differences)
    if found:
        raise ValueError(
            "these results were made under other conditions, and make no table with the rest:\n"
            + "\n".join(f"  {line}" for line in found)
            + f"\nso {remedy}, or look at all of them together with --mixed"
        )


def flat(conditions: Conditions, prefix: str = "") -> dict[str, Any]:
    """Mappings within as keys with dots."""
    found: dict[str, Any] = {}
    for key, value in conditions.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value: Any) -> str:
    """As it reads after a round trip through the file, so that tuples are lists."""
    return json.dumps(result_file.rounded(value), sort_keys=True)


# --- results of `stvdm evaluate` -------------------------------------------------------------------------------------


def main(
    paths: Sequence[epath.PathLike],
    *,
    mixed: bool = False,
    output: epath.PathLike | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> str:
    """Prints results side by side, the first of them what the others are held against; and writes that to ``output``.

    Raises:
      ValueError: for fewer than two results, files that hold none, or (unless ``mixed``) differing conditions.
    """
    found = read(paths)
    if not mixed:
        by_path = dict(zip(map(str, paths), found.values(), strict=True))
        refuse(differences(by_path), "evaluate again under the conditions of the first")
    text = as_markdown(found)
    print(text)
    if output is not None:
        target = epath.Path(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        say(f"in {output}")
    return text


def read(paths: Sequence[epath.PathLike]) -> dict[str, Result]:
    """The results in files, by the shortest names that tell these apart.

    Raises:
      ValueError: for fewer than two files, one named twice, or one that is not of `stvdm evaluate`.
    """
    names = _names([str(path) for path in paths])
    if len(names) < 2:
        raise ValueError(f"{len(names)} result: expected two or more to compare, so name another file.")
    found = {}
    for name, path in zip(names, paths, strict=True):
        result = result_file.read(path)
        if lacking := [key for key in ("conditions", "items") if not isinstance(result.get(key), dict)]:
            raise ValueError(
                f"{path}: without {' and '.join(lacking)}: expected a result of `stvdm evaluate --output={path}`."
            )
        found[name] = result
    return found


def differences(results: Mapping[str, Result]) -> Iterator[str]:
    """A line for each result whose conditions, but for its model, are not those of the first."""

    def shared(result: Result) -> dict[str, Any]:
        return {key: value for key, value in result["conditions"].items() if key not in OF_THE_MODEL}

    (first, reference), *others = results.items()
    for name, result in others:
        keys = [key.replace(", expected ", f", in {first} ") for key in differing(shared(result), shared(reference))]
        if keys:
            yield f"{name}: {'; '.join(keys)}"


def difference(one: Cell, reference: Cell, correlation: float = 0.0) -> tuple[float, float, float]:
    """(difference of the means, low, high) of two cells with "mean", "low", "high": MOVER, see above."""
    m1, l1, u1 = (one[key] for key in ("mean", "low", "high"))
    m0, l0, u0 = (reference[key] for key in ("mean", "low", "high"))

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))

    return m1 - m0, m1 - m0 - reach(m1 - l1, u0 - m0), m1 - m0 + reach(u1 - m1, m0 - l0)


def pairs_of(one: Result, reference: Result, item: str) -> np.ndarray | None:
    """(n, 2): scores of two results on the clips that both were judged on; None if they had not the same prompts."""
    same = [result["conditions"].get("prompts_sha256") for result in (one, reference)]
    scores = [result.get("scores", {}).get(item) for result in (one, reference)]
    if None in (*same, *scores) or same[0] != same[1]:
        return None
    return np.asarray([pair for pair in zip(*scores, strict=True) if None not in pair], np.float64).reshape(-1, 2)


def correlation(pairs: np.ndarray) -> float:
    """Of the columns of (n, 2) scores; 0 of fewer than 3, and where one of the two scores all clips alike."""
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return 0.0
    return float(np.asarray(np.corrcoef(pairs.T))[0, 1])


def incomparable(one: Result, reference: Result) -> str:
    """Why the flow losses of two results have no difference, in place of it: their units differ, or may; else ""."""
    for key, what in OF_FLOW_LOSS.items():
        ours, theirs = (result["conditions"].get(key) for result in (one, reference))
        if ours is None or theirs is None:
            return f"{what} not said"
        if ours != theirs:
            return f"other {what}"
    return ""


def as_markdown(results: Mapping[str, Result]) -> str:
    """The table: a row for each item, a column for each result, and for each but the first its difference to the first.

    If conditions differ, it says so beneath, and which.
    """
    (first, reference), *others = results.items()
    titles = ["", "clips", *results, *(f"{name} - {first}" for name, _ in others)]
    rows: list[list[str]] = []
    for item in dict.fromkeys(item for result in results.values() for item in result["items"]):
        if not any({"generated", "not_reported"} & result["items"].get(item, {}).keys() for result in results.values()):
            continue  # what is said of reconstructed clips alone
        cells = {name: _generated(result, item) for name, result in results.items()}
        row = [item, _counts(cells.values()), *(_cell(results[name], item, cell) for name, cell in cells.items())]
        rows.append([*row, *(_between(result, reference, item) for _, result in others)])
    compared = " ".join(text for row in rows for text in row[2 + len(results) :])
    far = {
        name: ("distances", name, "generated") for result in results.values() for name in result.get("distances", {})
    }
    for label, where in (far | SCALARS).items():
        values = {name: _at(result, where) for name, result in results.items()}
        if any(value is not None for value in values.values()):
            apart = [
                (label == FLOW_LOSS and incomparable(result, reference)) or _signed(values[name], values[first])
                for name, result in others
            ]
            rows.append([label, "", *("" if v is None else f"{v:.4g}" for v in values.values()), *apart])
    parts = ["\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *rows])]
    some = " *Of n*: over the n clips that both were judged on." if "*of " in compared else ""
    how = "paired where nothing else is said" if "unpaired" in compared else "paired over the same prompts"
    parts.append(
        f"Means of generated clips with 95 % intervals; differences to {first}, {how}, in bold where the interval "
        "leaves 0 outside. One training each: what another seed of training would change is not in these intervals."
        + some
    )
    lines = list(differences(results))
    if lines:
        parts.append("**Mixed**: made under other conditions than the first, so that not the model alone differs:")
        parts.append("\n".join(f"- {line}" for line in lines))
    models = [
        f"- {name}: {result['conditions'].get('checkpoint', 'a model')}, "
        f"sha256 {str(result['conditions'].get('model_sha256', 'not said'))[:12]}"
        for name, result in results.items()
    ]
    shared = dict(flat(reference["conditions"]))
    told = [f"{key} {shared[key]}" for key in _TOLD if key in shared]
    parts += ["Models:", "\n".join(models), f"Conditions of {first}: {'; '.join(told)}."]
    return "\n\n".join(parts) + "\n"


_TOLD = (
    "prompts",
    "num_frames",
    "height",
    "width",
    "fps",
    "sampler",
    "steps",
    "guidance",
    "clip_seeds",
    "versions.stvdm",
    "versions.jax",
    "device",
)


def _names(paths: Sequence[str]) -> list[str]:
    """Stems; with the folder before where stems are alike; else the paths."""
    for length in range(1, 4):
        names = ["/".join(Path(path).with_suffix("").parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    if len(set(paths)) < len(paths):
        twice = collections.Counter(paths).most_common(1)[0][0]
        raise ValueError(f"{twice}: named twice, expected different results, so leave one out.")
    return list(paths)


def _generated(result: Result, item: str) -> Cell | None:
    return result["items"].get(item, {}).get("generated")


def _counts(cells: Iterable[Cell | None]) -> str:
    counts = [str(cell["num"]) for cell in cells if cell is not None]
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def _cell(result: Result, item: str, cell: Cell | None) -> str:
    if cell is None:
        return "not reported" if "not_reported" in result["items"].get(item, {}) else "-"
    return physics.told(cell)


def _between(one: Result, reference: Result, item: str) -> str:
    ours, theirs = (_generated(result, item) for result in (one, reference))
    if ours is None or theirs is None:
        return ""
    pairs = pairs_of(one, reference, item)
    if pairs is None:
        return f"{_apart(ours, theirs)} unpaired"
    some = len(pairs) < max(ours["num"], theirs["num"])
    if len(pairs) == 0:
        return "no clip that both were judged on"
    if some:
        ours, theirs = (physics.row(scores).cell() for scores in pairs.T)
    return _apart(ours, theirs, correlation(pairs)) + f" *of {len(pairs)}*" * some


def _apart(one: Cell, reference: Cell, correlation: float = 0.0) -> str:
    """`difference` in words; without an interval where one of the two has none."""
    if one["low"] is None or reference["low"] is None:
        return f"{one['mean'] - reference['mean']:+.3f}"
    found = difference(one, reference, correlation)
    text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)
    return f"**{text}**" if found[1] > 0 or found[2] < 0 else text


def _at(result: Any, where: Sequence[str]) -> float | None:
    for key in where:
        result = result.get(key) if isinstance(result, Mapping) else None
    return result


def _signed(value: float | None, reference: float | None) -> str:
    return "" if value is None or reference is None else f"{value - reference:+.3g}"
