# SPDX-License-Identifier: Apache-2.0
"""What a linter does not look at."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("stvdm", "configs", "tests", "launch", "notebooks")
SOURCES = [ROOT / "setup.py", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
DOCUMENTED = [path for path in SOURCES if path.name != "__init__.py" and (ROOT / "tests") not in path.parents]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_licence_is_named_on_the_first_line(path):
    assert path.read_text("utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("path", DOCUMENTED, ids=name)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_there_is_no_drawer_for_odds_and_ends():
    odd = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py", "registry.py", "factory.py"}
    assert not [name(path) for path in SOURCES if path.name in odd]
