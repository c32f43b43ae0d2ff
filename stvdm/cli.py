# SPDX-License-Identifier: Apache-2.0
"""The one console command: `stvdm generate | train | supervise | preprocess | lora | evaluate | ablate | plan |
data`.

    stvdm generate "a red ball bounces to the right"
    stvdm train autoencoder --config=configs/quickstart.py:autoencoder --workdir=runs/autoencoder --config.seed=1

Each command parses here, imports what it needs, calls one function of the library and prints what came of it. What the
user can put right (ValueError, a file or a package that is missing, a full disk, a loss that is not finite) is one
line; `--debug` shows where it came from. Exit status:

    0    done
    1    something around us failed, which may pass: a disk, a network
    2    refused: the same command would be again
    65   a training stopped, as its losses were not finite
    75   a training was told to stop, and has saved
    130  interrupted
"""

import argparse
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import platform
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stvdm

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SAMPLERS = ("euler", "heun", "dpm++", "unipc")
BUNDLED = "bundled"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    `supervise` leaves with that of what it supervised, or those of `stvdm.train.supervisor`.
    """
    if argv is None:
        _begin_with_huge_pages()
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser().parse_known_args(argv)
    args.overrides = rest
    args.argv = argv
    try:
        if rest:
            _refuse_unknown(rest, argv, overrides_allowed=args.takes_overrides)
        with warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _warn
            status: int | None = args.run(args)
    except KeyboardInterrupt:
        print("\nstvdm: interrupted", file=sys.stderr)
        return _left(130)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:  # of imports, e.g. gcsfs, for gs://
        if args.debug:
            raise
        print(f"stvdm: error: {error}\n(`--debug` shows where)", file=sys.stderr)
        if isinstance(error, FloatingPointError):
            return _left(65)
        return _left(1 if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else 2)
    return status or 0


def _left(status: int) -> int:
    """The status; one of several processes of a training ends here, and does not wait for the others."""
    from stvdm.train import supervisor

    supervisor.leave_at_once(status)
    return status


def parser() -> argparse.ArgumentParser:
    """The whole command line, for `main`, and for the test that reads the commands in the README."""
    root = argparse.ArgumentParser(
        prog="stvdm",
        description="Train and sample video diffusion transformers, from a laptop to a TPU pod.",
        epilog="`stvdm COMMAND --help` explains each command.",
    )
    root.add_argument("--version", action="version", version=f"stvdm {stvdm.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_train(commands)
    _add_supervise(commands)
    _add_preprocess(commands)
    _add_lora(commands)
    _add_evaluate(commands)
    _add_ablate(commands)
    _add_plan(commands)
    _add_data(commands)
    return root


# ------------------------------------------------------------------------------------------------------------ generate


def _add_generate(commands: Any) -> None:
    command = _command(
        commands,
        "generate",
        _generate,
        "make clips from prompts",
        'stvdm generate "a red ball bounces to the right" "a blue square grows" --seed 3 --output outputs/clips',
        "For each clip an .mp4, a .gif and a .json with all that it takes to make it again; contact.png shows all. "
        "Options left out take the value that comes with the checkpoint.",
    )
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="what should be seen; quote each prompt")
    command.add_argument("--num", type=_count, default=1, metavar="N", help="clips for each prompt (default 1)")
    _add_sampling(command)
    command.add_argument("--frames", type=_count, metavar="T", help="frames of a clip")
    command.add_argument("--height", type=_count, metavar="H", help="pixels")
    command.add_argument("--width", type=_count, metavar="W", help="pixels")
    command.add_argument("--output", default="outputs", metavar="DIR", help="folder to write to (default: outputs)")
    _add_adapters(command)
    command.add_argument(
        "--tower", metavar="DIR", help="the published tower that reads its prompts, if not where it lay in training"
    )


def _generate(args: argparse.Namespace) -> None:
    _compilation_cache()
    import jax

    from stvdm.data import video
    from stvdm.sampling import pipeline

    with _progress() as show:
        show("loading the model")
        loaded = pipeline.Pipeline.load(
            None if args.checkpoint == BUNDLED else args.checkpoint, tower=args.tower, adapters=args.lora
        )
        show("compiling")
        result = loaded.generate(
            args.prompts,
            num=args.num,
            steps=args.steps,
            guidance=args.guidance,
            sampler=args.sampler,
            seed=args.seed,
            num_frames=args.frames,
            height=args.height,
            width=args.width,
            progress=lambda done, total: show(f"denoising {done}/{total}", over=done == total),
        )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    stems = _stems(result.prompts, result.seeds)
    for stem, prompt, seed, clip, latent in zip(
        stems, result.prompts, result.seeds, result.videos, result.latents, strict=True
    ):
        video.write_mp4(output / f"{stem}.mp4", clip, fps=result.settings["fps"])
        video.write_gif(output / f"{stem}.gif", clip, fps=result.settings["fps"])
        record = {
            "prompt": prompt,
            "seed": seed,
            **result.settings,
            "checkpoint": args.checkpoint,
            "latent_shape": list(latent.shape),
            "latent_sha256": hashlib.sha256(latent.tobytes()).hexdigest(),
            "command": shlex.join(["stvdm", *args.argv]),
            "versions": _versions(),
            "device": jax.devices()[0].device_kind,
            "machine": platform.platform(),
        }
        (output / f"{stem}.json").write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")
    video.contact_sheet(list(result.videos), result.prompts).save(output / "contact.png")
    for stem in stems:
        print(output / f"{stem}.mp4")
    print(output / "contact.png")


def _stems(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """File names without suffix: a-red-ball-0; another clip of the same name is a-red-ball-0-2."""
    stems: list[str] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80].strip("-") or "clip"
        name = stem = f"{slug}-{seed}"
        repeat = 2
        while stem in stems:
            stem, repeat = f"{name}-{repeat}", repeat + 1
        stems.append(stem)
    return stems


def _versions() -> dict[str, str]:
    import flax
    import jax
    import jaxlib
    import numpy

    python = ".".join(map(str, sys.version_info[:3]))
    packages = {"flax": flax, "jax": jax, "jaxlib": jaxlib, "numpy": numpy, "stvdm": stvdm}
    return {"python": python, **{name: package.__version__ for name, package in packages.items()}}


# --------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        _train,
        "train an autoencoder or a DiT",
        "stvdm train dit --config=configs/quickstart.py:dit --workdir=runs/dit --config.total_steps=2000",
        "The same command again goes on from the last checkpoint in WORKDIR. Any key of the config can be changed with "
        "--config.KEY=VALUE; stvdm/config.py lists every key with its unit and meaning.",
    )
    command.add_argument("stage", choices=("autoencoder", "dit"), help="the autoencoder comes first; the DiT needs one")
    _add_config(command)
    command.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics, previews; may be gs://")
    command.add_argument(
        "--overfit",
        action="store_true",
        help="train on one batch again and again, to check a set-up: the loss must fall",
    )


def _train(args: argparse.Namespace) -> None:
    config = _config_of_kind(args, args.stage)
    if args.overfit:
        config.overfit = True
    from stvdm.train import supervisor

    supervisor.join()
    _compilation_cache()
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


# ----------------------------------------------------------------------------------------------------------- supervise


def _add_supervise(commands: Any) -> None:
    from stvdm.train import compiler_flags

    command = _command(
        commands,
        "supervise",
        _supervise,
        "keep a training going: start it again when it dies or freezes",
        "stvdm supervise -- stvdm train dit --config=configs/quickstart.py:dit --workdir=runs/dit",
        "On SIGTERM the training is asked to save and to leave. Exit status: 0 finished, 75 saved and to be started "
        "again, any other: given up. On a TPU slice every worker runs this, with --chip; launch/ does that.",
    )
    command.add_argument("--processes", type=_count, default=1, metavar="N", help="of one job, on this machine")
    command.add_argument(
        "--chip", choices=tuple(compiler_flags.COMPILER_FLAGS), help="this machine is a worker of a slice of such chips"
    )
    command.add_argument(
        "--timeout-s", type=_count, default=1800, metavar="S", help="frozen after so long without a step (default 1800)"
    )
    command.add_argument("--grace-s", type=_count, default=120, metavar="S", help="time to save in (default 120)")
    command.add_argument(
        "--max-failures", type=_count, default=5, metavar="N", help="in a row without progress, to give up (default 5)"
    )
    command.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to keep going")


def _supervise(args: argparse.Namespace) -> int:
    from stvdm.train import supervisor

    return supervisor.supervise(
        args.program[1:] if args.program[:1] == ["--"] else args.program,
        processes=args.processes,
        chip=args.chip,
        timeout=args.timeout_s,
        grace=args.grace_s,
        max_failures=args.max_failures,
    )


# ---------------------------------------------------------------------------------------------------------- preprocess


def _add_preprocess(commands: Any) -> None:
    command = _command(
        commands,
        "preprocess",
        _preprocess,
        "compute the latents of a data set once, and what a tower makes of its captions",
        "stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents",
        "Then train on them with --config.data.source=latents --config.data.path=DIR. With the config of a DiT whose "
        "text.tower names a published tower, its text is stored beside the latents.",
    )
    _add_config(command)
    command.add_argument(
        "--host",
        type=_host,
        default=(0, 1),
        metavar="I/N",
        help="this is host I, from 0, of N that write to one folder, each its share of the shards",
    )
    command.add_argument("--checkpoint", metavar="DIR", help="the trained autoencoder (default: the config's)")
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the latents")
    command.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="validation: the held-out clips of kinetic shapes, or those of data.validation_path (default: train)",
    )
    command.add_argument("--batch", type=_count, default=16, metavar="B", help="clips encoded at once (default 16)")


def _preprocess(args: argparse.Namespace) -> None:
    from stvdm import config as config_lib

    config = config_lib.load(args.config, args.overrides)
    folder = args.checkpoint or (config.autoencoder if config.kind == "dit" else "")
    if not folder:
        raise ValueError(
            "--checkpoint='': expected the folder of a trained autoencoder, so name the one to encode with"
        )
    _compilation_cache()
    import jax

    from stvdm import checkpoint, preprocess
    from stvdm.data import loader
    from stvdm.interop import towers
    from stvdm.sampling import pipeline

    params, description = checkpoint.load_model(pipeline.model_folder(folder))
    autoencoder = pipeline.autoencoder_of(description["autoencoder"])
    made_by: dict[str, Any] = {"autoencoder": description["sha256"]}
    reader = pipeline.reader_of(config.to_dict()) if config.kind == "dit" else None
    if reader is not None:
        reader = reader.on()
        made_by["text"] = towers.identity(config.text.tower, max_tokens=config.text.max_tokens)

    @jax.jit
    def encode(params: Any, video_BTHWC: Any) -> Any:
        return autoencoder.apply({"params": params}, pipeline.to_model_range(video_BTHWC), method="encode")[0]

    data = config.data
    with _progress() as show:
        show("looking at the clips")
        about = preprocess.preprocess(
            lambda video_BTHWC: encode(params["autoencoder"], video_BTHWC),
            loader.configured_source(data, seed=config.seed, split=args.split),
            args.out,
            buckets=data.buckets,
            seed=config.seed,
            read=reader,
            host=args.host,
            batch_size=args.batch,
            about=made_by,
            on_progress=lambda done, total: show(f"encoding {done}/{total}", over=done == total),
        )
    print(json.dumps(about, indent=2, default=_plain))


# ---------------------------------------------------------------------------------------------------------------- lora

LORA_FORMATS = ("comfyui", "peft", "diffusers")


def _add_lora(commands: Any) -> None:
    command = _command(
        commands,
        "lora",
        _lora,
        "low-rank adapters: from the files of others, into them, or into the weights they are for",
        "stvdm lora export --from=runs/adapters --to=style.safetensors --format=comfyui",
        "They are trained with --config.lora.rank and --config.start_from, and sampled with `stvdm generate --lora`.",
    )
    command.add_argument(
        "action",
        choices=("import", "export", "merge"),
        help="import: a file, for the model --base; export: a run's; merge: --lora into the weights of --base",
    )
    command.add_argument("--from", dest="source", metavar="PATH", help="a file or folder of safetensors; a run")
    command.add_argument("--base", metavar="DIR", help="the model that they are for")
    command.add_argument("--to", required=True, metavar="PATH", help="a file (or, for PEFT, a folder); else a folder")
    command.add_argument("--format", choices=LORA_FORMATS, default="comfyui", help="of an export (default: comfyui)")
    _add_adapters(command)


def _add_adapters(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora",
        type=_weighted,
        action="append",
        default=[],
        metavar="DIR[:WEIGHT]",
        help="adapters, and how much of them (default 1); may be given several times",
    )


def _lora(args: argparse.Namespace) -> None:
    needed = {"import": ("source", "base"), "export": ("source",), "merge": ("base", "lora")}[args.action]
    missing = [{"source": "from"}.get(name, name) for name in needed if not getattr(args, name)]
    if missing:
        raise ValueError(f"lora {args.action}: --{' and --'.join(missing)} missing; it says what to {args.action}")
    from stvdm import checkpoint
    from stvdm.interop import lora as files
    from stvdm.interop import mapping
    from stvdm.models import lora
    from stvdm.sampling import pipeline

    if args.action == "merge":
        params, description = checkpoint.load_model(pipeline.model_folder(args.base))
        adapters = [(pipeline.adapters_of(place, description["sha256"]), weight) for place, weight in args.lora]
        merged = lora.merged({"dit": params["dit"]}, adapters)
        checkpoint.save_model(args.to, {**params, **merged}, description)
    elif args.action == "import":
        about = _described(args.base)
        trained = files.from_foreign(mapping.read(args.source), _tables(about))
        said = {"kind": "lora", "base": args.base, "base_sha256": about["sha256"]}
        said |= {name: about[name] for name in ("autoencoder", "config")}
        checkpoint.save_model(args.to, trained, said)
    else:
        params, about = checkpoint.load_model(pipeline.model_folder(args.source))
        if about["kind"] != "lora":
            raise ValueError(f"--from={args.source}: a model of kind {about['kind']!r}, expected adapters, 'lora'")
        files.write(args.to, files.to_foreign(params, _tables(about), args.format), args.format)
    print(args.to)


def _described(folder: str) -> dict[str, Any]:
    """model.json of a model."""
    from stvdm import checkpoint
    from stvdm.sampling import pipeline

    return json.loads((pipeline.model_folder(folder) / checkpoint.DESCRIPTION).read_text())


def _tables(about: dict[str, Any]) -> dict[str, Any]:
    """What each tensor of a model is called by the authors of Wan and by diffusers."""
    from stvdm.interop import wan
    from stvdm.sampling import pipeline

    channels = pipeline.autoencoder_of(about["autoencoder"]).latent_channels
    dit = pipeline.build(about["config"], latent_channels=channels, num_words=3).dit
    return {"original": wan.pairs(dit, "original"), "diffusers": wan.pairs(dit, "diffusers")}


def _weighted(text: str) -> tuple[str, float]:
    """DIR or DIR:WEIGHT; a DIR may have colons of its own."""
    folder, colon, weight = text.rpartition(":")
    with contextlib.suppress(ValueError):
        return (folder, float(weight)) if colon else (text, 1.0)
    return text, 1.0


# ------------------------------------------------------------------------------------------------------------ evaluate


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "sample held-out prompts, track what came out, and score it",
        "stvdm evaluate --checkpoint=runs/dit --num=200 --output=results.json",
        "Prints each score with its 95 % interval, beside the same score of real clips, of reconstructed ones, and of "
        "real clips of other prompts, which is chance.",
    )
    _add_sampling(command)
    command.add_argument("--num", type=_count, default=200, metavar="N", help="held-out prompts (default 200)")
    command.add_argument("--batch", type=_count, default=16, metavar="B", help="clips sampled at once (default 16)")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument(
        "--damage",
        action="store_true",
        help="evaluate the metrics in place of a model: do they see damage of known kind and strength to real clips?",
    )
    instead.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="set results side by side, with their differences to the first; refused if more than the model differs",
    )
    command.add_argument("--mixed", action="store_true", help="compare them all the same, and say what differs")
    command.add_argument(
        "--output",
        metavar="PATH",
        help="default: results.json; with --damage a folder, default: outputs/damage; with --compare a file for the "
        "table, default: none",
    )
    command.add_argument(
        "--features",
        metavar="DIR",
        help="adds scores over published networks whose safetensors lie in DIR: clip/ (CLIP score), i3d/ (FVD), "
        "videomae/ (content-debiased FVD), lpips/; any of them",
    )


def _evaluate(args: argparse.Namespace) -> None:
    if args.mixed and not args.compare:
        raise ValueError("--mixed: without effect but for --compare, so name results with that, or leave it out")
    if args.compare:
        _refuse_without_effect(args, "--compare, which makes no clips", num=200, seed=0)
        from stvdm.evaluation import comparison

        comparison.main(args.compare, mixed=args.mixed, output=args.output)
        return
    if args.damage:
        _refuse_without_effect(args, "--damage, which samples no model")
    _compilation_cache()
    if args.damage:
        from stvdm.evaluation import agreement

        agreement.main(
            num=args.num,
            seed=args.seed,
            output=args.output or "outputs/damage",
            command=shlex.join(["stvdm", *args.argv]),
        )
        return
    from stvdm.evaluation import run

    run.main(
        None if args.checkpoint == BUNDLED else args.checkpoint,
        num=args.num,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        batch=args.batch,
        output=args.output or "results.json",
        features=args.features,
    )


def _refuse_without_effect(args: argparse.Namespace, beside: str, **further: Any) -> None:
    """Options of sampling, or others (with what they usually are), that were given although nothing is sampled."""
    usual = {"checkpoint": BUNDLED, "steps": None, "guidance": None, "sampler": None, "batch": 16, "features": None}
    usual |= further
    given = [f"--{name}={getattr(args, name)}" for name, value in usual.items() if getattr(args, name) != value]
    if given:
        raise ValueError(f"{' '.join(given)}: without effect beside {beside}, so leave it out")


# -------------------------------------------------------------------------------------------------------------- ablate

ABLATION_SIZES = ("tiny", "small", "pod")


def _add_ablate(commands: Any) -> None:
    command = _command(
        commands,
        "ablate",
        _ablate,
        "run a named grid of variants over seeds, and say what it shows and how sure that is",
        "stvdm ablate attention --size=tiny",
        "The same command again goes on where it stopped. --list says what each ablation asks, costs and found. Any "
        "key of the transformer's base config can be changed with --config.KEY=VALUE. Results are kept cell by cell; "
        "the report is made of them alone.",
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="which ablation; --list names them")
    command.add_argument("--list", action="store_true", help="what each asks, costs and found")
    command.add_argument(
        "--size", choices=ABLATION_SIZES, default="tiny", help="tiny: two CPU cores; small: one accelerator; pod"
    )
    command.add_argument("--seeds", type=_count, default=3, metavar="N", help="trainings of each variant (default 3)")
    command.add_argument("--cell", metavar="VARIANT:SEED", help="run this one alone, and leave the report as it is")
    command.add_argument("--report", action="store_true", help="run nothing, write the report anew")
    command.add_argument(
        "--mixed", action="store_true", help="take results made under differing conditions, and say so"
    )
    command.add_argument("--num", type=_count, default=256, metavar="N", help="clips to evaluate on (default 256)")
    command.add_argument("--batch", type=_count, default=32, metavar="B", help="clips sampled at once (default 32)")
    command.add_argument("--workdir", default="runs/ablations", metavar="DIR", help="of trainings and latents")
    command.add_argument("--results", default="results/ablations", metavar="DIR", help="default: results/ablations")
    command.add_argument(
        "--config", default="configs/ablation.py", metavar="FILE.py", help="bases: its variants SIZE, SIZE_autoencoder"
    )
    command.set_defaults(takes_overrides=True)


def _ablate(args: argparse.Namespace) -> None:
    from stvdm.ablations import report

    if args.list:
        print(report.listing(args.results))
        return
    from stvdm.ablations import questions

    if not args.name:
        raise ValueError(f"NAME is missing: expected one of {', '.join(questions.QUESTIONS)} (or --list)")
    question = questions.find(args.name)
    folder: Any = f"{args.results}/{question.name}/{args.size}"  # which may be gs://
    if not args.report:
        if not args.cell:
            report.check_matplotlib()
        from stvdm.train import supervisor

        supervisor.join()
        _compilation_cache()
        from stvdm import config as config_lib
        from stvdm.ablations import cells, edits

        bases = edits.Run(
            dit=config_lib.load(f"{args.config}:{args.size}", args.overrides),
            autoencoder=config_lib.load(f"{args.config}:{args.size}_autoencoder"),
        )
        defaults = {"num": 256, "batch": 32, "config": "configs/ablation.py"}
        changed = [
            f"--{name}={getattr(args, name)}" for name, usual in defaults.items() if getattr(args, name) != usual
        ]
        folder = cells.main(
            question,
            bases,
            size=args.size,
            num_seeds=args.seeds,
            cell=args.cell,
            num=args.num,
            batch=args.batch,
            workdir=args.workdir,
            folder=args.results,
            mixed=args.mixed,
            options=[*changed, *args.overrides],
        )
    if args.cell and not args.report:
        print(folder)
    else:
        print(report.write(question, folder, mixed=args.mixed))


# ---------------------------------------------------------------------------------------------------------------- plan


def _add_plan(commands: Any) -> None:
    command = _command(
        commands,
        "plan",
        _plan,
        "what a training run costs and whether it fits, before anything is rented",
        "stvdm plan --config=configs/dit_kinetic.py --autoencoder=configs/autoencoder_kinetic.py --topology=v5e:4x4",
        "With --compile or --topology the training step is compiled by the real TPU compiler, which needs no TPU (it "
        "is in the extra 'tpu', for Linux). Nothing is run. What was compiled before is answered from a cache.",
    )
    _add_config(command)
    command.add_argument(
        "--autoencoder", metavar="FILE.py|DIR", help="config or folder of the autoencoder (default: the config's own)"
    )
    command.add_argument("--compile", action="store_true", help="compile the step for the slice of the config")
    command.add_argument("--topology", metavar="CHIP:SHAPE", help="compile it for another, e.g. v5p:4x4x4 or v6e:8x8")
    command.add_argument("--slices", type=_count, metavar="N", help="equal slices (default: the config's)")
    command.add_argument(
        "--search", action="store_true", help="find the mesh, remat policy and micro-batches that fit and are quickest"
    )
    command.add_argument(
        "--tries", type=_count, default=16, metavar="N", help="programs a search compiles (default 16)"
    )
    command.add_argument(
        "--quick", action="store_true", help="compile with less effort than a run: half the time, a little more memory"
    )
    command.add_argument("--variants", action="store_true", help="compile every variant of FILE.py; prints a table")
    command.add_argument("--price", type=float, metavar="P", help="of a chip for an hour, to tell what clips cost")
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def _plan(args: argparse.Namespace) -> None:
    # Before JAX starts: the compiler for TPUs beside a CPU, without asking around for a TPU that is not there.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from stvdm import config as config_lib
    from stvdm.planning import report, search
    from stvdm.planning.planner import Planner

    def planner(spec: str) -> Planner:
        config = config_lib.load(spec, args.overrides)
        return Planner(config, autoencoder=args.autoencoder, topology=args.topology, num_slices=args.slices)

    def priced(plan: dict[str, Any]) -> dict[str, Any]:
        return report.with_cost(plan, price=args.price)

    def show(plan: dict[str, Any]) -> None:
        print(json.dumps(priced(plan), indent=2) if args.json else report.as_text(priced(plan)))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.variants:
        variants = runpy.run_path(args.config).get("VARIANTS")
        if not variants:
            raise ValueError(f"--variants: {args.config} lists none in VARIANTS, so plan it without.")
        made = {}
        for name in variants:
            say(f"compiling {name}")
            made[name] = priced(planner(f"{args.config}:{name}").compiled(quick=args.quick))
        print(json.dumps(made, indent=2) if args.json else report.as_table(made))
    elif args.search:
        asked = planner(args.config)
        found = asked.search(tries=args.tries, say=say)
        plan = None
        if found.best:
            plan = asked.compiled(search.edited(asked.config, found.best.mesh, found.best.rung), quick=args.quick)
        if args.json:
            print(json.dumps({**priced(plan or asked.outline()), "search": found.to_json()}, indent=2))
        else:
            print(search.as_text(found))
            show(plan or asked.outline())
    else:
        asked = planner(args.config)
        show(asked.compiled(quick=args.quick) if args.compile or args.topology else asked.outline())


# ---------------------------------------------------------------------------------------------------------------- data


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="write kinetic shapes to disk; check a folder of your own videos", allow_abbrev=False
    )
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    command = _command(
        kinds,
        "kinetic_shapes",
        _write_kinetic_shapes,
        "write the procedural world to disk as a TFDS set of ArrayRecords",
        "stvdm data kinetic_shapes --out=data/tfds --num=20000",
        "Training does not need this: without a path the clips are rendered as they are read. Validation and test "
        "splits get a twentieth as many clips each.",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder of TFDS data sets")
    command.add_argument("--num", type=_count, default=20_000, metavar="N", help="training clips (default 20000)")
    command.add_argument("--seed", type=int, default=0, help="default 0")
    command.add_argument("--frames", type=_count, default=17, metavar="T", help="default 17")
    command.add_argument("--height", type=_count, default=64, metavar="H", help="pixels (default 64)")
    command.add_argument("--width", type=_count, default=64, metavar="W", help="pixels (default 64)")
    command.add_argument("--fps", type=float, default=8.0, help="default 8")

    command = _command(
        kinds,
        "check",
        _check_folder,
        "read every video of a folder, and say which would be skipped and why",
        "stvdm data check my_videos --frames=17 --fps=8",
        "A folder holds video files, each with its caption in a .txt beside it, or all captions in metadata.jsonl or "
        "metadata.csv (file_name, text).",
    )
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--frames", type=_count, default=17, metavar="T", help="frames a clip must have (default 17)")
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

    print(folder.FolderSource(args.folder, fps=args.fps, min_frames=args.frames).report)


# ------------------------------------------------------------------------------------------------------------- helpers


def _command(commands: Any, name: str, run: Any, summary: str, example: str, remark: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}\n\n{textwrap.fill(remark, 100)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, takes_overrides=False)
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="what to run, e.g. configs/quickstart.py"
    )
    command.set_defaults(takes_overrides=True)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=_count, metavar="N", help="denoising steps; more is slower and finer")
    command.add_argument(
        "--guidance", type=float, metavar="SCALE", help="how strongly the prompt pulls; 1 is not at all"
    )
    command.add_argument("--sampler", choices=SAMPLERS, help="heun takes two evaluations a step, the others one")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips (default 0)")
    command.add_argument(
        "--checkpoint", default=BUNDLED, metavar="DIR", help="a trained DiT (default: the bundled model)"
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return number


def _host(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    host = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if host[0] >= host[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, e.g. 0/4")
    return host


def _refuse_unknown(rest: Sequence[str], argv: Sequence[str], *, overrides_allowed: bool) -> None:
    """What argparse did not know may only be overrides of a config, `--config.key=value`."""
    for argument in rest:
        if re.match(r"--(no)?config\.\w", argument) and overrides_allowed:
            if "=" not in argument:
                raise ValueError(f"{argument}: expected {argument}=VALUE, so join the two with '='")
            continue
        name = argument.split("=", 1)[0]
        near = difflib.get_close_matches(name, sorted(_flags_of(argv)), n=3)
        raise ValueError(f"{argument}: no such argument" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _flags_of(argv: Sequence[str]) -> Iterator[str]:
    """Every --flag of the command that argv names."""
    found = parser()
    for word in argv:
        for action in found._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                found = action.choices[word]
                break
    for action in found._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))


def _plain(value: Any) -> Any:
    """What json does not know: numpy numbers and arrays, paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A function of a text that keeps one line of stderr up to date; a file gets the first of a kind, and the last."""
    live, shown = sys.stderr.isatty(), ""

    def show(text: str, *, over: bool = False) -> None:
        nonlocal shown
        if live:
            print(f"\r{text:<{len(shown)}}", end="", file=sys.stderr, flush=True)
        elif over or text.split()[0] != shown.split(" ")[0]:
            print(text, file=sys.stderr, flush=True)
        shown = text

    try:
        yield show
    finally:
        if live and shown:
            print(file=sys.stderr)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """What the library warns of, without the line of source that Python shows beside it."""
    print(f"stvdm: warning: {message}", file=sys.stderr)


def _begin_with_huge_pages(modes: str = "/sys/kernel/mm/transparent_hugepage/enabled") -> None:
    """Has memory come in large pages, for which this process begins once more: glibc reads the setting at its start.

    On a CPU every step of a program takes its memory anew, and touching it page by page is a good part of a small
    step. Linux gives large pages to those that ask ("madvise"). Whoever sets GLIBC_TUNABLES, empty too, is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux") or not sys.executable:
        return
    try:
        offered = "[madvise]" in Path(modes).read_text("ascii")
    except OSError:
        return
    if offered:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "stvdm" / "xla"))


if __name__ == "__main__":
    sys.exit(main())
