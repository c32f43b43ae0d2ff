# SPDX-License-Identifier: Apache-2.0
"""`stvdm preprocess`: the latents of a data set, computed once."""

import argparse
import json
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "preprocess",
        run,
        "compute the latents of a data set once",
        "stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents",
        "Then train on them with --config.data.source=latents --config.data.path=DIR.",
    )
    parts.add_config(command)
    command.add_argument("--checkpoint", metavar="DIR", help="the trained autoencoder (default: the config's)")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the latents")
    command.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="validation: the held-out clips of kinetic shapes, or those of data.validation_path (default: train)",
    )
    command.add_argument(
        "--batch", type=parts.count, default=16, metavar="B", help="clips encoded at once (default 16)"
    )


def run(args: argparse.Namespace) -> None:
    from stvdm import config as config_lib

    config = config_lib.load(args.config, args.overrides)
    folder = args.checkpoint or (config.autoencoder if config.kind == "dit" else "")
    if not folder:
        raise ValueError(
            "--checkpoint='': expected the folder of a trained autoencoder, so name the one to encode with"
        )
    parts.keep_compiled_programs()
    import jax

    from stvdm import checkpoint, preprocess
    from stvdm.data import loader
    from stvdm.sampling import pipeline

    params, description = checkpoint.load_model(pipeline.model_folder(folder))
    autoencoder = pipeline.autoencoder_of(description["autoencoder"])

    @jax.jit
    def encode(params: Any, video_BTHWC: Any) -> Any:
        return autoencoder.apply({"params": params}, pipeline.to_model_range(video_BTHWC), method="encode")[0]

    data = config.data
    with parts.progress() as show:
        show("looking at the clips")
        about = preprocess.preprocess(
            lambda video_BTHWC: encode(params["autoencoder"], video_BTHWC),
            loader.configured_source(data, seed=config.seed, split=args.split),
            args.out,
            buckets=data.buckets,
            seed=config.seed,
            batch_size=args.batch,
            about={"autoencoder": description["sha256"]},
            on_progress=lambda done, total: show(f"encoding {done}/{total}", over=done == total),
        )
    print(json.dumps(about, indent=2, default=parts.plain))
