# SPDX-License-Identifier: Apache-2.0
"""The one console command: `stvdm generate | train | supervise | preprocess | lora | evaluate | ablate | plan |
data | import | export`.

    stvdm generate "a red ball bounces to the right"
    stvdm train autoencoder --config=configs/quickstart.py:autoencoder --workdir=runs/autoencoder --config.seed=1

Each command (`stvdm.commands`) tells its options, imports what it needs when it runs, calls one function of the library
and prints what came of it. What the user can put right (ValueError, a file or a package that is missing, a full disk, a
loss that is not finite) is one line; `--debug` shows where it came from. Exit status:

    0    done
    1    something around us failed, which may pass: a disk, a network
    2    refused: the same command would be again
    65   a training stopped, as its losses were not finite
    75   a training was told to stop, and has saved
    130  interrupted
"""

import argparse
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import stvdm
from stvdm.commands import (
    ablate,
    data,
    evaluate,
    export_weights,
    generate,
    import_weights,
    lora,
    plan,
    preprocess,
    supervise,
    train,
)
from stvdm.train import supervisor

COMMANDS = (generate, train, supervise, preprocess, lora, evaluate, ablate, plan, data, import_weights, export_weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    `supervise` leaves with that of what it supervised, or those of `stvdm.train.supervisor`.
    """
    if argv is None:
        _begin_with_huge_pages()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser().parse_known_args(argv)
    args.overrides = rest
    args.argv = argv
    try:
        if rest:
            _refuse_unknown(rest, argv, overrides_allowed=args.takes_overrides)
        with warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _warn
            status: int | None = args.run(args)
    except KeyboardInterrupt:
        print("\nstvdm: interrupted", file=sys.stderr)
        return _left(130)
    except BrokenPipeError:  # what reads the output, e.g. head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        return _left(141)
    except RuntimeError as error:  # of which JAX's are
        if args.debug or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"stvdm: error: this does not fit into the device's memory: {str(error).splitlines()[0]}\n"
            "Make clips or batches smaller (--config.data.buckets), compute more of them again "
            "(--config.model.remat=everything), or average micro-batches (--config.optimizer.accumulate).",
            file=sys.stderr,
        )
        return _left(supervisor.REFUSED)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:  # of imports, e.g. gcsfs, for gs://
        if args.debug:
            raise
        print(f"stvdm: error: {error}\n(`--debug` shows where)", file=sys.stderr)
        if isinstance(error, FloatingPointError):
            return _left(supervisor.DIVERGED)
        may_pass = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        return _left(1 if may_pass else supervisor.REFUSED)
    return status or 0


def _left(status: int) -> int:
    """The status; one of several processes of a training ends here, and does not wait for the others."""
    supervisor.leave_at_once(status)
    return status


def parser() -> argparse.ArgumentParser:
    """The whole command line, for `main`, and for the test that reads the commands in the README."""
    root = argparse.ArgumentParser(
        prog="stvdm",
        description="Train and sample video diffusion transformers, from a laptop to a TPU pod.",
        epilog="`stvdm COMMAND --help` explains each command.",
    )
    root.add_argument("--version", action="version", version=f"stvdm {stvdm.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return root


def _refuse_unknown(rest: Sequence[str], argv: Sequence[str], *, overrides_allowed: bool) -> None:
    """What argparse did not know may only be overrides of a config, `--config.key=value`."""
    for argument in rest:
        if re.match(r"--(no)?config\.\w", argument) and overrides_allowed:
            if "=" not in argument:
                raise ValueError(f"{argument}: expected {argument}=VALUE, so join the two with '='")
            continue
        name = argument.split("=", 1)[0]
        near = difflib.get_close_matches(name, sorted(_flags_of(argv)), n=3)
        if overrides_allowed:
            near = [*_overrides_called(name.lstrip("-")), *near]
        raise ValueError(f"{argument}: no such argument" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _flags_of(argv: Sequence[str]) -> Iterator[str]:
    """Every --flag of the command that argv names."""
    found = parser()
    for word in argv:
        for action in found._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                found = action.choices[word]
                break
    for action in found._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))


def _overrides_called(name: str) -> Iterator[str]:
    """The overrides of keys of this name, which are given as --config.KEY."""
    from stvdm import config

    keys = {**config.defaults("autoencoder"), **config.defaults("dit")}
    return (f"--config.{key}" for key in keys if name in (key, key.rpartition(".")[2]))


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """What the library warns of, without the line of source that Python shows beside it."""
    print(f"stvdm: warning: {message}", file=sys.stderr)


def _begin_with_huge_pages(modes: str = "/sys/kernel/mm/transparent_hugepage/enabled") -> None:
    """Has memory come in large pages, for which this process begins once more: glibc reads the setting at its start.

    On a CPU every step of a program takes its memory anew, and touching it page by page is a good part of a small
    step. Linux gives large pages to those that ask ("madvise"). Whoever sets GLIBC_TUNABLES, empty too, is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux") or not sys.executable:
        return
    try:
        offered = "[madvise]" in Path(modes).read_text("ascii")
    except OSError:
        return
    if offered:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
