# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model: sample held-out prompts, track what came out, and say beside it what real clips score.

    stvdm evaluate --num=200 --output=results.json

Four columns of the same scenes: *real* clips (the ceiling of the instrument), those clips through the autoencoder
(the ceiling of the model), *generated* from their captions, and *chance*: real clips of other scenes, which is what a
perfect model would score that never reads its prompt. An item on which real clips do not reach 0.95 is not reported:
it is the tracker that fails. But "all_right" always is: it asks nine items at once, each of which may fail one real
clip in twenty, so read it against what real clips reach; and so are "residual" and "flicker", which know no right and
wrong. Scenes come from the test split: each shows a combination of colour, shape and motion never trained on.

    held = hold_out(pipeline, num=200)                                  # once, whatever is sampled
    report, result = measure(pipeline, held, steps=25, guidance=3.0)    # as often as there are ways of sampling
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util

import stvdm
from stvdm.data import kinetic_scene, kinetic_shapes
from stvdm.data.kinetic_shapes import Scene, World
from stvdm.diffusion import flow
from stvdm.evaluation import instruments, metrics, physics, published, result_file
from stvdm.models import video_features
from stvdm.sampling import denoising
from stvdm.sampling.denoising import Models
from stvdm.sampling.pipeline import Pipeline, Result, to_model_range

HIGHER_IS_BETTER = (*physics.RIGHT_OR_WRONG, "all_right", "colour_constancy")
OF_THE_PROMPT = (*physics.PROMPT, "all_right")  # items that a clip can only get right by reading its prompt, or by luck
FEW_OF_A_SET = 100  # clips: distances of fewer are told with a warning
LEAST_OF_A_SET = 3  # clips: of as many or fewer there are no distances
LOSS_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels at which `flow_loss` is taken


class HeldOut(NamedTuple):
    """What a model is held against: scenes it never saw, rendered, and through its autoencoder."""

    scenes: list[Scene]
    world: World
    seed: int  # of the scenes
    real: np.ndarray  # uint8 (num, T, H, W, 3)
    rebuilt: np.ndarray  # the same, through the autoencoder
    others: np.ndarray  # the same, of as many other scenes: how far apart sets of real clips are
    latents: np.ndarray  # normalised, (num, t, h, w, z)
    features: dict[str, np.ndarray]  # kinetic (num, D), of "real", "reconstructed" and "others"
    columns: dict[str, dict[str, physics.Row]]  # "reconstructed", "real" and, of more than one scene, "chance"
    reconstruction: dict[str, float]
    flicker: dict[str, float]  # mean |frame-to-frame change| in values of [-1, 1], of "reconstructed" and "real"


def main(
    checkpoint: str | os.PathLike | None = None,
    *,
    num: int = 200,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    batch: int = 16,
    output: epath.PathLike = "results.json",
    features: str | os.PathLike | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the bundled model) and writes the result with all its conditions.

    Beside ``output``, with the suffixes .png and .gif, lie a contact sheet of the first 16 generated clips and the
    clips themselves, moving side by side.

    Args:
      output: ends in .json; may be gs://.
      features: a folder of published networks, for `published.Judges`; what they say is added.

    Raises:
      ValueError: if the model was not trained on kinetic shapes' captions, ``features`` holds no networks, or one that
        can't look at its clips, or ``output`` does not end in .json.
    """
    target = epath.Path(output)
    if target.suffix != ".json":
        raise ValueError(
            f"--output={output}: expected a name that ends in .json, beside which the clips go as .png and .gif; use "
            f"{target.with_suffix('.json')}."
        )
    judges = None if features is None else published.Judges.load(features)
    pipeline = Pipeline.load(checkpoint)
    if judges is not None:
        judges.try_on(np.zeros((1, *pipeline.default_shape, 3), np.uint8))
    say(f"scoring {num} real clips, and reconstructing them")
    held = hold_out(pipeline, num=num, seed=seed, batch=batch)
    say(f"generating {num} clips")
    report, result = measure(pipeline, held, steps=steps, guidance=guidance, sampler=sampler, batch=batch)
    if judges is not None:
        say("asking published networks")
        scores, far, widths = judged(judges, held, result.videos)
        for item, columns in scores.items():
            report["items"][item] = {name: physics.row(values).cell() for name, values in columns.items()}
            if "generated" in columns:
                report["scores"][item] = result_file.kept(columns["generated"].tolist())
        report["distances"] |= far
        report["feature_widths"] |= widths
        report["conditions"]["networks_sha256"] = judges.digests()
    report["conditions"]["checkpoint"] = "bundled" if checkpoint is None else str(checkpoint)
    result_file.write(target, report)
    from stvdm.data import video

    shown, captions = list(result.videos[:16]), result.prompts[:16]
    with result_file.whole(target.with_suffix(".png")) as file:
        video.contact_sheet(shown, captions).save(file, "PNG")
    with result_file.whole(target.with_suffix(".gif")) as file:
        video.write_gif(file, video.side_by_side(shown, captions), fps=pipeline.fps, min_side=1)
    print(as_text(report))
    say(f"in {', '.join(str(target.with_suffix(suffix)) for suffix in ('.json', '.png', '.gif'))}")
    return report


def hold_out(
    pipeline: Pipeline,
    *,
    num: int,
    seed: int = 0,
    num_frames: int | None = None,
    world: Mapping[str, Any] | None = None,
    batch: int = 16,
) -> HeldOut:
    """The scenes 0 to num - 1 of a seed, and what real and reconstructed clips of them score.

    Args:
      num_frames: T; None: as in training.
      world: fields of `World` that differ from the world of training, e.g. ``{"motions": ("up_left",),
        "motion_weights": (1.0,)}`` to ask for one motion only.
      batch: clips through the autoencoder at once.

    Raises:
      ValueError: if the model cannot read the captions of these scenes.
    """
    T, height, width = pipeline.default_shape
    place = World.of({**dict(pipeline.settings["data"]["world"]), **(world or {})})
    scenes = [kinetic_shapes.sample_scene(seed, index, split="test", world=place) for index in range(num)]
    unrelated = [kinetic_shapes.sample_scene(seed, num + i, split="test", world=place) for i in range(num)]
    if unread := next(filter(None, (pipeline.tokenizer.problem(scene.caption) for scene in scenes)), ""):
        raise ValueError(f"{unread} Prompts of an evaluation are captions of kinetic shapes.")

    def film(scenes: Sequence[Scene]) -> np.ndarray:
        shape = (num_frames or T, height, width)
        return np.stack([kinetic_scene.render(scene, *shape, pipeline.fps) for scene in scenes])

    real, others = film(scenes), film(unrelated)
    parts = [_filled(real[start : start + batch], batch) for start in range(0, num, batch)]
    latents = [pipeline.encode(part) for part in parts]
    rebuilt = np.concatenate([pipeline.decode(latent) for latent in latents])[:num]
    columns = {
        name: physics.summarise(score_each(videos, scenes, fps=pipeline.fps, world=place))
        for name, videos in (("reconstructed", rebuilt), ("real", real))
    }
    if num > 1:
        by_chance = physics.summarise(score_each(np.roll(real, 1, axis=0), scenes, fps=pipeline.fps, world=place))
        columns["chance"] = {item: by_chance[item] for item in OF_THE_PROMPT}
    return HeldOut(
        scenes=scenes,
        world=place,
        seed=seed,
        real=real,
        rebuilt=rebuilt,
        others=others,
        latents=np.concatenate([np.asarray(latent) for latent in latents])[:num],
        features={
            name: video_features.bundled().extract(videos, batch=batch)
            for name, videos in (("real", real), ("reconstructed", rebuilt), ("others", others))
        },
        columns=columns,
        reconstruction={
            **reconstruction(rebuilt, real),
            "latent_flicker": float(metrics.latent_flicker(pipeline.encode, parts[0]).mean()),
        },
        flicker={name: frame_change(videos) for name, videos in (("reconstructed", rebuilt), ("real", real))},
    )


def measure(
    pipeline: Pipeline,
    held: HeldOut,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    batch: int = 16,
) -> tuple[dict[str, Any], Result]:
    """What a model makes of the captions of held-out scenes: scores with all their conditions, and the clips.

    "conditions" of the report are the set of prompts and its digest, the world that it was drawn from, how many
    samples, their seeds, length and size, how they were sampled, the digests of the model's weights and of its
    autoencoder's, versions and device: what must be equal for two results to be compared (`comparison`), but for the
    model. "scores" are those of
    each clip, None where its prompt does not ask.
    """
    num, first = len(held.scenes), held.seed * 1_000_003
    prompts = [scene.caption for scene in held.scenes]
    result = pipeline.generate(
        prompts,
        seeds=[(first + index) % 2**32 for index in range(num)],  # each clip's own, whatever num is
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        num_frames=held.real.shape[1],
        batch_size=min(batch, num),
    )
    scores = score_each(result.videos, held.scenes, fps=pipeline.fps, world=held.world)
    net = video_features.bundled()
    sets = {
        "generated": net.extract(result.videos, batch=batch),
        "reconstructed": held.features["reconstructed"],
        "real": held.features["others"],
    }
    report = {
        "conditions": {
            "prompts": f"kinetic shapes, test split, seed {held.seed}, {num} scenes",
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "num": num,
            "world": {name: list(v) if isinstance(v, tuple) else v for name, v in vars(held.world).items()},
            **result.settings,
            "clip_seeds": f"{held.seed} * 1000003 + index" + " modulo 2**32" * (first + num > 2**32),
            "autoencoder_sha256": digest_of({name: pipeline.params[name] for name in ("autoencoder", "statistics")}),
            "flow_path": pipeline.settings["flow"]["path"],
            "loss_times": list(LOSS_TIMES),
            "versions": {"stvdm": stvdm.__version__, "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
            "kinetic_features_sha256": net.digest,
        },
        "items": table({"generated": physics.summarise(scores), **held.columns}),
        "all_right_by_things": {
            num_things: physics.summarise(clips)["all_right"].cell()
            for num_things, clips in _by_things(scores, held.scenes)
        },
        "reconstruction": held.reconstruction,
        "flicker": {"generated": frame_change(result.videos), **held.flicker},
        "distances": distances_of(sets, held.features["real"], "kinetic"),
        "feature_widths": {"kinetic": held.features["real"].shape[1]},
        "flow_loss": flow_loss(pipeline, held.latents, prompts, batch=batch),
        "scores": {item: result_file.kept([one[item] for one in scores]) for item in physics.ITEMS},
    }
    return report, result


def judged(
    judges: published.Judges, held: HeldOut, videos: np.ndarray
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, float]], dict[str, int]]:
    """What published networks say of generated, reconstructed and real clips, and by chance.

    Returns:
      item -> column -> a score of each clip. clip_score, of which chance is that of real clips under captions of
        others; lpips, of reconstructed clips.
      distance -> column -> how far its clips are from the real ones, over features of I3D and of VideoMAE, as of
        `distances_of`, e.g. i3d_frechet, which is FVD. There "real" are as many other real clips, the distance of which
        is what so few clips come to without any fault.
      network -> how many features of a clip it gives.
    """
    captions = [scene.caption for scene in held.scenes]
    scores: dict[str, dict[str, np.ndarray]] = {}
    far: dict[str, dict[str, float]] = {}
    widths: dict[str, int] = {}
    if judges.clip is not None:
        columns = {"generated": videos, "reconstructed": held.rebuilt, "real": held.real}
        if len(videos) > 1:
            columns["chance"] = np.roll(held.real, 1, axis=0)
        scores["clip_score"] = {name: judges.clip_score(clips, captions) for name, clips in columns.items()}
    if judges.lpips is not None:
        scores["lpips"] = {"reconstructed": judges.lpips_distance(held.rebuilt, held.real)}
    for network in published.OF_VIDEOS:
        if getattr(judges, network) is not None:
            columns = {"generated": videos, "reconstructed": held.rebuilt, "real": held.others}
            sets = {name: judges.features(network, clips) for name, clips in columns.items()}
            far |= distances_of(sets, judges.features(network, held.real), network)
            widths[network] = sets["generated"].shape[1]
    return scores, far, widths


def distances_of(columns: Mapping[str, np.ndarray], real_ND: np.ndarray, name: str) -> dict[str, dict[str, float]]:
    """Distance -> column -> how far its clips' features are from those of real ones: NAME_frechet, NAME_kernel, ...

    Of fewer clips than `distributions.precision_recall` needs there are none. Reconstructed clips are copies of
    the real ones themselves, and so may lie nearer than other real clips: no ceiling. Named "kinetic" they are over the
    package's own network of clips, and comparable with nothing but themselves: not FVD.
    """
    found: dict[str, dict[str, float]] = {}
    if len(real_ND) <= LEAST_OF_A_SET:
        return found
    for column, features_ND in columns.items():
        for kind, value in instruments.distances(features_ND, real_ND).items():
            found.setdefault(f"{name}_{kind}", {})[column] = value
    return found


def flow_loss(
    pipeline: Pipeline, latents: np.ndarray, prompts: Sequence[str], *, batch: int = 16, seed: int = 0
) -> float:
    """Mean squared error of the velocity at LOSS_TIMES, over clips; each clip and time has its own noise, from seed.

    2 or so for a fresh model, whose velocity is 0. Compare only models of one autoencoder and one path: the unit is the
    latent's deviation. Cannot see: which errors matter. What a viewer notices first is a small part of it.
    """
    objective = denoising.objective(pipeline.settings["flow"])
    errors = []
    for start in range(0, len(latents), batch):
        latent = _filled(latents[start : start + batch], batch)
        num = min(batch, len(latents) - start)
        tokens, mask = pipeline.words([*prompts[start : start + num], *[""] * (batch - num)])
        clip_B = start + np.arange(batch)
        for number, time in enumerate(LOSS_TIMES):
            draw_B, time_B = clip_B * len(LOSS_TIMES) + number, np.full(batch, time, np.float32)
            error_B = _velocity_error(
                pipeline.models,
                pipeline.networks,
                latent,
                tokens,
                mask,
                time_B,
                draw_B,
                seed,
                objective=objective,
            )
            errors.append(np.asarray(error_B)[:num])
    return float(np.concatenate(errors).mean())


@functools.partial(jax.jit, static_argnames=("models", "objective"))
def _velocity_error(
    models: Models,
    params: Any,
    latent_Bthwz: jax.Array,
    tokens_BS: jax.Array,
    mask_BS: jax.Array,
    time_B: jax.Array,
    draw_B: jax.Array,
    seed: int,
    *,
    objective: flow.Objective,
) -> jax.Array:
    """(B,): squared error of the velocity at one time, with the noise number ``draw_B`` of a seed."""
    key = jax.random.key(seed)
    noise = jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), latent_Bthwz.shape[1:]))(draw_B)
    text = models.read(params, tokens_BS, mask_BS)
    _, parts = flow.flow_matching_loss(
        lambda x, t: models.predict(params, x, t, text, mask_BS), latent_Bthwz, noise, time_B, objective=objective
    )
    return parts["velocity_mse"]


def digest_of(params: Any) -> str:
    """sha256 of the arrays of nested dicts, with their names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def frame_change(videos: np.ndarray) -> float:
    """`metrics.flicker` of uint8 videos, in values of [-1, 1], averaged over clips."""
    return float(metrics.flicker(to_model_range(videos)).mean())


def score_each(videos: np.ndarray, scenes: Sequence[Scene], *, fps: float, world: World) -> list[dict[str, float]]:
    """The scores of each clip, against the scene it was asked for."""
    return [physics.score(video, scene, fps=fps, world=world) for video, scene in zip(videos, scenes, strict=True)]


def table(columns: dict[str, dict[str, physics.Row]]) -> dict[str, Any]:
    """Item -> column -> mean, interval, clips; an item that real clips fail, but for all_right, says that alone."""
    items: dict[str, Any] = {}
    for item in physics.ITEMS:
        real = columns["real"][item]
        if real.num == 0:
            continue
        if item in HIGHER_IS_BETTER and item != "all_right" and real.mean < physics.CEILING:
            items[item] = {"not_reported": f"real clips score {real.mean:.3f}, below {physics.CEILING}"}
            continue
        items[item] = {
            name: row.cell()
            for name, row in ((name, rows[item]) for name, rows in columns.items() if item in rows)
            if not math.isnan(row.mean)
        }
    return items


def reconstruction(rebuilt: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM, excess flicker and error of change of the autoencoder on these clips, in values of [-1, 1]."""
    x, y = to_model_range(rebuilt), to_model_range(real)
    scores = {
        "psnr_db": metrics.psnr(x, y, data_range=2.0),
        "ssim": metrics.ssim(x, y, data_range=2.0),
        "excess_flicker": metrics.excess_flicker(x, y),
        "change_error": metrics.change_error(x, y),
    }
    return {name: float(values.mean()) for name, values in scores.items()}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    columns = ("generated", "reconstructed", "real", "chance")
    lines = [f"{'':18}" + "".join(f"{name:>24}" for name in columns) + f"{'clips':>7}"]
    for item, cells in report["items"].items():
        if "not_reported" in cells:
            lines.append(f"{item:18}  not reported: {cells['not_reported']}")
            continue
        shown = [cells.get(name) for name in columns]
        texts = [physics.told(cell) if cell else "-" for cell in shown]
        num = max(cell["num"] for cell in cells.values())
        lines.append(f"{item:18}" + "".join(f"{text:>24}" for text in texts) + f"{num:>7}")
    lines.append(
        "all right in generated clips: "
        + ", ".join(
            f"of {n} {'thing' if n == 1 else 'things'} {physics.told(c)} ({c['num']})"
            for n, c in report["all_right_by_things"].items()
        )
    )
    rebuilt = report["reconstruction"]
    lines.append(
        f"autoencoder: PSNR {rebuilt['psnr_db']:.2f} dB, SSIM {rebuilt['ssim']:.3f}, "
        f"excess flicker {rebuilt['excess_flicker']:.4f}, change error {rebuilt['change_error']:.4f}"
    )
    lines.append("mean |frame-to-frame change|: " + ", ".join(f"{k} {v:.4f}" for k, v in report["flicker"].items()))
    for score, cells in report.get("distances", {}).items():
        lines.append(f"{score}: " + ", ".join(f"{name} {value:.4g}" for name, value in cells.items()))
    if report.get("distances"):
        num = report["conditions"]["num"]
        lines.append(
            "there real clips are others; reconstructed ones are copies, and may lie nearer than they: no ceiling"
        )
        if num < FEW_OF_A_SET:
            lines.append(f"distances of {num} clips say little; take 200 or more")
        lines += [
            f"{name}_frechet: covariances of {num} clips in {width} features have not full rank, which makes it too "
            f"large; take more than {width}, or look at {name}_kernel"
            for name, width in report["feature_widths"].items()
            if num <= width
        ]
    return "\n".join(lines)


def _by_things(
    scores: Sequence[dict[str, float]], scenes: Sequence[Scene]
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """(number of things, the scores of the clips that have so many)."""
    for num_things in sorted({len(scene.things) for scene in scenes}):
        yield num_things, [s for s, scene in zip(scores, scenes, strict=True) if len(scene.things) == num_things]


def _filled(videos: np.ndarray, size: int) -> np.ndarray:
    """A batch filled up with its last clip, so that all have one compiled shape."""
    return np.concatenate([videos, np.repeat(videos[-1:], size - len(videos), axis=0)])
