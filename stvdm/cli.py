# SPDX-License-Identifier: Apache-2.0
"""The one console command: `stvdm generate | train | preprocess | evaluate | data`.

    stvdm generate "a red ball bounces to the right"
    stvdm train autoencoder --config=configs/quickstart.py:autoencoder --workdir=runs/autoencoder --config.seed=1

Each command parses here, imports what it needs, calls one function of the library and prints what came of it. What the
user can put right (ValueError, a file or a package that is missing) is one line and exit status 2; `--debug` shows
where it came from.
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
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stvdm

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SAMPLERS = ("euler", "heun", "dpm++", "unipc")
BUNDLED = "bundled"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 for what the user can put right, 130 interrupted)."""
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
            args.run(args)
    except KeyboardInterrupt:
        print("\nstvdm: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:  # of imports, e.g. gcsfs, for gs://
        if args.debug:
            raise
        print(f"stvdm: error: {error}\n(`--debug` shows where)", file=sys.stderr)
        return 2
    return 0


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
    _add_preprocess(commands)
    _add_evaluate(commands)
    _add_data(commands)
    return root


def load_config(spec: str, overrides: Sequence[str] = ()) -> "ConfigDict":
    """The locked config of `FILE.py` or `FILE.py:variant` with overrides like `--config.model.width=512`.

    Files, variants and overrides are read by `ml_collections.config_flags`; here only its refusals are made legible.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a key that is not in the config (near ones are named), or a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    path = spec.split(":", 1)[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={spec}: there is no file {path}; shipped ones are in configs/")

    def parse(*arguments: str) -> "ConfigDict":
        argv = ["stvdm", f"--config={spec}", *arguments]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return values.config

    try:
        config = parse()
    except flags.Error as error:  # the config file raised ValueError, e.g. for an unknown variant: say just that
        raise ValueError(f"--config={spec}: {_innermost(error)}") from error
    known = sorted(_keys(config))
    for override in overrides:
        key = re.sub(r"^--?(no)?config\.", "", override.split("=", 1)[0])
        if key not in known:
            raise ValueError(f"--config.{key}: {path} has no such key; {_nearest(key, known)}")
    try:
        config = parse(*overrides)
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask absl, and absl is not what parsed our command line
    return config


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


def _generate(args: argparse.Namespace) -> None:
    _compilation_cache()
    import jax

    from stvdm.data import video
    from stvdm.sampling import pipeline

    with _progress() as show:
        show("loading the model")
        loaded = pipeline.Pipeline.load(None if args.checkpoint == BUNDLED else args.checkpoint)
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
    _compilation_cache()
    importlib.import_module(f"stvdm.train.{args.stage}").main(config, args.workdir)


def _config_of_kind(args: argparse.Namespace, kind: str) -> "ConfigDict":
    config = load_config(args.config, args.overrides)
    if config.kind != kind:
        raise ValueError(
            f"--config={args.config}: this config is for {config.kind!r}: expected one for {kind!r}, "
            f"so name another file or variant, or use `stvdm train {config.kind}`"
        )
    return config


# ---------------------------------------------------------------------------------------------- preprocess and evaluate


def _add_preprocess(commands: Any) -> None:
    command = _command(
        commands,
        "preprocess",
        _preprocess,
        "compute the latents of a data set once",
        "stvdm preprocess --config=configs/autoencoder_kinetic.py --checkpoint=runs/autoencoder --out=runs/latents",
        "Then train on them with --config.data.source=latents --config.data.path=DIR.",
    )
    _add_config(command)
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
    config = load_config(args.config, args.overrides)
    folder = args.checkpoint or (config.autoencoder if config.kind == "dit" else "")
    if not folder:
        raise ValueError(
            "--checkpoint='': expected the folder of a trained autoencoder, so name the one to encode with"
        )
    _compilation_cache()
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
    with _progress() as show:
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
    print(json.dumps(about, indent=2, default=_plain))


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "sample held-out prompts, track what came out, and score it",
        "stvdm evaluate --checkpoint=runs/dit --num=200 --output=results.json",
        "Prints each score with its 95 % interval, beside the same score of real clips and of reconstructed ones.",
    )
    _add_sampling(command)
    command.add_argument("--num", type=_count, default=200, metavar="N", help="held-out prompts (default 200)")
    command.add_argument("--batch", type=_count, default=16, metavar="B", help="clips sampled at once (default 16)")
    command.add_argument("--output", default="results.json", metavar="FILE", help="default: results.json")


def _evaluate(args: argparse.Namespace) -> None:
    _compilation_cache()
    from stvdm.evaluation import run

    run.main(
        None if args.checkpoint == BUNDLED else args.checkpoint,
        num=args.num,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        batch=args.batch,
        output=args.output,
    )


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


def _nearest(key: str, known: Sequence[str]) -> str:
    """A key that stands elsewhere under the same name, else those spelled alike, else all."""
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = elsewhere or difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"


def _innermost(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")


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


def _compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "stvdm" / "xla"))


if __name__ == "__main__":
    sys.exit(main())
