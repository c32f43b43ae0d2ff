# SPDX-License-Identifier: Apache-2.0
"""Results of ablations on disk: a small JSON file for each cell, and what makes several of them one table.

    results/ablations/NAME/SIZE/VARIANT-SEED.json

A result holds the scores, what they cost, the command, and two groups of keys that say what it is a result of:

    conditions    equal in all cells of a grid: the base config, prompts, ways of sampling, versions, device
    edit          what the variant changed, equal in all cells of the variant

Beside them stand "sources", a digest of the code that made it, and in its cost the machine: told, but not compared.

A config key that is not among the conditions had not been invented, and has its default.

Files are written whole or not at all.

    write(folder, result);  results = read(folder);  check(results)
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from stvdm import config as base
from stvdm.evaluation import comparison, result_file

Result = dict[str, Any]


def file_of(folder: epath.PathLike, variant: str, seed: int) -> epath.Path:
    return epath.Path(folder) / f"{variant}-{seed}.json"


def write(folder: epath.PathLike, result: Result) -> None:
    """Write the result of one cell; numbers keep six digits."""
    with result_file.whole(file_of(folder, result["variant"], result["seed"])) as file:
        file.write((json.dumps(result_file.rounded(result), indent=1) + "\n").encode())


def read(folder: epath.PathLike) -> list[Result]:
    """All results in a folder, ordered by variant and seed; none if there is no folder."""
    source = epath.Path(folder)
    paths = source.glob("*-*.json") if source.exists() else ()
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda one: (one["variant"], one["seed"]))


def check(results: Sequence[Result], *, expected: Mapping[str, Any] | None = None) -> None:
    """Refuses results that were not made under the same conditions.

    Args:
      expected: the conditions that all should have; None: those that most of them have.

    Raises:
      ValueError: naming each file that differs, and in which keys.
    """
    comparison.refuse(
        differences(results, expected=expected),
        "put the grid elsewhere, with --results=DIR, or delete those files and run their cells again",
    )


def differences(results: Sequence[Result], *, expected: Mapping[str, Any] | None = None) -> Iterator[str]:
    """A line for each result whose conditions are not as expected, or whose edit is not that of its variant."""
    if expected is None:
        expected = comparison.commonest(result["conditions"] for result in results)
    by_variant = collections.defaultdict(list)
    for result in results:
        by_variant[result["variant"]].append(result["edit"])
    edits = {variant: comparison.commonest(found) for variant, found in by_variant.items()}
    for result in results:
        keys = [*_differing(result["conditions"], expected), *_differing(result["edit"], edits[result["variant"]])]
        if keys:
            yield f"{result['variant']}-{result['seed']}.json: {'; '.join(keys)}"


def _differing(got: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    return comparison.differing(_completed(got), _completed(expected))


def _completed(conditions: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the keys that configs had not yet when a result was made, which have their defaults."""
    kinds = {key.partition(".")[0] for key in conditions} & {"dit", "autoencoder"}
    usual = {f"{kind}.{key}": value for kind in kinds for key, value in base.defaults(kind).items()}
    return {**usual, **conditions}
