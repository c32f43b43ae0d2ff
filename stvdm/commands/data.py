# SPDX-License-Identifier: Apache-2.0
"""`stvdm data`: kinetic shapes on disk, and a check of one's own videos."""

import argparse
from typing import Any

from stvdm.commands import parts


def add(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="write kinetic shapes to disk; check a folder of your own videos", allow_abbrev=False
    )
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    command = parts.command_of(
        kinds,
        "kinetic_shapes",
        _write_kinetic_shapes,
        "write the procedural world to disk as a TFDS set of ArrayRecords",
        "stvdm data kinetic_shapes --out=data/tfds --num=20000",
        "Training does not need this: without a path the clips are rendered as they are read. Validation and test "
        "splits get a twentieth as many clips each.",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder of TFDS data sets")
    command.add_argument("--num", type=parts.count, default=20_000, metavar="N", help="training clips (default 20000)")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    command.add_argument("--frames", type=parts.count, default=17, metavar="T", help="default 17")
    command.add_argument("--height", type=parts.count, default=64, metavar="H", help="pixels (default 64)")
    command.add_argument("--width", type=parts.count, default=64, metavar="W", help="pixels (default 64)")
    command.add_argument("--fps", type=float, default=8.0, help="default 8")

    command = parts.command_of(
        kinds,
        "check",
        _check_folder,
        "read every video of a folder, and say which would be skipped and why",
        "stvdm data check my_videos --frames=17 --fps=8",
        "A folder holds video files, each with its caption in a .txt beside it, or all captions in metadata.jsonl or "
        "metadata.csv (file_name, text).",
    )
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument(
        "--frames", type=parts.count, default=17, metavar="T", help="frames a clip must have (default 17)"
    )
    command.add_argument("--fps", type=float, default=8.0, help="frames per second that clips are read at (default 8)")


def _write_kinetic_shapes(args: argparse.Namespace) -> None:
    from stvdm.data import kinetic_shapes_tfds

    held_back = max(1, args.num // 20)
    config = kinetic_shapes_tfds.KineticShapesConfig(
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        fps=args.fps,
        seed=args.seed,
        num_clips={"train": args.num, "validation": held_back, "test": held_back},
    )
    print(kinetic_shapes_tfds.write(args.out, config))


def _check_folder(args: argparse.Namespace) -> None:
    from stvdm.data import folder

    source = folder.FolderSource(args.folder, fps=args.fps, min_frames=args.frames)
    print(source.report)
    if args.frames > 1 and (pictures := sum(info.num_frames == 1 for info in source.infos)):
        print(f"{pictures} of those used are pictures, which only buckets of 1 frame take")
