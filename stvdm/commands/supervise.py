# SPDX-License-Identifier: Apache-2.0
"""`stvdm supervise`: a command that is started again when it dies or freezes."""

import argparse
from typing import Any

from stvdm.commands import parts
from stvdm.train import compiler_flags


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "supervise",
        run,
        "keep a training going: start it again when it dies or freezes",
        "stvdm supervise -- stvdm train dit --config=configs/quickstart.py:dit --workdir=runs/dit",
        "On SIGTERM the training is asked to save and to leave. Exit status: 0 finished, 75 saved and to be started "
        "again, any other: given up. On a TPU slice every worker runs this, with --chip; launch/ does that.",
    )
    command.add_argument("--processes", type=parts.count, default=1, metavar="N", help="of one job, on this machine")
    command.add_argument(
        "--chip", choices=tuple(compiler_flags.COMPILER_FLAGS), help="this machine is a worker of a slice of such chips"
    )
    command.add_argument(
        "--timeout-s",
        type=parts.count,
        default=1800,
        metavar="S",
        help="frozen after so long without a step (default 1800)",
    )
    command.add_argument("--grace-s", type=parts.count, default=120, metavar="S", help="time to save in (default 120)")
    command.add_argument(
        "--max-failures",
        type=parts.count,
        default=5,
        metavar="N",
        help="in a row without progress, to give up (default 5)",
    )
    command.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to keep going")


def run(args: argparse.Namespace) -> int:
    from stvdm.train import supervisor

    return supervisor.supervise(
        args.program[1:] if args.program[:1] == ["--"] else args.program,
        processes=args.processes,
        chip=args.chip,
        timeout=args.timeout_s,
        grace=args.grace_s,
        max_failures=args.max_failures,
    )
