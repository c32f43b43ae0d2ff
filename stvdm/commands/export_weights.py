# SPDX-License-Identifier: Apache-2.0
"""`stvdm export`: a transformer of Wan's shape, as other tools load it."""

import argparse
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "export",
        run,
        "write transformers of Wan's shape as diffusers or the authors' code loads them",
        "stvdm export --from=runs/wan --to=out/wan --format=diffusers --dtype=bfloat16",
        "Sharded safetensors with their index, and config.json.",
    )
    command.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="what `stvdm import` or a training wrote"
    )
    command.add_argument("--to", required=True, metavar="DIR", help="folder of the other format")
    command.add_argument("--format", choices=("diffusers", "original"), default="diffusers", help="(default diffusers)")
    command.add_argument("--dtype", choices=parts.DTYPES, default="float32", help="of the weights (default float32)")


def run(args: argparse.Namespace) -> None:
    from stvdm.interop import wan

    print("\n".join(wan.give(args.source, args.to, args.format, dtype=args.dtype)))
