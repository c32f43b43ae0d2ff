# SPDX-License-Identifier: Apache-2.0
"""Damage of known kind and strength, to find out which metrics see it.

    flicker         levels (of 255), rms over frames      the brightness of each frame is off
    identity_swap   share of frames, the last ones        a thing has become another, of other colour and shape
    vanishing       share of frames, in one piece         a thing is not there, where it could be seen
    teleport        frame heights                         a thing jumps, and goes on from there
    time_reversal   1: all of it                          the clip runs backwards
    blur            frame heights, deviation              details are smeared
    colour_drift    levels (of 255), rms, at the end      colours wander off, evenly over time
    freeze          share of steps, the last ones         the clip stands still

Strength 0 is no damage, and gives the clip back byte for byte. What is drawn (which thing, where to, which hue) comes
from ``seed`` alone, so that a larger strength does more to the same thing. What happens to a thing is not painted over
pixels: the scene is rendered again with the thing as it then is, so that what lies behind, or in front, is right.

    shot = Shot(sample_scene(0, 7, split="test"))
    video_THWC = DAMAGES["teleport"](shot, 0.15, seed=0)
    video_THWC = flicker(any_video_THWC, 8.0, seed=0)                    # those of pixels take any clip
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from stvdm.data.kinetic_scene import COLOURS, SHAPES, Scene, Thing, ground_truth, render


class Shot(NamedTuple):
    """A scene, and how it is filmed."""

    scene: Scene
    num_frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0

    def render(self, scene: Scene | None = None) -> np.ndarray:
        """The clip, uint8 (T, H, W, 3), of its scene or of another."""
        return render(self.scene if scene is None else scene, *self[1:])

    def visibility(self, number: int) -> np.ndarray:
        """(T,): the part of a thing that is seen in each frame."""
        return ground_truth(self.scene, *self[1:])["visibility"][number]


class Damage(NamedTuple):
    """A kind of damage: its unit, three strengths (mild, middle, strong) or one, and how it is done."""

    name: str
    unit: str
    strengths: tuple[float, ...]
    do: Callable[..., np.ndarray]
    of_pixels: bool  # takes a clip; else a shot

    @property
    def middle(self) -> int:
        """Which of the strengths decides."""
        return len(self.strengths) // 2

    def __call__(self, shot: Shot, strength: float, *, seed: int = 0) -> np.ndarray:
        """The damaged clip, uint8 (T, H, W, 3)."""
        return self.do(shot.render() if self.of_pixels else shot, strength, seed=seed)


# --- of pixels ---


def flicker(video_THWC: np.ndarray, strength: float, *, seed: int = 0) -> np.ndarray:
    """Adds to each frame its own brightness: Gaussian, brought to mean 0 and rms ``strength`` levels over the frames.

    Bytes are rounded, and end at 0 and 255.

    Raises:
      ValueError: for a clip that is not bytes, or a strength below 0.
    """
    video = _bytes(video_THWC)
    _check("flicker", strength)
    offsets_T = _generator(seed).normal(size=len(video))
    offsets_T -= offsets_T.mean()
    offsets_T *= strength / max(math.sqrt(float(np.square(offsets_T).mean())), 1e-12)
    return _to_bytes(video + offsets_T[:, None, None, None])


def colour_drift(video_THWC: np.ndarray, strength: float, *, seed: int = 0) -> np.ndarray:
    """Adds a hue that grows evenly from nothing in the first frame to ``strength`` levels, rms of RGB, in the last.

    The hue is drawn evenly from those that leave the mean of red, green and blue as it is. Bytes are rounded, and end
    at 0 and 255.

    Raises:
      ValueError: as `flicker`.
    """
    video = _bytes(video_THWC)
    _check("colour_drift", strength)
    angle = _generator(seed).uniform(0, 2 * math.pi)
    hue_C = math.sqrt(2) * np.cos(angle + np.arange(3) * 2 * math.pi / 3)  # sums to 0, rms 1
    share_T = np.linspace(0, 1, len(video))
    return _to_bytes(video + strength * share_T[:, None, None, None] * hue_C)


def blur(video_THWC: np.ndarray, strength: float, *, seed: int = 0) -> np.ndarray:
    """Smears each frame with a Gaussian of deviation ``strength`` frame heights.

    Nothing is drawn: ``seed`` is not read.

    Raises:
      ValueError: as `flicker`.
    """
    video = _bytes(video_THWC)
    _check("blur", strength)
    sigma = strength * video.shape[1]
    return _to_bytes(ndimage.gaussian_filter(video, (0, sigma, sigma, 0), mode="nearest"))


def time_reversal(video_THWC: np.ndarray, strength: float, *, seed: int = 0) -> np.ndarray:
    """Runs the clip backwards (strength 1) or not (0). Nothing is drawn: ``seed`` is not read.

    Raises:
      ValueError: for a clip that is not bytes, or another strength.
    """
    _bytes(video_THWC)
    if strength not in (0, 1):
        raise ValueError(f"time_reversal of strength {strength}: expected 0, forwards, or 1, backwards.")
    return video_THWC[::-1].copy() if strength else video_THWC.copy()


def freeze(video_THWC: np.ndarray, strength: float, *, seed: int = 0) -> np.ndarray:
    """Repeats one frame in place of the last ``strength`` of the steps, rounded to whole frames; 1: in place of all.

    Nothing is drawn: ``seed`` is not read.

    Raises:
      ValueError: for a clip that is not bytes, or a strength that is no share.
    """
    _bytes(video_THWC)
    _check("freeze", strength, most=1)
    last = len(video_THWC) - 1
    return video_THWC[np.minimum(np.arange(last + 1), last - round(strength * last))]


# --- of things ---


def identity_swap(shot: Shot, strength: float, *, seed: int = 0) -> np.ndarray:
    """In the last ``strength`` of the frames, rounded, one thing is another.

    It has another shape, and a colour that nothing else there has; its path and size stay.

    Raises:
      ValueError: for a strength that is no share.
    """
    _check("identity_swap", strength, most=1)
    rng, video = _generator(seed), shot.render()
    number = int(rng.integers(len(shot.scene.things)))
    thing = shot.scene.things[number]
    colours = [colour for colour in COLOURS if colour not in {other.colour for other in shot.scene.things}]
    shapes = [shape for shape in SHAPES if shape != thing.shape]
    other = dataclasses.replace(
        thing, colour=colours[rng.integers(len(colours))], shape=shapes[rng.integers(len(shapes))]
    )
    first = shot.num_frames - round(strength * shot.num_frames)
    video[first:] = shot.render(_with(shot.scene, number, other))[first:]
    return video


def vanishing(shot: Shot, strength: float, *, seed: int = 0) -> np.ndarray:
    """For ``strength`` of the frames, rounded, a thing is not there; before and after it is, where it would have been.

    These frames follow each other: of all such pieces, the first and the last of the clip too, one in which most of the
    thing could be seen.

    Raises:
      ValueError: for a strength that is no share.
    """
    _check("vanishing", strength, most=1)
    rng, video = _generator(seed), shot.render()
    number = int(rng.integers(len(shot.scene.things)))
    gone = round(strength * shot.num_frames)
    starts_T = rng.permutation(shot.num_frames)
    starts = starts_T[starts_T <= shot.num_frames - gone]
    visible_T = shot.visibility(number)
    first = max(starts, key=lambda start: round(float(visible_T[start : start + gone].sum()), 2))
    things = tuple(thing for n, thing in enumerate(shot.scene.things) if n != number)
    without = dataclasses.replace(shot.scene, things=things)
    video[first : first + gone] = shot.render(without)[first : first + gone]
    return video


def teleport(shot: Shot, strength: float, *, seed: int = 0) -> np.ndarray:
    """From one frame to the next, in the middle half of the clip, a thing jumps ``strength`` frame heights.

    It jumps along an axis, to where most of it can be seen afterwards, from a frame in which it can be seen, and moves
    on from there as it would have (with the floor that it bounces on).

    Raises:
      ValueError: for a strength below 0.
    """
    _check("teleport", strength)
    rng, video = _generator(seed), shot.render()
    number = int(rng.integers(len(shot.scene.things)))
    thing, visible_T = shot.scene.things[number], shot.visibility(number)
    T = shot.num_frames
    moments = rng.permutation(np.arange(max(1, T // 4), max(2, T - T // 4)))
    first = max(moments, key=lambda t: round(float(min(visible_T[t - 1], visible_T[t])), 2))
    directions = rng.permutation(((-1, 0), (1, 0), (0, -1), (0, 1)))
    scenes = [_with(shot.scene, number, _moved(thing, *(strength * d))) for d in directions]
    seen = [round(float(shot._replace(scene=scene).visibility(number)[first:].sum()), 2) for scene in scenes]
    video[first:] = shot.render(scenes[int(np.argmax(seen))])[first:]
    return video


DAMAGES = {
    damage.name: damage
    for damage in (
        Damage("flicker", "levels, rms over frames", (3.0, 8.0, 20.0), flicker, True),
        Damage("identity_swap", "share of frames", (0.12, 0.25, 0.5), identity_swap, False),
        Damage("vanishing", "share of frames", (0.12, 0.25, 0.5), vanishing, False),
        Damage("teleport", "frame heights", (0.05, 0.15, 0.3), teleport, False),
        Damage("time_reversal", "1: backwards", (1.0,), time_reversal, True),
        Damage("blur", "frame heights, deviation", (0.01, 0.02, 0.04), blur, True),
        Damage("colour_drift", "levels, rms, in the last frame", (10.0, 25.0, 60.0), colour_drift, True),
        Damage("freeze", "share of steps", (0.25, 0.5, 1.0), freeze, True),
    )
}


def _with(scene: Scene, number: int, thing: Thing) -> Scene:
    things = (*scene.things[:number], thing, *scene.things[number + 1 :])
    return dataclasses.replace(scene, things=things)


def _moved(thing: Thing, x: float, y: float) -> Thing:
    place = (thing.position[0] + float(x), thing.position[1] + float(y))
    return dataclasses.replace(thing, position=place, floor=thing.floor + float(y))


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _check(name: str, strength: float, *, most: float = math.inf) -> None:
    if not 0 <= strength <= most or math.isinf(strength):
        allowed = "at least 0" if most == math.inf else f"at least 0 and at most {most}"
        raise ValueError(f"{name} of strength {strength}: expected a number of {allowed}.")


def _bytes(video_THWC: np.ndarray) -> np.ndarray:
    video = np.asarray(video_THWC)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"video of shape {video.shape} and type {video.dtype}: expected (frames, height, width, 3) of bytes."
        )
    return video.astype(np.float32)


def _to_bytes(video: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)
