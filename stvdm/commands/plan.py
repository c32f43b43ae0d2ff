# SPDX-License-Identifier: Apache-2.0
"""`stvdm plan`: what a training costs and whether it fits, before anything is rented."""

import argparse
import json
import os
import runpy
import sys
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "plan",
        run,
        "what a training run costs and whether it fits, before anything is rented",
        "stvdm plan --config=configs/dit_kinetic.py --autoencoder=configs/autoencoder_kinetic.py --topology=v5e:4x4",
        "With --compile or --topology the training step is compiled by the real TPU compiler, which needs no TPU (it "
        "is in the extra 'tpu', for Linux). Nothing is run. What was compiled before is answered from a cache.",
    )
    parts.add_config(command)
    command.add_argument(
        "--autoencoder", metavar="FILE.py|DIR", help="config or folder of the autoencoder (default: the config's own)"
    )
    command.add_argument("--compile", action="store_true", help="compile the step for the slice of the config")
    command.add_argument("--topology", metavar="CHIP:SHAPE", help="compile it for another, e.g. v5p:4x4x4 or v6e:8x8")
    command.add_argument("--slices", type=parts.count, metavar="N", help="equal slices (default: the config's)")
    command.add_argument(
        "--search", action="store_true", help="find the mesh, remat policy and micro-batches that fit and are quickest"
    )
    command.add_argument(
        "--tries", type=parts.count, default=16, metavar="N", help="programs a search compiles (default 16)"
    )
    command.add_argument(
        "--quick", action="store_true", help="compile with less effort than a run: half the time, a little more memory"
    )
    command.add_argument("--variants", action="store_true", help="compile every variant of FILE.py; prints a table")
    command.add_argument("--price", type=float, metavar="P", help="of a chip for an hour, to tell what clips cost")
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> None:
    if not (args.compile or args.topology or args.search or args.variants):
        given = parts.changed(args, "slices", "quick", "price")
        parts.refuse_without_effect(given, "a plan by arithmetic alone, without --compile")
    if not args.search:
        parts.refuse_without_effect(parts.changed(args, "tries"), "a plan without --search")
    if args.variants:
        parts.refuse_without_effect(parts.changed(args, "search"), "--variants")
        if ":" in args.config:
            raise ValueError(f"--config={args.config}: --variants plans all of a file, so leave :VARIANT out")
    # Before JAX starts: the compiler for TPUs beside a CPU, without asking around for a TPU that is not there.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from stvdm import config as config_lib
    from stvdm.planning import report, search
    from stvdm.planning.planner import Planner

    def planner(spec: str) -> Planner:
        config = config_lib.load(spec, args.overrides)
        return Planner(config, autoencoder=args.autoencoder, topology=args.topology, num_slices=args.slices)

    def priced(plan: dict[str, Any]) -> dict[str, Any]:
        return report.with_cost(plan, price=args.price)

    def show(plan: dict[str, Any]) -> None:
        print(json.dumps(priced(plan), indent=2) if args.json else report.as_text(priced(plan)))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.variants:
        variants = runpy.run_path(args.config).get("VARIANTS")
        if not variants:
            raise ValueError(f"--variants: {args.config} lists none in VARIANTS, so plan it without.")
        made = {}
        for name in variants:
            say(f"compiling {name}")
            made[name] = priced(planner(f"{args.config}:{name}").compiled(quick=args.quick))
        print(json.dumps(made, indent=2) if args.json else report.as_table(made))
    elif args.search:
        asked = planner(args.config)
        found = asked.search(tries=args.tries, say=say)
        plan = None
        if found.best:
            plan = asked.compiled(search.edited(asked.config, found.best.mesh, found.best.rung), quick=args.quick)
        if args.json:
            print(json.dumps({**priced(plan or asked.outline()), "search": found.to_json()}, indent=2))
        else:
            print(search.as_text(found))
            show(plan or asked.outline())
    else:
        asked = planner(args.config)
        show(asked.compiled(quick=args.quick) if args.compile or args.topology else asked.outline())
