# SPDX-License-Identifier: Apache-2.0
"""`stvdm import`: published weights, as a folder of ours."""

import argparse
import json
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "import",
        run,
        "bring Wan's transformers in, from diffusers' folders or the authors'",
        "stvdm import --from=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to=runs/wan",
        "A tensor at a time: it takes the memory of the largest. All that does not fit is one error, before anything "
        "is written. Pickles are never opened.",
    )
    command.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="a model's folder, or OWNER/NAME on the hub"
    )
    command.add_argument("--to", required=True, metavar="DIR", help="folder of the model in our format")
    command.add_argument(
        "--dtype", choices=parts.DTYPES, default="float32", help="of the weights in the file (default float32)"
    )


def run(args: argparse.Namespace) -> None:
    from stvdm.interop import wan

    print(json.dumps(wan.bring(args.source, args.to, dtype=args.dtype), indent=2, default=parts.plain))
