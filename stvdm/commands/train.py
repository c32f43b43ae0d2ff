# SPDX-License-Identifier: Apache-2.0
"""`stvdm train`: one training of an autoencoder or a DiT, begun or gone on with."""

import argparse
import importlib
from typing import TYPE_CHECKING, Any

from stvdm.commands import parts

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "train",
        run,
        "train an autoencoder or a DiT",
        "stvdm train dit --config=configs/quickstart.py:dit --workdir=runs/dit --config.total_steps=2000",
        "The same command again goes on from the last checkpoint in WORKDIR. Any key of the config can be changed with "
        "--config.KEY=VALUE; stvdm/config.py lists every key with its unit and meaning.",
    )
    command.add_argument(
        "stage",
        choices=("autoencoder", "dit"),
        metavar="{autoencoder,dit}",  # what is asked for where it is missing
        help="the autoencoder comes first; the DiT needs one",
    )
    parts.add_config(command)
    command.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics, previews; may be gs://")
    command.add_argument(
        "--overfit",
        action="store_true",
        help="train on one batch again and again, to check a set-up: the loss must fall",
    )


def run(args: argparse.Namespace) -> None:
    config = _config_of_kind(args, args.stage)
    if args.overfit:
        config.overfit = True
    from stvdm.train import supervisor

    supervisor.join()
    parts.keep_compiled_programs()
    importlib.import_module(f"stvdm.train.{args.stage}").main(config, args.workdir)


def _config_of_kind(args: argparse.Namespace, kind: str) -> "ConfigDict":
    from stvdm import config as config_lib

    config = config_lib.load(args.config, args.overrides)
    if config.kind != kind:
        raise ValueError(
            f"--config={args.config}: this config is for {config.kind!r}: expected one for {kind!r}, "
            f"so name another file or variant, or use `stvdm train {config.kind}`"
        )
    return config
