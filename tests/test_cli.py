# SPDX-License-Identifier: Apache-2.0
"""What all commands share: exit statuses, refusals, large pages, examples in the help."""

import os
import shlex
import subprocess
import sys

import pytest

from stvdm import cli


def test_a_refusal_of_the_library_is_one_line_and_status_2(stand_in, failure):
    class Pipeline:
        @staticmethod
        def load(checkpoint, **more):
            raise FileNotFoundError(f"checkpoint={checkpoint}: expected a folder")

    stand_in("stvdm.sampling.pipeline", Pipeline=Pipeline)
    assert failure("generate", "x", "--checkpoint", "nowhere").endswith(
        "stvdm: error: checkpoint=nowhere: expected a folder\n(`--debug` shows where)\n"
    )
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "x", "--checkpoint", "nowhere", "--debug"])


@pytest.mark.parametrize("words", ["--num 0", "--steps -1", "--frames 2.5", "--sampler rk4"])
def test_values_out_of_range_are_refused_before_anything_is_loaded(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "x", *words.split()])
    assert stopped.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_a_key_of_the_config_that_is_given_as_a_flag_is_told_how(failure, config_file):
    words = ("train", "dit", f"--config={config_file}", "--workdir=runs/x")
    assert "no such argument; did you mean --config.total_steps?" in failure(*words, "--total_steps=5")
    assert "did you mean --config.optimizer.learning_rate?" in failure(*words, "--learning_rate=1e-3")


def test_what_is_to_be_trained_is_asked_for_by_its_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config=configs/quickstart.py", "--workdir=runs/x"])
    assert "required: {autoencoder,dit}" in capsys.readouterr().err


def test_a_mistyped_flag_names_its_neighbour(failure):
    assert "--guidence=2: no such argument; did you mean --guidance " in failure("generate", "x", "--guidence=2")


@pytest.mark.parametrize(
    "override, said",
    [
        ("--config.model.widht=128", "has no such key; did you mean model.width"),
        ("--config.learning_rate=1", "has no such key; did you mean optimizer.learning_rate?"),
        ("--config.optimizer.lr=1", "has no such key; did you mean optimizer.learning_rate?"),
        ("--config.lr=1", "has no such key; did you mean optimizer.learning_rate?"),
        ("--config.model.width=wide", "--config.model.width"),
        ("--config.model.width", "expected --config.model.width=VALUE"),
        ("--workdri=x", "did you mean --workdir?"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(config_file, calls, override, said, failure):
    assert said in failure("train", "dit", f"--config={config_file}", "--workdir=w", override)
    assert not calls


def test_whoever_reads_the_output_may_stop():
    command = f"{shlex.quote(sys.executable)} -m stvdm.cli ablate --list | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("attention: ") and "rror" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such thing"), 2),
        (FileNotFoundError("no such file"), 2),
        (OSError("no route to the disk"), 1),
        (FloatingPointError("not finite"), 65),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 2),
    ],
)
def test_the_status_says_whether_it_is_worth_another_try(config_file, stand_in, capsys, error, status):
    def main(config, workdir):
        raise error

    stand_in("stvdm.train.dit", main=main)
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == status
    assert str(error) in capsys.readouterr().err


def test_interrupting_is_not_an_error(config_file, stand_in, capsys):
    def main(config, workdir):
        raise KeyboardInterrupt

    stand_in("stvdm.train.dit", main=main)
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offered", "given", "begins"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, False),
        (None, {}, False),
    ],
)
def test_memory_in_large_pages_is_asked_for_once(offered, given, begins, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")  # and whatever is set is taken back
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if offered:
        (tmp_path / "enabled").write_text(offered + "\n")
    begun = []
    monkeypatch.setattr(cli.os, "execv", lambda *command: begun.append(command))
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setattr(cli.sys, "orig_argv", ["python3", "-X", "dev", "stvdm", "--version"])
    for _ in range(2):  # the second time as the process that was begun
        cli._begin_with_huge_pages(str(tmp_path / "enabled"))
    assert begun == [(sys.executable, [sys.executable, "-X", "dev", "stvdm", "--version"])] * begins


def test_the_process_that_begins_once_more_runs_the_command():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    made = subprocess.run(
        [sys.executable, "-m", "stvdm.cli", "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert made.stdout.startswith("stvdm ")


def test_help_of_every_command_has_an_example_that_parses(capsys):
    plain = ("generate", "train", "supervise", "preprocess", "lora", "evaluate", "ablate", "plan", "import", "export")
    for command in (*plain, "data kinetic_shapes", "data check"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), "--help"])
        assert stopped.value.code == 0
        (example,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  stvdm "))
        _, rest = cli.parser().parse_known_args(shlex.split(example)[1:])
        assert all(argument.startswith("--config.") for argument in rest)
