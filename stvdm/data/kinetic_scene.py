# SPDX-License-Identifier: Apache-2.0
"""A scene of moving shapes: its physics, its pixels, and the truth about both.

Everything is said in units that no resolution changes: lengths in frame heights (x to the right, y downwards, the
origin in the middle of the frame at time 0), time in seconds. A bouncing thing touches the floor with its lowest point.

    slide, return   x(t) = x0 + v t                     (mirrored in time at `turn`, outside the frame, for a return)
    bounce          x(t) = x0 + v t,  y'' = g,  y' -> -e y' at each contact with the floor
    grow, shrink    r(t) = r0 + growth t

So a clip of any size, length or rate is one call of `render`, and `ground_truth` says where everything is.

    thing = Thing("red", "ball", "right", radius=0.15, position=(-0.3, 0.0), velocity=(0.3, 0.0))
    scene = Scene((thing,), Background("plain", ((90, 90, 90), (90, 90, 90))), "a red ball moves to the right")
    video_THWC = render(scene, num_frames=17, height=64, width=64, fps=8)
"""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Combination = tuple[str, str, str]  # colour, shape, motion

# Hues 60 degrees apart: neither blur nor chroma compression turns one into another, as yellow and orange would.
COLOURS = {
    "red": (224, 40, 40),
    "yellow": (232, 216, 40),
    "green": (40, 190, 60),
    "cyan": (48, 208, 216),
    "blue": (52, 72, 232),
    "magenta": (220, 56, 208),
}
BAR_GREY = 150


class Outline(NamedTuple):
    """How far a shape of radius 1 reaches from its centre, and the words that name it."""

    side: float
    top: float
    bottom: float
    nouns: tuple[str, ...]


SHAPES = {
    "ball": Outline(1.0, 1.0, 1.0, ("ball", "ball", "circle")),
    "square": Outline(0.9, 0.9, 0.9, ("square",)),
    "triangle": Outline(1.0825, 1.25, 0.625, ("triangle",)),
    "diamond": Outline(1.2, 1.2, 1.2, ("diamond",)),
}


class Motion(NamedTuple):
    """A named law: its kind, and where it leads (x, y in -1, 0, 1; y downwards)."""

    kind: str
    x: int
    y: int


MOTIONS = {
    "left": Motion("slide", -1, 0),
    "right": Motion("slide", 1, 0),
    "up": Motion("slide", 0, -1),
    "down": Motion("slide", 0, 1),
    "up_left": Motion("slide", -1, -1),
    "up_right": Motion("slide", 1, -1),
    "down_left": Motion("slide", -1, 1),
    "down_right": Motion("slide", 1, 1),
    "bounce_left": Motion("bounce", -1, 0),
    "bounce_right": Motion("bounce", 1, 0),
    "bounce_in_place": Motion("bounce", 0, 0),
    "grow": Motion("grow", 0, 0),
    "shrink": Motion("shrink", 0, 0),
    "return_left": Motion("return", -1, 0),
    "return_right": Motion("return", 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One coloured shape and its law of motion, in world coordinates (frame heights, seconds)."""

    colour: str
    shape: str
    motion: str
    radius: float
    position: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0  # of the radius, per second
    gravity: float = 0.0
    restitution: float = 1.0
    floor: float = 0.5  # y of the ground that a bouncing thing meets
    turn: float | None = None  # when a thing that left the frame turns back

    @property
    def combination(self) -> Combination:
        return self.colour, self.shape, self.motion

    def path(self, seconds: np.ndarray) -> np.ndarray:
        """Centre (T, 2) at `seconds` (T,)."""
        seconds = np.asarray(seconds, np.float64)
        if self.turn is not None:
            seconds = np.where(seconds > self.turn, 2 * self.turn - seconds, seconds)
        xy = np.asarray(self.position) + seconds[:, None] * np.asarray(self.velocity)
        if self.gravity > 0:
            rest = self.floor - SHAPES[self.shape].bottom * self.radius
            law = {"gravity": self.gravity, "restitution": self.restitution}
            xy[:, 1] = bounce_height(seconds, self.position[1], self.velocity[1], rest, **law)
        return xy

    def radii(self, seconds: np.ndarray) -> np.ndarray:
        """Radius (T,) at `seconds` (T,)."""
        return np.maximum(self.radius + self.growth * np.asarray(seconds, np.float64), 0.01)


@dataclasses.dataclass(frozen=True)
class Background:
    """A muted backdrop between two colours (0 to 255); `angle` in radians, `period` and `phase` in frame heights."""

    kind: str
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float = 0.0
    period: float = 0.25
    phase: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a clip shows. `camera` is its velocity; `bar` the centre and width of the grey bar."""

    things: tuple[Thing, ...]
    background: Background
    caption: str
    camera: tuple[float, float] = (0.0, 0.0)
    bar: tuple[float, float] | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        fields = _tuples(json.loads(text))
        things = tuple(Thing(**thing) for thing in fields.pop("things"))
        return cls(things=things, background=Background(**fields.pop("background")), **fields)


def render(scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64, fps: float = 8.0) -> np.ndarray:
    """The clip, uint8 (T, H, W, 3), anti-aliased; frame k shows the scene at k / fps seconds."""
    seconds = np.arange(num_frames) / fps
    video_THWC = _render_background(scene, seconds, height, width)
    for thing in scene.things:
        colour = np.asarray(COLOURS[thing.colour], np.float32)
        for t, rows, columns, cover in _patches(scene, thing, seconds, height, width):
            patch = video_THWC[t, rows, columns]
            patch += cover[..., None] * (colour - patch)
    if scene.bar is not None:
        cover = _bar_cover(scene.bar, height, width)[:, None]
        video_THWC += cover * (BAR_GREY - video_THWC)
    return (video_THWC + 0.5).astype(np.uint8)


def ground_truth(
    scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64, fps: float = 8.0
) -> dict[str, np.ndarray]:
    """Where everything is, for the same arguments as `render`.

    Returns float32 arrays: "tracks" (things, T, 2), centres as (x, y) in pixels of the frame, the middle of the first
    pixel being (0, 0); "radius" (things, T) in pixels; "visibility" (things, T), the part of the thing's area inside
    the frame and not behind the bar or another thing; "camera" (T, 2), how far in pixels the camera has moved.
    """
    seconds = np.arange(num_frames) / fps
    tracks = np.stack([_pixels(scene, thing.path(seconds), seconds, height, width) for thing in scene.things])
    radius = np.stack([thing.radii(seconds) * height for thing in scene.things])
    clear_THW = np.ones((num_frames, height, width), np.float32)
    if scene.bar is not None:
        clear_THW *= 1 - _bar_cover(scene.bar, height, width)
    visibility = np.zeros(radius.shape)
    for n in reversed(range(len(scene.things))):  # later things are in front
        for t, rows, columns, cover in _patches(scene, scene.things[n], seconds, height, width):
            visibility[n, t] = (cover * clear_THW[t, rows, columns]).sum()
            clear_THW[t, rows, columns] *= 1 - cover
        visibility[n] /= AREA[scene.things[n].shape] * radius[n] ** 2
    camera = seconds[:, None] * np.asarray(scene.camera) * height
    arrays = {"tracks": tracks, "radius": radius, "visibility": np.clip(visibility, 0, 1), "camera": camera}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def bounce_height(
    seconds: np.ndarray, start: ArrayLike, speed: ArrayLike, rest: ArrayLike, *, gravity: float, restitution: float
) -> np.ndarray:
    """Heights (..., T), downwards, of things that fall and bounce: parabolas between contacts.

    At `seconds` (T,); `start`, `speed` and `rest` (...) are height and speed at time 0, and the height at contact,
    where `restitution` of the speed is kept. Once the bounces have died away a thing lies there.
    """
    rest, y0, v0 = (np.asarray(value, np.float64)[..., None] for value in (rest, start, speed))
    since = np.zeros_like(rest)
    heights = np.broadcast_to(rest, np.broadcast_shapes(rest.shape, y0.shape, seconds.shape))
    last = seconds.max(initial=0.0)
    for _ in range(64):
        flight = (np.sqrt(v0 * v0 + 2 * gravity * np.maximum(rest - y0, 0.0)) - v0) / gravity
        elapsed = seconds - since
        now = (elapsed >= 0) & (elapsed < flight)
        heights = np.where(now, y0 + v0 * elapsed + 0.5 * gravity * elapsed**2, heights)
        since, y0, v0 = since + flight, rest, -restitution * (v0 + gravity * flight)
        if (flight < 1e-3).all() or (since > last).all():
            break
    return heights


AREA = {  # of radius 1
    "ball": math.pi,
    "square": 4 * 0.9**2,
    "triangle": 0.75 * math.sqrt(3) * 1.25**2,
    "diamond": 2 * 1.2**2,
}


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; exact along the edges, which is where it is used."""
    if shape == "ball":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.9) * radius
    if shape == "triangle":
        return np.maximum(dy, np.float32(0.8660254) * np.abs(dx) - np.float32(0.5) * dy) - np.float32(0.625) * radius
    return (np.abs(dx) + np.abs(dy) - np.float32(1.2) * radius) * np.float32(0.70710678)


def _pixels(scene: Scene, xy: np.ndarray, seconds: np.ndarray, height: int, width: int) -> np.ndarray:
    """World coordinates (T, 2) to pixels of the frame, the middle of the first pixel being (0, 0)."""
    seen = xy - seconds[:, None] * np.asarray(scene.camera)
    return seen * height + (width / 2 - 0.5, height / 2 - 0.5)


def _patches(
    scene: Scene, thing: Thing, seconds: np.ndarray, height: int, width: int
) -> list[tuple[int, slice, slice, np.ndarray]]:
    """For each frame that shows the thing: frame, rows, columns, and how much of each pixel there it covers."""
    centre = _pixels(scene, thing.path(seconds), seconds, height, width).astype(np.float32)
    radius = (thing.radii(seconds) * height).astype(np.float32)
    outline = SHAPES[thing.shape]
    half = math.ceil(max(outline.side, outline.top) * float(radius.max())) + 1
    corner = np.floor(centre).astype(int) - half
    offsets = np.arange(2 * half + 2, dtype=np.float32)
    dx = (corner[:, :1] - centre[:, :1] + offsets)[:, None, :]
    dy = (corner[:, 1:] - centre[:, 1:] + offsets)[:, :, None]
    cover_TPP = np.clip(0.5 - signed_distance(thing.shape, dx, dy, radius[:, None, None]), 0, 1)
    patches = []
    for t, (left, top) in enumerate(corner.tolist()):
        x0, x1 = max(left, 0), min(left + len(offsets), width)
        y0, y1 = max(top, 0), min(top + len(offsets), height)
        if x0 < x1 and y0 < y1:
            patches.append((t, slice(y0, y1), slice(x0, x1), cover_TPP[t, y0 - top : y1 - top, x0 - left : x1 - left]))
    return patches


def _bar_cover(bar: tuple[float, float], height: int, width: int) -> np.ndarray:
    """How much of each column (W,) the bar covers."""
    x = np.arange(width, dtype=np.float32) - np.float32(width / 2 - 0.5 + bar[0] * height)
    return np.clip(0.5 + bar[1] * height / 2 - np.abs(x), 0, 1).astype(np.float32)


def _render_background(scene: Scene, seconds: np.ndarray, height: int, width: int) -> np.ndarray:
    """The clip without its things, float32 (T, H, W, 3)."""
    background = scene.background
    moments = seconds if scene.camera[0] else seconds[:1]
    x = ((np.arange(width) - (width / 2 - 0.5)) / height + moments[:, None] * scene.camera[0]).astype(np.float32)[
        :, None, :
    ]
    y = ((np.arange(height) - (height / 2 - 0.5)) / height).astype(np.float32)[None, :, None]
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along, across = cos * x + sin * y, cos * y - sin * x
    turn = np.float32(2 * math.pi / background.period)
    wave = np.sin(turn * (along + background.phase))
    mix = {  # how much of the second colour
        "plain": lambda: np.zeros_like(along),
        "gradient": lambda: np.clip(0.5 + along, 0, 1),
        "stripes": lambda: 0.5 + 0.5 * wave,
        "checker": lambda: 0.5 + 0.5 * wave * np.sin(turn * (across + background.phase)),
    }[background.kind]()
    first, second = (np.asarray(colour, np.float32) for colour in background.colours)
    frames = first + mix[..., None].astype(np.float32) * (second - first)
    return np.ascontiguousarray(
        frames if scene.camera[0] else np.broadcast_to(frames, (len(seconds), *frames.shape[1:]))
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
