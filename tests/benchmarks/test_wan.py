# SPDX-License-Identifier: Apache-2.0
"""The benchmark still runs: every network and work, at a size that says nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HAS_DIFFUSERS = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


@pytest.mark.slow
def test_sides_run_beside_each_other_and_agree():
    sides = ["ours", "whole", *(["eager"] if HAS_DIFFUSERS else [])]
    command = [sys.executable, "-m", "tests.benchmarks.wan", "--sizes=tiny", "--dtypes=float32", "--seconds=0.1"]
    run = subprocess.run(
        [*command, "--sides", *sides], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if " tiny | " in line]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        (f"{network} tiny", work, side)
        for network, works in (("transformer", ("forward", "gradient")), ("autoencoder", ("encode", "decode")))
        for work in works
        for side in sides
        if (network, side) != ("transformer", "whole")
    ], run.stderr
    for row in rows:
        assert float(row[4].split()[0]) > 0 and int(row[6]) > 10, row
        if HAS_DIFFUSERS and row[3] != "eager":
            assert float(row[-1]) < 1e-4, row
