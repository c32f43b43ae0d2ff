# SPDX-License-Identifier: Apache-2.0
"""`stvdm lora`: low-rank adapters from the files of others, into them, or into the weights they are for."""

import argparse
from typing import Any

from stvdm.commands import parts

FORMATS = ("comfyui", "peft", "diffusers")


def add(commands: Any) -> None:
    command = parts.command_of(
        commands,
        "lora",
        run,
        "low-rank adapters: from the files of others, into them, or into the weights they are for",
        "stvdm lora export --from=runs/adapters --to=style.safetensors --format=comfyui",
        "Low-rank adapters (LoRA) are small matrices that are added to the large ones of a model, its base, which stay "
        "as they are: a style in megabytes. They are trained with --config.lora.rank, how thin they are, and "
        "--config.start_from, the base; and sampled with `stvdm generate --checkpoint=BASE --lora=RUN:WEIGHT`. "
        "ComfyUI, PEFT and diffusers each have names of their own for the same matrices.",
    )
    command.add_argument(
        "action",
        choices=("import", "export", "merge"),
        help="import: a file of others --from, as adapters --to for the model --base; export: those of a run --from, "
        "as a file --to for others; merge: adds --lora to the weights of --base, as a whole model --to",
    )
    command.add_argument(
        "--from", metavar="PATH", help="of an import a file or folder of safetensors; of an export a run"
    )
    command.add_argument("--base", metavar="DIR", help="the model that they were trained beside, which they change")
    command.add_argument("--to", required=True, metavar="PATH", help="a file (or, for PEFT, a folder); else a folder")
    parts.add_overwrite(command)
    command.add_argument(
        "--format", choices=FORMATS, default="comfyui", help="of an export: whose names and files (default: comfyui)"
    )
    parts.add_adapters(command)


def run(args: argparse.Namespace) -> None:
    needed = {"import": ("from", "base"), "export": ("from",), "merge": ("base", "lora")}[args.action]
    missing = [name for name in needed if not getattr(args, name)]
    if missing:
        raise ValueError(f"lora {args.action}: --{' and --'.join(missing)} missing; it says what to {args.action}")
    others = {"from", "base", "lora", "format"} - {*needed, *(["format"] if args.action == "export" else [])}
    parts.refuse_without_effect(parts.changed(args, *sorted(others)), f"lora {args.action}")
    source = getattr(args, "from")
    parts.refuse_existing(args.to, option="--to", overwrite=args.overwrite)
    from stvdm import checkpoint
    from stvdm.interop import lora as files
    from stvdm.models import lora
    from stvdm.sampling import pipeline

    if args.action == "merge":
        params, description = pipeline.load_whole(args.base)
        adapters = [(pipeline.adapters_of(place, description["sha256"]), weight) for place, weight in args.lora]
        merged = lora.merged(pipeline.transformers_of(params, adapters), adapters)
        checkpoint.save_model(args.to, {**params, **merged}, description)
    elif args.action == "import":
        about = checkpoint.describe_model(pipeline.model_folder(args.base))
        if about["kind"] != "dit":
            raise ValueError(f"--base={args.base}: a model of kind {about['kind']!r}, expected a whole one, 'dit'")
        trained = files.from_foreign(files.read(source), _tables(about))
        said = {"kind": "lora", "base": args.base, "base_sha256": about["sha256"]}
        said |= {name: about[name] for name in ("autoencoder", "config")}
        checkpoint.save_model(args.to, trained, said)
    else:
        params, about = checkpoint.load_model(pipeline.model_folder(source))
        if about["kind"] != "lora":
            raise ValueError(f"--from={source}: a model of kind {about['kind']!r}, expected adapters, 'lora'")
        files.write(args.to, files.to_foreign(params, _tables(about), args.format), args.format)
    print(args.to)


def _tables(about: dict[str, Any]) -> dict[str, Any]:
    """What each tensor of a model is called by the authors of Wan and by diffusers."""
    from stvdm.interop import wan
    from stvdm.sampling import pipeline

    channels = pipeline.autoencoder_of(about["autoencoder"]).latent_channels
    dit = pipeline.build(about["config"], latent_channels=channels).dit
    return {"original": wan.pairs(dit, "original"), "diffusers": wan.pairs(dit, "diffusers")}
