# SPDX-License-Identifier: Apache-2.0
"""`stvdm export`: a model of Wan's shape, as other tools load it."""

import argparse
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "export",
        run,
        "write a model of Wan's shape as diffusers or the authors' code loads it",
        "stvdm export --from=runs/wan --to=out/wan --format=diffusers --dtype=bfloat16",
        "Sharded safetensors with their index, config.json, and for diffusers what WanPipeline.from_pretrained reads. "
        "README.md there says how, and wants a licence from you.",
    )
    command.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="what `stvdm import` or a training wrote"
    )
    command.add_argument("--to", required=True, metavar="DIR", help="folder of the other format")
    command.add_argument("--format", choices=("diffusers", "original"), default="diffusers", help="(default diffusers)")
    command.add_argument("--dtype", choices=parts.DTYPES, default="float32", help="of transformers (default float32)")
    command.add_argument(
        "--raw", action="store_true", help="of a run: the weights of its newest checkpoint, not their average"
    )


def run(args: argparse.Namespace) -> None:
    from stvdm.interop import wan_model

    params = None
    if args.raw:
        from stvdm.train import dit

        params = dit.raw_weights(args.source)
    print("\n".join(wan_model.give(args.source, args.to, args.format, dtype=args.dtype, params=params)))
