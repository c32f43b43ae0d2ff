# SPDX-License-Identifier: Apache-2.0
"""`stvdm export`: a model of Wan's shape, as other tools load it; any model as programs of StableHLO."""

import argparse
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "export",
        run,
        "write a model of Wan's shape as diffusers or the authors' code loads it, any model as StableHLO",
        "stvdm export --from=runs/wan --to=out/wan --format=diffusers --dtype=bfloat16",
        "Sharded safetensors with their index, config.json, and for diffusers what WanPipeline.from_pretrained reads. "
        "README.md there says how, and wants a licence from you. StableHLO: programs for CPU, CUDA and TPU that need "
        "no stvdm, their weights beside them, and programs.json, which says what they take.",
    )
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="what `stvdm import` or a training wrote; 'bundled' for StableHLO",
    )
    command.add_argument("--to", required=True, metavar="DIR", help="folder of the other format")
    parts.add_overwrite(command)
    command.add_argument(
        "--format", choices=("diffusers", "original", "stablehlo"), default="diffusers", help="(default diffusers)"
    )
    command.add_argument(
        "--clip",
        type=clip,
        metavar="TxHxW",
        help="of StableHLO's clips: frames, height, width, e.g. 81x480x832 (default: the largest it was trained on)",
    )
    command.add_argument("--dtype", choices=parts.DTYPES, default="float32", help="of transformers (default float32)")
    command.add_argument(
        "--raw", action="store_true", help="of a run: the weights of its newest checkpoint, not their average"
    )


def clip(text: str) -> tuple[int, int, int]:
    """ "81x480x832" as numbers, for argparse."""
    words = text.split("x")
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected frames, height and width, e.g. 81x480x832")
    T, H, W = map(int, words)
    return T, H, W


def run(args: argparse.Namespace) -> None:
    as_programs = args.format == "stablehlo"
    if args.clip and not as_programs:
        raise ValueError("--clip: weights are for clips of any size; it is for --format=stablehlo")
    parts.refuse_existing(args.to, option="--to", overwrite=args.overwrite)
    if as_programs:
        import jax

        jax.config.update("jax_platforms", "cpu")  # programs are for all kinds of devices, and nothing is computed
    params = None
    if args.raw:
        from stvdm.train import dit

        params = dit.raw_weights(args.source)
    if as_programs:
        from stvdm.interop import stablehlo
        from stvdm.sampling import pipeline

        source = pipeline.bundled() if args.source == parts.BUNDLED else args.source
        written = stablehlo.write(source, args.to, size=args.clip, dtype=args.dtype, params=params)
    else:
        from stvdm.interop import wan_model

        written = wan_model.give(args.source, args.to, args.format, dtype=args.dtype, params=params)
    print("\n".join(written))
