# SPDX-License-Identifier: Apache-2.0
"""The README is true: its tree is the tree, its commands are commands, its test command is what .ci/run does."""

import fnmatch
import itertools
import re
import shlex
from pathlib import Path

import pytest

from stvdm import cli
from stvdm import config as config_lib
from stvdm.sampling.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "launch/README.md", "results/README.md")


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def commands(name: str) -> list[str]:
    """Every `stvdm ...` of a document's code blocks, also after `... &&` and after the `--` of supervise and launch."""
    text = (ROOT / name).read_text("utf-8")
    found = blocks(text, "bash") + re.findall(r"(?:^    .*\n)+", text, re.M)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(found)).splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|(?<= )-- ", line)]
    return [part + " -- true" * part.startswith("stvdm supervise") for part in parts if part.startswith("stvdm ")]


PATH = re.compile(r"[\w.-]+(\.\w+|/)|LICENSE")
COMMANDS = [(name, command) for name in DOCUMENTS for command in commands(name)]


def tree() -> set[str]:
    """The paths in the README's tree: two spaces of indentation a level; names, then a remark, two spaces apart."""
    (text,) = (block for block in blocks(README, "") if "stvdm/\n" in block)
    paths, folders = set(), [""]
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in itertools.takewhile(PATH.fullmatch, re.split(r"  +", line.strip())):
            paths.add("".join(folders[: depth + 1]) + name)
            if name.endswith("/"):
                folders[depth + 1 :] = [name]
    return paths


def test_every_path_of_the_tree_exists():
    assert sorted(path for path in tree() if not (ROOT / path).exists()) == []


def test_every_file_is_in_the_tree():
    top = {path.name + "/" * path.is_dir() for path in ROOT.iterdir() if not path.name.startswith(".")}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] not in ("", "#")]
    leftover = {name for name in top if any(fnmatch.fnmatch(name.strip("/"), pattern) for pattern in ignored)}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "stvdm").rglob("*.py") if path.name != "__init__.py"}
    assert sorted((top - leftover | modules) - tree()) == []


def test_there_are_commands_to_check():
    assert {shlex.split(command)[1] for _, command in COMMANDS} >= {
        "generate",
        "train",
        "evaluate",
        "preprocess",
        "data",
    }


@pytest.mark.parametrize("name, command", COMMANDS)
def test_every_command_is_one(name, command):
    arguments = shlex.split(command)[1:]
    _, overrides = cli.parser().parse_known_args(arguments)
    cli._refuse_unknown(overrides, arguments, overrides_allowed="--config" in command)


@pytest.mark.parametrize("name, command", [(n, c) for n, c in COMMANDS if "--config=" in c])
def test_every_config_of_a_command_loads(name, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, overrides = cli.parser().parse_known_args(shlex.split(command)[1:])
    config = config_lib.load(args.config, overrides)
    assert args.command != "train" or config.kind == args.stage


def test_the_test_command_is_what_ci_runs():
    (command,) = (block for block in blocks(README, "bash") if "pytest" in block)
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    for part in ("-m venv", "pip install --quiet -e '.[test]'".replace("--quiet ", ""), "pytest"):
        assert part in command
        assert part in ci.replace("--quiet ", "")


def test_the_bundled_model_can_read_the_prompts_of_the_commands():
    tokenizer = Pipeline.load().tokenizer
    prompts = [
        prompt
        for _, command in COMMANDS
        if "generate" in command and "--checkpoint" not in command
        for prompt in cli.parser().parse_args(shlex.split(command)[1:]).prompts
    ]
    assert prompts
    assert [tokenizer.problem(prompt) for prompt in prompts] == [""] * len(prompts)


def test_linked_files_exist():
    for name in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / name).read_text("utf-8")):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"
