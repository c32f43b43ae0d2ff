# SPDX-License-Identifier: Apache-2.0
"""Trains the network of clips whose features the package's Frechet distance looks at.

    python -m stvdm.train.features --out=runs/features          # half an hour of one CPU core

A clip of kinetic shapes, and what it is asked: which colours are there; of each that is, its shape, its motion and its
speed; the camera, the grey bar, the backdrop; and what was done to the clip. In half of them nothing was; in the others
frames are out of order, brightness flickers, pixels are noisy, a thing vanishes for some frames, a thing jumps, or
frames are blurred. So features hold what the world is about, and what breaks it.

    loss = sum over questions of the mean cross-entropy (of speed, the squared error), over clips where they make
           sense, each with its weight in `losses`

Clips are new in every step. Not asked, so that damage of these kinds is news to the network: one thing turned into
another, colours that drift, time that runs backwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from stvdm import checkpoint
from stvdm.data.kinetic_scene import COLOURS, MOTIONS, SHAPES, Scene, ground_truth, render
from stvdm.data.kinetic_shapes import Split, sample_scene
from stvdm.models import video_features
from stvdm.models.video_features import Heads, VideoFeatures

DAMAGES = ("none", "order", "flicker", "noise", "vanishing", "jump", "blur")
BACKDROPS = ("plain", "gradient", "stripes", "checker")
NUM_COLOURS, NUM_SHAPES, NUM_MOTIONS = len(COLOURS), 3, len(MOTIONS)
PARTS = (  # what the heads say
    ("colour", NUM_COLOURS),
    ("shape", NUM_COLOURS * NUM_SHAPES),
    ("motion", NUM_COLOURS * NUM_MOTIONS),
    ("speed", NUM_COLOURS),
    ("camera", 3),
    ("bar", 1),
    ("backdrop", len(BACKDROPS)),
    ("damage", len(DAMAGES)),
)
FRAMES, FPS = 17, 8.0


def main(
    out: str,
    *,
    steps: int = 4000,
    batch: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    num_test: int = 1000,
) -> dict[str, Any]:
    """Trains, tests on clips never seen, writes model.safetensors (float16) and model.json to ``out``; what was found.

    Args:
      steps: of ``batch`` new clips each.
      num_test: held-out clips of each split: "validation" (new scenes of combinations that training has) and "test"
        (combinations of colour, shape and motion that it never has).
    """
    # Model.
    net, heads = VideoFeatures(), Heads(PARTS)
    keys = jax.random.split(jax.random.key(seed), 2)
    size = video_features.SIZE
    params = nn.unbox(
        {
            "net": net.init(keys[0], jnp.zeros((1, FRAMES, size, size, 3)))["params"],
            "heads": heads.init(keys[1], jnp.zeros((1, net.features)))["params"],
        }
    )

    # Optimiser.
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.02))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, videos: jax.Array, truth: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            features = net.apply({"params": params["net"]}, video_features.prepare(videos))
            parts = losses(heads.apply({"params": params["heads"]}, features), truth)
            return jnp.stack(list(parts.values())).sum(), parts

        gradient, parts = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, parts

    # Loop.
    began, recent = time.monotonic(), dict.fromkeys((name for name, _ in PARTS), 0.0)
    for i in range(steps):
        videos, truth = clips(seed, range(i * batch, (i + 1) * batch), split="train", damaged=0.5)
        params, state, parts = step(params, state, videos, truth)
        recent = {name: old + (float(parts[name]) - old) / min(i + 1, 100) for name, old in recent.items()}
        if (i + 1) % 100 == 0 or i + 1 == steps:
            print(
                f"step {i + 1}/{steps}  loss {sum(recent.values()):.3f}  "
                + "  ".join(f"{name} {value:.3f}" for name, value in recent.items())
                + f"  {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    # What features of real clips are like, and how well the heads do; then written.
    real, _ = clips(seed, range(2048), split="train", damaged=0.0)
    plain = {"mean": np.zeros(net.features, np.float32), "std": np.ones(net.features, np.float32)}
    unscaled = video_features.FeatureNet(net, heads, {**params, "statistics": plain}, "")
    raw = unscaled.extract(real)
    params["statistics"] = {"mean": raw.mean(0), "std": raw.std(0)}
    about = {
        "net": {"features": net.features, "widths": list(net.widths)},
        "heads": [list(part) for part in PARTS],
        "trained": {"steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed},
        "seconds": round(time.monotonic() - began),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
    }
    checkpoint.save_model(out, params, about, dtype="float16")
    trained = video_features.load(out)
    found = {split: accuracy(trained, split=split, num=num_test) for split in ("validation", "test")}
    checkpoint.save_model(out, trained.params, {**about, "accuracy": found}, dtype="float16")
    print(json.dumps(found, indent=1))
    return found


def losses(said: dict[str, jax.Array], truth: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each question; one that a clip does not answer (the motion of frames out of order) is left out."""

    def among(name: str, options: int | None = None) -> jax.Array:
        logits = said[name] if options is None else said[name].reshape(len(said[name]), -1, options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, truth[name])

    def mean(values: jax.Array, where: jax.Array) -> jax.Array:
        return (values * where).sum() / jnp.maximum(where.sum(), 1)

    there, moves = truth["colour"], truth["colour"] * truth["in_order"][:, None]
    return {
        "colour": 6 * optax.sigmoid_binary_cross_entropy(said["colour"], there).mean(),
        "shape": 2 * mean(among("shape", NUM_SHAPES), there),
        "motion": mean(among("motion", NUM_MOTIONS), moves),
        "speed": 10 * mean(jnp.square(said["speed"] - truth["speed"]), moves),
        "camera": among("camera").mean(),
        "bar": optax.sigmoid_binary_cross_entropy(said["bar"][:, 0], truth["bar"]).mean(),
        "backdrop": among("backdrop").mean(),
        "damage": 4 * among("damage").mean(),
    }


def clips(
    seed: int, indices: Sequence[int], *, split: Split, damaged: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Clips of these numbers, uint8 (B, T, H, W, 3), a share of them damaged, and the answers to what is asked."""
    videos, truths = [], []
    for index in indices:
        scene = sample_scene(seed, index, split=split)
        random = np.random.default_rng((seed, index, 1))
        what = DAMAGES[random.integers(1, len(DAMAGES))] if random.random() < damaged else "none"
        videos.append(damage(scene, what, random))
        truths.append(_truth(scene, what))
    return np.stack(videos), {name: np.stack([truth[name] for truth in truths]) for name in truths[0]}


def damage(scene: Scene, what: str, random: np.random.Generator) -> np.ndarray:
    """A clip of a scene with one of `DAMAGES` done to it, uint8 (T, H, W, 3)."""
    size = video_features.SIZE
    video = render(scene, FRAMES, size, size, FPS)
    first = int(random.integers(1, FRAMES - 3))
    last = int(random.integers(first + 2, FRAMES + 1))
    number = int(random.integers(len(scene.things)))
    thing = scene.things[number]
    if what == "order":
        order = np.arange(FRAMES)
        while (order == np.arange(FRAMES)).all():
            order[first:last] = first + random.permutation(last - first)
        return video[order]
    if what == "flicker":
        gains = 1 + random.uniform(0.05, 0.3) * random.normal(size=(FRAMES, 1, 1, 1))
        return np.clip(video * gains + 0.5, 0, 255).astype(np.uint8)
    if what == "noise":
        return np.clip(video + random.uniform(6, 40) * random.normal(size=video.shape) + 0.5, 0, 255).astype(np.uint8)
    if what == "vanishing":
        others = scene.things[:number] + scene.things[number + 1 :]
        video[first:last] = render(dataclasses.replace(scene, things=others), FRAMES, size, size, FPS)[first:last]
    elif what == "jump":
        turn, away = random.uniform(0, 2 * np.pi), random.uniform(0.15, 0.5)
        to = (thing.position[0] + away * np.cos(turn), thing.position[1] + away * np.sin(turn))
        moved = list(scene.things)
        moved[number] = dataclasses.replace(thing, position=to)
        elsewhere = render(dataclasses.replace(scene, things=tuple(moved)), FRAMES, size, size, FPS)
        video[first:] = elsewhere[first:]
    elif what == "blur":
        taps = np.exp(-0.5 * np.square(np.arange(-4, 5) / random.uniform(0.6, 2.0)))
        soft = video.astype(np.float32)
        for axis in (1, 2):
            edge = [(4, 4) if a == axis else (0, 0) for a in range(4)]
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(soft, edge, mode="edge"), 9, axis=axis)
            soft = windows @ (taps / taps.sum()).astype(np.float32)
        return (soft + 0.5).astype(np.uint8)
    return video


def accuracy(trained: video_features.FeatureNet, *, split: Split, num: int, seed: int = 1) -> dict[str, float]:
    """Shares of answers that are right, of whole clips and of things; of damage on clips half of which are damaged."""
    whole, truth = clips(seed, range(num), split=split, damaged=0.0)
    said = trained.tell(whole)
    there = truth["colour"] > 0
    shape = said["shape"].reshape(num, NUM_COLOURS, NUM_SHAPES).argmax(-1) == truth["shape"]
    motion = said["motion"].reshape(num, NUM_COLOURS, NUM_MOTIONS).argmax(-1) == truth["motion"]
    colours = ((said["colour"] > 0) == there).all(1)
    broken, of_broken = clips(seed, range(num, 2 * num), split=split, damaged=0.5)
    heard = trained.tell(broken)["damage"].argmax(-1)
    found = {
        "colours and count": colours,
        "shape": shape[there],
        "motion": motion[there],
        "all of these": colours & (shape | ~there).all(1) & (motion | ~there).all(1),
        "camera": said["camera"].argmax(-1) == truth["camera"],
        "bar": (said["bar"][:, 0] > 0) == (truth["bar"] > 0),
        "backdrop": said["backdrop"].argmax(-1) == truth["backdrop"],
        "damage": heard == of_broken["damage"],
        **{f"damage: {what}": (heard == i)[of_broken["damage"] == i] for i, what in enumerate(DAMAGES)},
    }
    error = np.abs(said["speed"] - truth["speed"])[there].mean()
    return {name: round(float(right.mean()), 4) for name, right in found.items()} | {
        "mean error of speed, frame heights a second": round(float(error), 4)
    }


def _truth(scene: Scene, what: str) -> dict[str, Any]:
    colours, motions, figures = list(COLOURS), list(MOTIONS), list(SHAPES)
    tracks = ground_truth(scene, FRAMES, video_features.SIZE, video_features.SIZE, FPS)["tracks"]
    there, speed = np.zeros((2, NUM_COLOURS), np.float32)
    shape, motion = np.zeros((2, NUM_COLOURS), np.int32)
    for thing, track in zip(scene.things, tracks, strict=True):
        i = colours.index(thing.colour)
        there[i], shape[i], motion[i] = 1, figures.index(thing.shape), motions.index(thing.motion)
        speed[i] = np.linalg.norm(np.diff(track, axis=0), axis=1).mean() * FPS / video_features.SIZE
    return {
        "colour": there,
        "shape": shape,
        "motion": motion,
        "speed": speed,
        "camera": np.int32(1 + np.sign(scene.camera[0])),
        "bar": np.float32(scene.bar is not None),
        "backdrop": np.int32(BACKDROPS.index(scene.background.kind)),
        "damage": np.int32(DAMAGES.index(what)),
        "in_order": np.float32(what != "order"),
    }


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Trains the feature network; see the head of this file.")
    options.add_argument("--out", required=True, help="folder for model.safetensors and model.json")
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    main(given.out, steps=given.steps, seed=given.seed)
