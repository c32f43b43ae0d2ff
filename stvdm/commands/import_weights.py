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
        "bring a Wan model in, from diffusers' folders or the authors'",
        "stvdm import --from=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to=weights/wan --dtype=bfloat16",
        "What comes of it is sampled by `stvdm generate --checkpoint`, and trained on by --config.start_from and "
        "--config.autoencoder. The tower that reads prompts stays where it lies. A tensor at a time: it takes the "
        "memory of the largest. All that does not fit is one error, before anything is written. Pickles are never "
        "opened: the authors keep autoencoder and tower as such, so give --vae and --tower beside their folders.",
    )
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="a model's folder, that of its transformer or autoencoder alone, or OWNER/NAME on the hub",
    )
    command.add_argument("--to", required=True, metavar="DIR", help="folder of the model in our format")
    parts.add_overwrite(command)
    command.add_argument("--vae", metavar="DIR", help="safetensors of the autoencoder, if not in the model's vae/")
    command.add_argument("--tower", metavar="DIR", help="the UMT5 that reads prompts, if not the model's text_encoder/")
    command.add_argument(
        "--dtype",
        choices=parts.DTYPES,
        default="float32",
        help="of the transformers' weights in the file (default float32); bfloat16: of their products too",
    )


def run(args: argparse.Namespace) -> None:
    parts.refuse_existing(args.to, option="--to", overwrite=args.overwrite)
    from stvdm.interop import wan_model

    about = wan_model.bring(args.source, args.to, autoencoder=args.vae, tower=args.tower, dtype=args.dtype)
    print(json.dumps(about, indent=2, default=parts.plain))
