# SPDX-License-Identifier: Apache-2.0
"""`stvdm ablate`: named grids of variants over seeds."""

import argparse
import os
from typing import Any

from stvdm.commands import parts

ABLATION_SIZES = ("tiny", "small", "pod")
OF_RESULTS = ("num", "batch", "config")  # options that results depend on
OF_RUNNING = ("seeds", "cell", "workdir", *OF_RESULTS)


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "ablate",
        run,
        "run a named grid of variants over seeds, and say what it shows and how sure that is",
        "stvdm ablate attention --size=tiny",
        "The same command again goes on where it stopped. --list says what each ablation asks, costs and found. Any "
        "key of the transformer's base config can be changed with --config.KEY=VALUE. Results are kept cell by cell; "
        "the report is made of them alone.",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="which ablation; --list names them")
    command.add_argument("--list", action="store_true", help="what each asks, costs and found")
    command.add_argument(
        "--size", choices=ABLATION_SIZES, default="tiny", help="tiny: two CPU cores; small: one accelerator; pod"
    )
    command.add_argument(
        "--seeds", type=parts.count, default=3, metavar="N", help="trainings of each variant (default 3)"
    )
    command.add_argument("--cell", metavar="VARIANT:SEED", help="run this one alone, and leave the report as it is")
    command.add_argument("--report", action="store_true", help="run nothing, write the report anew")
    command.add_argument(
        "--mixed", action="store_true", help="take results made under differing conditions, and say so"
    )
    command.add_argument("--num", type=parts.count, default=256, metavar="N", help="clips to evaluate on (default 256)")
    command.add_argument(
        "--batch", type=parts.count, default=32, metavar="B", help="clips sampled at once (default 32)"
    )
    command.add_argument("--workdir", default="runs/ablations", metavar="DIR", help="of trainings and latents")
    command.add_argument("--results", default="results/ablations", metavar="DIR", help="default: results/ablations")
    command.add_argument(
        "--config", default="configs/ablation.py", metavar="FILE.py", help="bases: its variants SIZE, SIZE_autoencoder"
    )
    command.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    from stvdm.ablations import report

    args.results = os.path.expanduser(args.results)  # --results=~/a, which shells leave as it is
    if args.list:
        given = parts.changed(args, *OF_RUNNING, "name", "size", "report", "mixed")
        parts.refuse_without_effect([*given, *args.overrides], "--list")
        print(report.listing(args.results))
        return
    if args.report:
        given = [*parts.changed(args, *OF_RUNNING), *args.overrides]
        parts.refuse_without_effect(given, "--report, which runs nothing")
    elif args.cell:
        parts.refuse_without_effect(parts.changed(args, "seeds"), "--cell, which names its seed")
    import jax

    from stvdm.ablations import questions

    if not args.name:
        raise ValueError(f"NAME is missing: expected one of {', '.join(questions.QUESTIONS)} (or --list)")
    question = questions.find(args.name)
    folder: Any = f"{args.results}/{question.name}/{args.size}"  # which may be gs://
    if not args.report:
        if not args.cell:
            report.check_matplotlib()
        from stvdm.train import supervisor

        supervisor.join()
        parts.keep_compiled_programs()
        from stvdm import config as config_lib
        from stvdm.ablations import cells, edits

        bases = edits.Run(
            dit=config_lib.load(f"{args.config}:{args.size}", args.overrides),
            autoencoder=config_lib.load(f"{args.config}:{args.size}_autoencoder"),
        )
        folder = cells.main(
            question,
            bases,
            size=args.size,
            num_seeds=args.seeds,
            cell=args.cell,
            num=args.num,
            batch=args.batch,
            workdir=args.workdir,
            folder=args.results,
            mixed=args.mixed,
            options=[*parts.changed(args, *OF_RESULTS), *args.overrides],
        )
    if args.cell and not args.report:
        print(folder)
    elif args.report or jax.process_index() == 0:  # which has written the results, where others may see none
        print(report.write(question, folder, mixed=args.mixed))
