# SPDX-License-Identifier: Apache-2.0
"""What commands share: options that several have, progress on one line, compiled programs kept between runs."""

import argparse
import contextlib
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SAMPLERS = ("euler", "heun", "dpm++", "unipc")
BUNDLED = "bundled"
DTYPES = ("float32", "bfloat16", "float16")  # of weights in files


def command_of(commands: Any, name: str, run: Any, summary: str, example: str, remark: str) -> argparse.ArgumentParser:
    """A command without options yet; ``run`` takes what was parsed, and returns the exit status (None: 0)."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}\n\n{textwrap.fill(remark, 100)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, takes_overrides=False, usual=command.get_default)
    return command


def add_config(command: argparse.ArgumentParser) -> None:
    """--config, whose keys can be changed one by one."""
    command.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="what to run, e.g. configs/quickstart.py"
    )
    command.set_defaults(takes_overrides=True)


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Of which model, and how, clips are drawn."""
    command.add_argument("--steps", type=count, metavar="N", help="denoising steps; more is slower and finer")
    command.add_argument(
        "--guidance", type=float, metavar="SCALE", help="how strongly the prompt pulls; 1 is not at all"
    )
    command.add_argument("--sampler", choices=SAMPLERS, help="heun takes two evaluations a step, the others one")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips (default 0)")
    command.add_argument(
        "--checkpoint", default=BUNDLED, metavar="DIR", help="a trained DiT (default: the bundled model)"
    )


def add_adapters(command: argparse.ArgumentParser) -> None:
    """--lora, several times."""
    command.add_argument(
        "--lora",
        type=weighted,
        action="append",
        default=[],
        metavar="DIR[:WEIGHT]",
        help="adapters, and how much of them (default 1); may be given several times",
    )


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """--overwrite, without which `refuse_existing` refuses."""
    command.add_argument("--overwrite", action="store_true", help="write over what is there (default: refuse to)")


def refuse_existing(path: str, *, option: str, overwrite: bool) -> None:
    """Raises ValueError for an output that is there, a file or a folder with something in it, before any work."""
    from etils import epath

    place = epath.Path(path).expanduser()
    if overwrite or not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    raise ValueError(f"{option}={path}: this is there already; name another, or add --overwrite to write over it")


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return number


def weighted(text: str) -> tuple[str, float]:
    """DIR or DIR:WEIGHT; a DIR may have colons of its own."""
    folder, colon, weight = text.rpartition(":")
    try:
        found = (folder, float(weight)) if colon else (text, 1.0)
    except ValueError:
        found = (text, 1.0)
    if not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite weight, e.g. {folder}:0.8")
    return found


def changed(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of the options that are not at their defaults, as --NAME=VALUE."""
    return [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) != args.usual(name)]


def refuse_without_effect(given: Sequence[str], beside: str) -> None:
    """Raises a ValueError if any options were given that do nothing beside another."""
    if given:
        raise ValueError(f"{' '.join(given)}: without effect beside {beside}, so leave it out")


def plain(value: Any) -> Any:
    """What json does not know: numpy numbers and arrays, paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
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


def keep_compiled_programs() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (empty: nowhere)."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "stvdm" / "xla"))
