# SPDX-License-Identifier: Apache-2.0
"""Runs the cells of an ablation: trains what a variant's config says with one seed, evaluates it, keeps the result.

    stvdm ablate attention --size=tiny                     # the grid, seed by seed
    stvdm ablate attention --size=tiny --cell=full:0       # one cell

A cell is: its config; its autoencoder, trained where the question asks for that, else the one of the base; latents;
training; evaluation in each way of sampling. `stvdm.ablations.shelf` keeps what several cells, or questions, share.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from stvdm import config as base
from stvdm.ablations import cost, results
from stvdm.ablations import shelf as shelves
from stvdm.ablations.edits import Run, Stage
from stvdm.ablations.questions import Question, Sampling
from stvdm.ablations.shelf import SEED, WITHOUT_EFFECT, Say, agreed, made_once, sources, under, versions
from stvdm.data.kinetic_shapes import World
from stvdm.data.video import contact_sheet
from stvdm.evaluation import agreement
from stvdm.evaluation import run as evaluation
from stvdm.models import video_features
from stvdm.sampling import pipeline
from stvdm.sampling.pipeline import Pipeline
from stvdm.train import autoencoder as train_autoencoder
from stvdm.train import dit as train_dit
from stvdm.train import supervisor, telemetry


def main(
    question: Question,
    bases: Run,
    *,
    size: str,
    num_seeds: int = 3,
    cell: str | None = None,
    num: int = 256,
    batch: int = 32,
    workdir: epath.PathLike = "runs/ablations",
    folder: epath.PathLike = "results/ablations",
    mixed: bool = False,
    options: Sequence[str] = (),
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> epath.Path:
    """Runs the cells that have no result yet; returns the folder of the results.

    Args:
      bases: what the edits start from.
      size: a name for the bases, under which results are kept.
      num_seeds: seeds 0 to num_seeds - 1.
      cell: "VARIANT:SEED", to run that one alone.
      num, batch: clips of an evaluation, in all and at once.
      workdir: of trainings and latents.
      folder: of the results of all questions.
      mixed: whether results may be there that were made under other conditions.
      options: words to repeat in the command that a result names. Without any, results that are all there are taken
        as they are, whatever versions, device and defaults made them.

    Raises:
      ValueError: for an unknown cell, or results under other conditions.
    """
    target = epath.Path(folder) / question.name / size
    wanted = [parse(question, cell)] if cell else grid(question, num_seeds)
    if not options and all(agreed(results.file_of(target, *one).exists()) for one in wanted):
        say(f"{question.name}: all results are in {target}; with another --results=DIR they are made anew")
        return target
    expected = conditions(question, bases, size=size, num=num, batch=batch)
    if not mixed:
        results.check(results.read(target), expected=expected)
    held: dict[str, evaluation.HeldOut] = {}
    for number, (variant, seed) in enumerate(wanted, start=1):
        name = f"{question.name} {variant}:{seed} ({number} of {len(wanted)})"
        if agreed(results.file_of(target, variant, seed).exists()):
            say(f"{name}: done before")
            continue
        say(f"{name}: starts")
        if question.trains_autoencoder:
            held.clear()  # each cell sees clips through its own
        measured, sheet = run_cell(
            question, bases, variant, seed, num=num, batch=batch, workdir=workdir, held=held, say=say
        )
        words = ["stvdm", "ablate", question.name, f"--size={size}", f"--cell={variant}:{seed}", *options]
        if jax.process_index() == 0:
            result = {"question": question.name, "size": size, "variant": variant, "seed": seed, "sources": sources()}
            results.write(target, {**result, **measured, "conditions": expected, "command": shlex.join(words)})
            if sheet is not None and seed == 0:
                (target / f"{variant}.png").write_bytes(sheet)
    return target


def grid(question: Question, num_seeds: int) -> list[tuple[str, int]]:
    """All cells, seed by seed, so that a grid that is cut short has whole rows."""
    return [(variant, seed) for seed in range(num_seeds) for variant in question.variants]


def parse(question: Question, cell: str) -> tuple[str, int]:
    """("full", 0) of "full:0"."""
    variant, _, seed = cell.partition(":")
    if variant not in question.variants or not seed.isdecimal():
        raise ValueError(
            f"--cell={cell}: expected VARIANT:SEED, one of {', '.join(question.variants)} and a whole number, "
            f"e.g. {next(iter(question.variants))}:0"
        )
    return variant, int(seed)


def prepared(question: Question, bases: Run, variant: str, seed: int) -> list[Run]:
    """Copies of the bases as a variant edits them, one for each of its stages, with the seed."""
    runs = []
    for stage in question.stages(variant):
        run = Run(*(config.copy_and_resolve_references() for config in bases))
        stage.edit(run)
        for config in run:
            config.seed = seed
        runs.append(run)
    return runs


def run_cell(
    question: Question,
    bases: Run,
    variant: str,
    seed: int,
    *,
    num: int,
    batch: int,
    workdir: epath.PathLike,
    held: dict[str, evaluation.HeldOut] | None = None,
    say: Say,
) -> tuple[dict[str, Any], bytes | None]:
    """Trains and evaluates; returns what is measured, and a picture of the first clips (PNG). Writes to ``workdir``.

    Clips to evaluate with are taken from ``held``, and left there for the next cell.
    """
    shelf = epath.Path(workdir).expanduser()
    runs = prepared(question, bases, variant, seed)
    curves: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}

    # Autoencoder.
    if question.trains_autoencoder:
        made = made_once(train_autoencoder.main, runs[0].autoencoder, shelf, [], say)
        for run in runs:
            run.dit.autoencoder = str(made)
        records = telemetry.read_metrics(made)
        curves["held-out PSNR of the autoencoder, dB"] = curve(records, "eval/psnr")
        seconds["autoencoder"] = seconds_of(records)
    params, description = train_dit.load_autoencoder(runs[0].dit.autoencoder)
    coder, digest = pipeline.autoencoder_of(description["autoencoder"]), evaluation.digest_of(params)

    # Budget.
    def price(config: ConfigDict) -> float:
        if question.budget == "flops":
            return cost.training_flops(config, coder)
        if question.budget == "seconds":
            return shelves.measured_once(lambda c: cost.seconds_per_step(c, coder), config, shelf, [digest], say)
        return 1.0

    share_out(bases, runs, question.stages(variant), price)
    flops = [cost.training_flops(run.dit, coder) for run in runs]
    measured: dict[str, Any] = {
        "edit": edit_of(bases, runs, with_autoencoder=question.trains_autoencoder),
        "curves": curves,
        "samplings": {},
    }

    # Latents and training, each stage from the weights of the one before.
    seconds["training"], done, made = 0.0, 0, None
    for run in runs:
        latents = shelves.folder_of_latents(run.dit, digest, shelf) if run.dit.data.source == "latents" else None
        if latents is not None:
            run.dit.data.path, run.dit.data.validation_path = str(latents / "train"), str(latents / "validation")
        identity = [digest, latents.name if latents is not None else ""]
        if made is not None:
            run.dit.start_from = str(made)
            identity.append(made.name)

        def train(config: ConfigDict, folder: epath.PathLike, latents: epath.Path | None = latents) -> None:
            if latents is not None:
                shelves.encode_clips(config, coder, params, latents, say)
            train_dit.main(config, folder)

        try:
            made = made_once(train, run.dit, shelf, identity, say)
        except FloatingPointError as error:
            return {**measured, "cost": {"seconds": seconds}, "diverged": str(error)}, None
        if question.trains_autoencoder and latents is not None and latents.exists():
            latents.rmtree()  # of this cell alone, and large
        records = telemetry.read_metrics(made)
        for title, name in (("training", "velocity_mse"), ("held-out", "eval/velocity_mse")):
            points = curves.setdefault(f"{title} error of the velocity", [])
            points += [[done + step, value] for step, value in curve(records, name)]
        seconds["training"] += seconds_of(records)
        done += run.dit.total_steps

    # Evaluation.
    assert made is not None
    last, loaded = runs[-1].dit, Pipeline.load(made)
    measured["cost"] = {
        "seconds": seconds,
        "parameters": {name: size_of(loaded.params[name]) for name in ("dit", "text", "autoencoder")},
        "tokens": int(np.prod(cost.grid_of(last, coder, loaded.default_shape))),
        "flops_per_step": sum(run.dit.total_steps * each for run, each in zip(runs, flops, strict=True)) / done,
        "steps": done,
        "machine": f"{_cores()} of {agreement.machine()}",
    }
    measured["model_sha256"] = loaded.digest
    began = time.monotonic()
    held = {} if held is None else held
    measured["samplings"], sheet = sampled(question, loaded, last, digest, held, num=num, batch=batch, say=say)
    seconds["evaluation"] = time.monotonic() - began
    jax.clear_caches()  # hundreds of compiled programs, in a grid
    return measured, sheet


def share_out(bases: Run, runs: Sequence[Run], stages: Sequence[Stage], price: Callable[[ConfigDict], float]) -> None:
    """Gives each stage the steps that its share of what the base's training costs will buy, at a price a step."""
    whole = bases.dit.total_steps * price(bases.dit)
    for run, stage in zip(runs, stages, strict=True):
        run.dit.total_steps = round(stage.share * whole / price(run.dit))


def sampled(
    question: Question,
    loaded: Pipeline,
    config: ConfigDict,
    digest: str,
    held: dict[str, evaluation.HeldOut],
    *,
    num: int,
    batch: int,
    say: Say,
) -> tuple[dict[str, Any], bytes]:
    """Way of sampling -> its scores, and a picture of clips of the first.

    Args:
      digest: of the autoencoder's weights.
      held: what is held out, shared by all that ask for the same clips through the same autoencoder.
    """
    found: dict[str, Any] = {}
    sheet = b""
    for name, sampling in question.samplings.items():
        say(f"  sampling {num} clips: {name}")
        supervisor.beat()
        asked = clips_asked_for(loaded, sampling)
        key = json.dumps([digest, loaded.default_shape, loaded.fps, loaded.settings["data"]["world"], asked])
        if key not in held:
            held[key] = evaluation.hold_out(loaded, num=num, seed=SEED, batch=batch, **asked)
        report, result = evaluation.measure(
            loaded,
            held[key],
            steps=config.sample.steps if sampling.steps is None else sampling.steps,
            guidance=config.sample.guidance if sampling.guidance is None else sampling.guidance,
            sampler=config.sample.sampler,
            batch=batch,
        )
        found[name] = scores_of(report)
        if not sheet:
            opened = io.BytesIO()
            shown = contact_sheet(list(result.videos[:4]), result.prompts[:4], num_frames=6, min_side=64)
            shown.save(opened, "PNG", optimize=True)
            sheet = opened.getvalue()
    return found, sheet


def clips_asked_for(loaded: Pipeline, sampling: Sampling) -> dict[str, Any]:
    """The length and the world of `evaluation.hold_out` that a way of sampling means."""
    T, times = loaded.default_shape[0], sampling.times_length
    world = dict(sampling.world)
    if times == 1:
        return {"num_frames": T, "world": world}
    plan = World(**dict(loaded.settings["data"]["world"]))
    apart = 1 if loaded.autoencoder.grouping == "causal" else 0  # the first frame, which stands alone
    return {"num_frames": apart + times * (T - apart), "world": {**world, "duration": times * plan.duration}}


def scores_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `evaluation.measure` as numbers: "scores" of the model and, of the same scenes, of its "references".

    Scores are the items of `physics`, and: frame_change, the mean change from frame to frame in values of [-1, 1];
    flow_loss; kinetic_frechet, kinetic_kernel, kinetic_precision, kinetic_recall (there "real" are other real clips);
    and of the autoencoder psnr_db, ssim, change_error, excess_flicker and latent_flicker.
    """
    columns: dict[str, dict[str, float]] = {name: {} for name in ("generated", "reconstructed", "real", "chance")}
    hidden = {}
    for item, cells in report["items"].items():
        if "not_reported" in cells:
            hidden[item] = cells["not_reported"]
            continue
        for name, row in cells.items():
            columns[name][item] = row["mean"]
    for name, value in report["flicker"].items():
        columns[name]["frame_change"] = value
    for distance, cells in report["distances"].items():
        for name, value in cells.items():
            columns[name][distance] = value
    columns["generated"] |= {"flow_loss": report["flow_loss"], **report["reconstruction"]}
    return {"scores": columns.pop("generated"), "references": columns, "not_reported": hidden}


# --- what it is a result of ------------------------------------------------------------------------------------------


def conditions(question: Question, bases: Run, *, size: str, num: int, batch: int) -> dict[str, Any]:
    """What must be equal in all cells of a grid, as a flat mapping."""
    found = {
        "size": size,
        "budget": question.budget,
        "evaluation.prompts": f"kinetic shapes, test split, seed {SEED}, {num} scenes",
        "evaluation.batch": batch,
        "evaluation.loss_times": list(evaluation.LOSS_TIMES),
        "evaluation.kinetic_features_sha256": video_features.bundled().digest,
        **{f"versions.{name}": version for name, version in versions().items()},
        "device": jax.devices()[0].device_kind,
        **{f"samplings.{name}": dataclasses.asdict(sampling) for name, sampling in question.samplings.items()},
        **of_config(bases.dit, "dit"),
    }
    if question.trains_autoencoder:
        return {**found, **of_config(bases.autoencoder, "autoencoder")}
    return {**found, "autoencoder_sha256": evaluation.digest_of(train_dit.load_autoencoder(bases.dit.autoencoder)[0])}


def edit_of(bases: Run, runs: Sequence[Run], *, with_autoencoder: bool) -> dict[str, Any]:
    """The keys that a variant changed, with their new values; of several stages as "1.dit.total_steps"."""
    names = ("dit", "autoencoder") if with_autoencoder else ("dit",)

    def keys(run: Run) -> dict[str, Any]:
        return {key: value for name in names for key, value in of_config(getattr(run, name), name).items()}

    before = keys(bases)
    found: dict[str, Any] = {}
    for number, run in enumerate(runs, start=1):
        stage = f"{number}." if len(runs) > 1 else ""
        found |= {f"{stage}{key}": value for key, value in keys(run).items() if value != before.get(key)}
    return found


def of_config(config: ConfigDict, prefix: str) -> dict[str, Any]:
    """The keys of a config that have a say in the result, as "prefix.key"."""
    return {f"{prefix}.{key}": value for key, value in base.flat(config).items() if not under(key, WITHOUT_EFFECT)}


# --- what it cost ----------------------------------------------------------------------------------------------------


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def size_of(params: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


def curve(records: Sequence[Mapping[str, Any]], name: str, most: int = 40) -> list[list[float]]:
    """[[step, value], ...] of a metric, thinned to about so many points; the last is kept."""
    points = [[one["step"], one[name]] for one in records if one.get(name) is not None]
    every = max(1, len(points) // most)
    return points[::-1][::every][::-1]


def seconds_of(records: Sequence[Mapping[str, Any]]) -> float:
    """What a training took, over all its restarts; of several processes, their mean."""
    return sum(
        value
        for one in records
        for key, value in one.items()
        if key.startswith("seconds/") and key != "seconds/data_max"
    )
