# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model: sample held-out prompts, track what came out, and say beside it what real clips score.

    stvdm evaluate --num=200 --output=results.json

Three columns of the same scenes: *real* clips (the ceiling of the instrument), those clips through the autoencoder
(the ceiling of the model), and *generated* from their captions. An item on which real clips do not reach 0.95 is not
reported. Scenes come from the test split: each shows a combination of colour, shape and motion never trained on.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import stvdm
from stvdm.data import kinetic_scene, kinetic_shapes
from stvdm.data.kinetic_shapes import Scene, World
from stvdm.evaluation import metrics, physics
from stvdm.sampling.pipeline import Pipeline, to_model_range

HIGHER_IS_BETTER = (*physics.RIGHT_OR_WRONG, "all_right", "colour_constancy")


def main(
    checkpoint: str | os.PathLike | None = None,
    *,
    num: int = 200,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    batch: int = 16,
    output: str | os.PathLike = "results.json",
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Evaluates a checkpoint (None: the bundled model) and writes the result with all its conditions.

    Beside ``output``, with the suffixes .png and .gif, lie a contact sheet of the first 16 generated clips and the
    clips themselves, moving side by side.

    Raises:
      ValueError: if the model was not trained on kinetic shapes' captions.
    """
    pipeline = Pipeline.load(checkpoint)
    data = pipeline.settings["data"]
    world = World(**dict(data["world"]))
    num_frames, height, width = pipeline.default_shape
    scenes = [kinetic_shapes.sample_scene(seed, index, split="test", world=world) for index in range(num)]
    real = np.stack([kinetic_scene.render(scene, num_frames, height, width, pipeline.fps) for scene in scenes])
    parts = [slice(start, start + batch) for start in range(0, num, batch)]

    say(f"scoring {num} real clips, and reconstructing them")
    rebuilt = np.concatenate([pipeline.decode(pipeline.encode(_filled(real[part], batch))) for part in parts])[:num]
    say(f"generating {num} clips")
    prompts = [scene.caption for scene in scenes]
    seeds = [seed * 1_000_003 + index for index in range(num)]  # each clip's own, whatever num is
    result = pipeline.generate(
        prompts,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        batch_size=min(batch, num),
    )

    scores = {
        name: [physics.score(*pair, fps=pipeline.fps, world=world) for pair in zip(videos, scenes, strict=True)]
        for name, videos in (("generated", result.videos), ("reconstructed", rebuilt), ("real", real))
    }
    columns = {name: physics.summarise(clips) for name, clips in scores.items()}
    report = {
        "conditions": {
            "prompts": f"kinetic shapes, test split, seed {seed}, {num} scenes",
            "world": data["world"],
            **result.settings,
            "clip_seeds": f"{seed} * 1000003 + index",
            "versions": {"stvdm": stvdm.__version__, "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
        },
        "items": table(columns),
        "all_right_by_things": {
            num_things: _cell(physics.summarise(clips)["all_right"])
            for num_things, clips in _by_things(scores["generated"], scenes)
        },
        "reconstruction": reconstruction(rebuilt, real),
        "flicker": {
            name: float(metrics.flicker(to_model_range(videos)).mean())
            for name, videos in (("generated", result.videos), ("reconstructed", rebuilt), ("real", real))
        },
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    from stvdm.data import video

    shown, captions = list(result.videos[:16]), prompts[:16]
    video.contact_sheet(shown, captions).save(Path(output).with_suffix(".png"))
    moving = video.side_by_side(shown, captions)
    video.write_gif(Path(output).with_suffix(".gif"), moving, fps=pipeline.fps, min_side=1)
    print(as_text(report))
    say(f"in {', '.join(str(Path(output).with_suffix(suffix)) for suffix in (Path(output).suffix, '.png', '.gif'))}")
    return report


def table(columns: dict[str, dict[str, physics.Row]]) -> dict[str, Any]:
    """Item -> column -> mean, interval, clips; an item that the real clips fail says so and nothing else."""
    items: dict[str, Any] = {}
    for item in physics.ITEMS:
        real = columns["real"][item]
        if real.num == 0:
            continue
        if item in HIGHER_IS_BETTER and item != "all_right" and real.mean < physics.CEILING:
            items[item] = {"not_reported": f"real clips score {real.mean:.3f}, below {physics.CEILING}"}
            continue
        items[item] = {
            name: _cell(row)
            for name, row in ((name, rows[item]) for name, rows in columns.items())
            if not math.isnan(row.mean)
        }
    return items


def reconstruction(rebuilt: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and excess flicker of the autoencoder on these clips, in values of [-1, 1]."""
    x, y = to_model_range(rebuilt), to_model_range(real)
    scores = {
        "psnr_db": metrics.psnr(x, y, data_range=2.0),
        "ssim": metrics.ssim(x, y, data_range=2.0),
        "excess_flicker": metrics.excess_flicker(x, y),
    }
    return {name: float(values.mean()) for name, values in scores.items()}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    columns = ("generated", "reconstructed", "real")
    lines = [f"{'':18}" + "".join(f"{name:>24}" for name in columns) + f"{'clips':>7}"]
    for item, cells in report["items"].items():
        if "not_reported" in cells:
            lines.append(f"{item:18}  not reported: {cells['not_reported']}")
            continue
        shown = [cells.get(name) for name in columns]
        texts = [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c else "-" for c in shown]
        lines.append(f"{item:18}" + "".join(f"{text:>24}" for text in texts) + f"{cells['real']['num']:>7}")
    lines.append(
        "all right in generated clips: "
        + ", ".join(
            f"of {n} {'thing' if n == 1 else 'things'} {c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}] ({c['num']})"
            for n, c in report["all_right_by_things"].items()
        )
    )
    rebuilt = report["reconstruction"]
    lines.append(
        f"autoencoder: PSNR {rebuilt['psnr_db']:.2f} dB, SSIM {rebuilt['ssim']:.3f}, "
        f"excess flicker {rebuilt['excess_flicker']:.4f}"
    )
    lines.append("mean |frame-to-frame change|: " + ", ".join(f"{k} {v:.4f}" for k, v in report["flicker"].items()))
    return "\n".join(lines)


def _by_things(
    scores: Sequence[dict[str, float]], scenes: Sequence[Scene]
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """(number of things, the scores of the clips that have so many)."""
    for num_things in sorted({len(scene.things) for scene in scenes}):
        yield num_things, [s for s, scene in zip(scores, scenes, strict=True) if len(scene.things) == num_things]


def _cell(row: physics.Row) -> dict[str, float]:
    return {"mean": row.mean, "low": row.low, "high": row.high, "num": row.num}


def _filled(videos: np.ndarray, size: int) -> np.ndarray:
    """A batch filled up with its last clip, so that all have one compiled shape."""
    return np.concatenate([videos, np.repeat(videos[-1:], size - len(videos), axis=0)])
