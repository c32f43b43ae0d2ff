# SPDX-License-Identifier: Apache-2.0
"""`stvdm evaluate`: scores of a model, of the metrics themselves, and results side by side."""

import argparse
import os
import shlex
from typing import Any

from stvdm.commands import parts

OF_SAMPLING = ("checkpoint", "steps", "guidance", "sampler", "batch", "features")


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "evaluate",
        run,
        "sample held-out prompts, track what came out, and score it",
        "stvdm evaluate --checkpoint=runs/dit --num=200 --output=results.json",
        "Prints each score with its 95 % interval, beside the same score of real clips, of reconstructed ones, and of "
        "real clips of other prompts, which is chance.",
    )
    parts.add_sampling(command)
    command.add_argument("--num", type=parts.count, default=200, metavar="N", help="held-out prompts (default 200)")
    command.add_argument(
        "--batch", type=parts.count, default=16, metavar="B", help="clips sampled at once (default 16)"
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument(
        "--damage",
        action="store_true",
        help="evaluate the metrics in place of a model: do they see damage of known kind and strength to real clips?",
    )
    instead.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="set results side by side, with their differences to the first; refused if more than the model differs",
    )
    command.add_argument("--mixed", action="store_true", help="compare them all the same, and say what differs")
    command.add_argument(
        "--output",
        metavar="PATH",
        help="a .json, beside which clips go, default: results.json; with --damage a folder, default: outputs/damage; "
        "with --compare a file for the table, default: none",
    )
    parts.add_overwrite(command)
    command.add_argument(
        "--features",
        metavar="DIR",
        help="adds scores over published networks whose safetensors lie in DIR: clip/ (CLIP score), i3d/ (FVD), "
        "videomae/ (content-debiased FVD), lpips/; any of them",
    )


def run(args: argparse.Namespace) -> None:
    if args.mixed and not args.compare:
        raise ValueError("--mixed: without effect but for --compare, so name results with that, or leave it out")
    if args.compare:
        given = parts.changed(args, *OF_SAMPLING, "num", "seed")
        parts.refuse_without_effect(given, "--compare, which makes no clips")
    elif args.damage:
        parts.refuse_without_effect(parts.changed(args, *OF_SAMPLING), "--damage, which samples no model")
    output = args.output or ("" if args.compare else "outputs/damage" if args.damage else "results.json")
    output = os.path.expanduser(output)  # --output=~/a.json, which shells leave as it is
    if output:
        parts.refuse_existing(output, option="--output", overwrite=args.overwrite)
    if not (args.compare or args.damage):
        from etils import epath

        for suffix in (".png", ".gif"):  # the clips, beside the result
            picture = str(epath.Path(output).with_suffix(suffix))
            parts.refuse_existing(picture, option=f"--output={output}: picture", overwrite=args.overwrite)
    if args.compare:
        from stvdm.evaluation import comparison

        comparison.main(args.compare, mixed=args.mixed, output=output or None)
        return
    parts.keep_compiled_programs()
    if args.damage:
        from stvdm.evaluation import agreement

        agreement.main(
            num=args.num,
            seed=args.seed,
            output=output,
            command=shlex.join(["stvdm", *args.argv]),
        )
        return
    from stvdm.evaluation import run as evaluation

    evaluation.main(
        None if args.checkpoint == parts.BUNDLED else args.checkpoint,
        num=args.num,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        batch=args.batch,
        output=output,
        features=args.features,
    )
