# SPDX-License-Identifier: Apache-2.0
"""`stvdm generate`: clips from prompts, in files."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stvdm
from stvdm.commands import parts


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "generate",
        run,
        "make clips from prompts",
        'stvdm generate "a red ball bounces to the right" "a blue square grows" --seed 3 --output outputs/clips',
        "For each clip an .mp4, a .gif and a .json with all that it takes to make it again; contact.png shows all. "
        "A clip is written as soon as it is made, and what is there already stays: another file of its name gets a "
        "number. Options left out take the value that comes with the checkpoint.",
    )
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="what should be seen; quote each prompt")
    command.add_argument("--num", type=parts.count, default=1, metavar="N", help="clips for each prompt (default 1)")
    parts.add_sampling(command)
    command.add_argument("--negative", metavar="PROMPT", help="what should not be seen; guidance leads away from it")
    command.add_argument("--image", metavar="FILE", help="what all clips begin with, cut to their sides")
    command.add_argument(
        "--guidance-low", type=float, metavar="SCALE", help="of a model of two networks: guidance of the second"
    )
    command.add_argument("--frames", type=parts.count, metavar="T", help="frames of a clip")
    command.add_argument("--height", type=parts.count, metavar="H", help="pixels")
    command.add_argument("--width", type=parts.count, metavar="W", help="pixels")
    command.add_argument("--output", default="outputs", metavar="DIR", help="folder to write to (default: outputs)")
    parts.add_adapters(command)
    command.add_argument(
        "--tower", metavar="DIR", help="the published tower that reads its prompts, if not where it lay in training"
    )
    command.add_argument("--image-tower", metavar="DIR", help="the same of the one that looks at its images")


def run(args: argparse.Namespace) -> None:
    _refuse_words(args.prompts)
    if "://" in args.output:
        raise ValueError(f"--output={args.output}: expected a folder of this machine, from which to copy the clips")
    output = Path(args.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)  # where it can't be, that is known before anything is computed
    parts.keep_compiled_programs()
    import jax

    from stvdm.data import video
    from stvdm.sampling import pipeline

    stems: list[str] = []

    def write(made: pipeline.Result) -> None:
        for prompt, seed, clip, latent in zip(made.prompts, made.seeds, made.videos, made.latents, strict=True):
            stem = _unused(_stem(prompt, seed), output)
            record = {
                "prompt": prompt,
                "seed": seed,
                **made.settings,
                "checkpoint": args.checkpoint,
                "latent_shape": list(latent.shape),
                "latent_sha256": hashlib.sha256(latent.tobytes()).hexdigest(),
                "command": shlex.join(["stvdm", *args.argv]),
                "versions": _versions(),
                "device": jax.devices()[0].device_kind,
                "machine": platform.platform(),
            }
            text = json.dumps(record, indent=2, default=parts.plain) + "\n"
            with tempfile.TemporaryDirectory(dir=output, prefix=".") as unfinished:  # what has its name is whole
                video.write_mp4(Path(unfinished, f"{stem}.mp4"), clip, fps=made.settings["fps"])
                video.write_gif(Path(unfinished, f"{stem}.gif"), clip, fps=made.settings["fps"])
                Path(unfinished, f"{stem}.json").write_text(text, encoding="utf-8")
                for path in Path(unfinished).iterdir():
                    path.replace(output / path.name)
            stems.append(stem)

    try:
        with parts.progress() as show:
            show("loading the model")
            image = None if args.image is None else _image(args.image)
            loaded = pipeline.Pipeline.load(
                None if args.checkpoint == parts.BUNDLED else args.checkpoint,
                tower=args.tower,
                image_tower=args.image_tower,
                adapters=args.lora,
            )
            show("compiling")
            result = loaded.generate(
                args.prompts,
                num=args.num,
                negative=args.negative,
                image=image,
                steps=args.steps,
                guidance=args.guidance,
                guidance_low=args.guidance_low,
                sampler=args.sampler,
                seed=args.seed,
                num_frames=args.frames,
                height=args.height,
                width=args.width,
                progress=lambda done, total: show(f"denoising {done}/{total}", over=done == total),
                made=write,
            )
    finally:  # interrupted, too
        for stem in stems:
            print(output / f"{stem}.mp4")
    contact = output / f"{_unused('contact', output)}.png"
    video.contact_sheet(list(result.videos), result.prompts).save(contact)
    print(contact)


def _image(path: str) -> Any:
    """Bytes (H, W, 3): the upright pixels of a picture: of a video its first frame."""
    from stvdm.data import video

    info = video.probe(path)
    return video.read_video(path, num_frames=1, fps=1, height=info.height, width=info.width)[0]


def _refuse_words(prompts: Sequence[str]) -> None:
    """Prompts of a word each, one after the other, are one whose quotes were left out."""
    if any(len(one.split()) == len(other.split()) == 1 for one, other in itertools.pairwise(prompts)):
        raise ValueError(
            f"{len(prompts)} prompts, some of a single word: the shell splits what is not in quotes, so write stvdm "
            f'generate "{" ".join(prompts)}"; for clips of single words give a command each'
        )


def _stem(prompt: str, seed: int) -> str:
    """A file name without suffix: a-red-ball-0."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80].strip("-") or "clip"
    return f"{slug}-{seed}"


def _unused(name: str, folder: Path) -> str:
    """The name, or with the first number from 2 on that no file there has: a-red-ball-0-2."""
    there = {path.stem for path in folder.iterdir()}
    return next(stem for stem in (name, *(f"{name}-{n}" for n in range(2, len(there) + 3))) if stem not in there)


def _versions() -> dict[str, str]:
    import flax
    import jax
    import jaxlib
    import numpy

    python = ".".join(map(str, sys.version_info[:3]))
    packages = {"flax": flax, "jax": jax, "jaxlib": jaxlib, "numpy": numpy, "stvdm": stvdm}
    return {"python": python, **{name: package.__version__ for name, package in packages.items()}}
