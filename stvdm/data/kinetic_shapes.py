# SPDX-License-Identifier: Apache-2.0
"""Kinetic shapes: a procedural world of captioned clips whose physics is known exactly.

A scene holds one to three coloured things. Each slides, bounces under gravity, grows, shrinks, or leaves the frame and
returns; one may pass behind a grey bar and come out; the camera is still or pans. Things of one clip differ in colour
and are placed so that they rarely touch (only the bar hides a thing for long): learning and tracking stay honest.
`kinetic_scene.py` has the laws of motion and the pixels; here scenes are drawn at random and put into words.

    scene = sample_scene(0, 7, split="train")            # pure: the same scene for the same (seed, index)
    video_THWC = render(scene, num_frames=17, height=64, width=64, fps=8)
    print(scene.caption, ground_truth(scene)["tracks"][:, 0])
"""

import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from stvdm.data.kinetic_scene import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Background,
    Combination,
    Motion,
    Scene,
    Thing,
    ground_truth,
    render,
)

__all__ = [
    "COLOURS",
    "MOTIONS",
    "SHAPES",
    "Background",
    "Combination",
    "Motion",
    "Scene",
    "Thing",
    "World",
    "canonical_caption",
    "ground_truth",
    "held_out",
    "render",
    "sample_scene",
]

Split = Literal["train", "validation", "test"]


@dataclasses.dataclass(frozen=True)
class World:
    """What may happen, and how often; lengths in frame heights, times in seconds.

    Raises ValueError that lists every bad field.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = ("ball", "square", "triangle")
    motions: tuple[str, ...] = tuple(MOTIONS)
    motion_weights: tuple[float, ...] = (3, 3, 2, 2, 1.5, 1.5, 1.5, 1.5, 3, 3, 2, 3, 3, 2, 2)  # one a motion
    num_things: tuple[float, ...] = (0.6, 0.3, 0.1)  # probability of one, two, three
    occluder: float = 0.1  # probability of a grey bar in front of one or two things
    pan: float = 0.1  # probability of a panning camera, where there is no bar
    backgrounds: tuple[str, ...] = ("plain", "gradient", "stripes", "checker")  # a pan: the last two
    radius: tuple[float, float] = (0.11, 0.16)
    growth: float = 2.0  # last radius / first radius of a growing thing
    speed: tuple[float, float] = (0.20, 0.30)  # along each axis that moves, per second
    return_speed: tuple[float, float] = (0.45, 0.55)
    pan_speed: tuple[float, float] = (0.11, 0.14)
    gravity: float = 3.0
    restitution: float = 0.85
    crowding: float = 0.9  # radii and speeds shrink by this for each further thing
    duration: float = 2.0  # the plan keeps things in the frame for so long: 17 frames at 8 per second
    aspect: float = 1.0  # width / height of the frame that the plan keeps things in
    size_words: float = 0.2  # probability that a clearly small or large thing is called so
    held_out: float = 0.1  # part of all (colour, shape, motion) that only the test split shows
    held_out_salt: int = 14  # this one spares "a red ball bounces to the right" and spreads evenly over the rest

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # lists come from JSON and config files; a World must be hashable
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        problems = [
            f"{name}={got}: expected some of {tuple(known)}, each once"
            for name, got, known in (
                ("colours", self.colours, COLOURS),
                ("shapes", self.shapes, SHAPES),
                ("motions", self.motions, MOTIONS),
                ("backgrounds", self.backgrounds, ("plain", "gradient", "stripes", "checker")),
            )
            if not got or len(set(got)) != len(got) or not set(got) <= set(known)
        ]
        if len(self.motion_weights) != len(self.motions) or min(self.motion_weights, default=0) <= 0:
            problems.append(
                f"motion_weights={self.motion_weights}: expected one positive weight for each of {self.motions}"
            )
        if not 1 <= len(self.num_things) <= 3 or abs(sum(self.num_things) - 1) > 1e-6 or min(self.num_things) < 0:
            problems.append(
                f"num_things={self.num_things}: expected probabilities of one, two and three things, which add up to 1"
            )
        if len(self.num_things) > len(self.colours):
            problems.append(
                f"num_things={self.num_things}: things of a clip differ in colour; colours={self.colours} is too few"
            )
        problems += [
            f"{name}={getattr(self, name)}: expected a probability, 0 to 1"
            for name in ("occluder", "pan", "size_words", "held_out")
            if not 0 <= getattr(self, name) <= 1
        ]
        problems += [
            f"{name}={getattr(self, name)}: expected (lowest, highest), positive"
            for name in ("radius", "speed", "return_speed", "pan_speed")
            if len(getattr(self, name)) != 2 or not 0 < getattr(self, name)[0] <= getattr(self, name)[1]
        ]
        if problems:
            raise ValueError("World: " + "; ".join(problems))

    @classmethod
    def of(cls, pairs: Any) -> "World":
        """Of (field, value) pairs, or a dict; raises ValueError also for an unknown field, and for what is no pairs."""
        known = [field.name for field in dataclasses.fields(cls)]
        try:
            given = dict(pairs)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{pairs!r}: expected pairs, as (("pan", 0.0), ("gravity", 2.0))') from error
        for name in given.keys() - set(known):
            near = difflib.get_close_matches(str(name), known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}."
            raise ValueError(f"World: there is no field {name!r}; {hint}")
        try:
            return cls(**given)
        except TypeError as error:  # e.g. a word for a number
            raise ValueError(f"World of {given}: {error}") from error


def held_out(combination: Combination, world: World = World()) -> bool:
    """Is this (colour, shape, motion) shown by the test split alone? A stable hash, the same for every seed."""
    digest = hashlib.sha256("/".join((str(world.held_out_salt), *combination)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < world.held_out * 2**64


def sample_scene(seed: int, index: int, *, split: Split = "train", world: World = World()) -> Scene:
    """Scene `index` of a split: pure, so any clip can be made alone, in any order, by any process.

    In "train" and "validation" no thing is a held-out combination; in "test" every thing is one where the scene allows
    it, and at least one always. Raises ValueError for an unknown split, a seed below 0, and where the world leaves a
    split nothing.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split={split!r}: expected 'train', 'validation' or 'test'.")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected a whole number of at least 0.")
    stream = ("train", "validation", "test").index(split)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, index))))
    count = 1 + int(rng.choice(len(world.num_things), p=world.num_things))
    has_bar = count < 3 and rng.random() < world.occluder
    pans = not has_bar and rng.random() < world.pan
    camera = (float(rng.choice((-1, 1)) * rng.uniform(*world.pan_speed)) if pans else 0.0, 0.0)
    combinations = _draw_combinations(rng, world, count, has_bar, pans, split == "test")
    has_bar = has_bar and all(
        MOTIONS[motion].kind == "slide" and MOTIONS[motion].y == 0 for _, _, motion in combinations
    )
    things, bar = _place(rng, world, combinations, camera[0], has_bar)
    background = _draw_background(rng, world, pans)
    return Scene(things, background, _caption(things, camera, bar, world, rng), camera, bar)


def canonical_caption(scene: Scene) -> str:
    """The plainest of a scene's captions, the same for every scene that it fits."""
    return _caption(scene.things, scene.camera, scene.bar, World(), rng=None)


# --- drawing a scene ---


@functools.lru_cache(maxsize=8)
def _combinations(world: World) -> tuple[tuple[tuple[Combination, bool], ...], ...]:
    """For each motion of the world, its combinations, each with whether it is held out."""
    return tuple(
        tuple(
            ((colour, shape, motion), held_out((colour, shape, motion), world))
            for colour in world.colours
            for shape in world.shapes
        )
        for motion in world.motions
    )


def _draw_combinations(
    rng: np.random.Generator, world: World, count: int, has_bar: bool, pans: bool, held: bool
) -> list[Combination]:
    """Colours all different. A bar wants things that pass it, a panning camera things that do not leave."""
    chosen: list[Combination] = []

    def options(held: bool, anything: bool = False) -> list[tuple[float, list[Combination]]]:
        used = {colour for colour, _, _ in chosen}
        found = []
        for motion, weight, group in zip(world.motions, world.motion_weights, _combinations(world), strict=True):
            kind, _, y = MOTIONS[motion]
            suits = (kind == "slide" and y == 0) if has_bar else (kind != "return" or not pans)
            free = [combination for combination, is_held in group if is_held == held and combination[0] not in used]
            if free and (suits or anything):
                found.append((weight, free))
        return found

    for n in range(count):
        found = options(held)
        if not found:  # the first thing decides what the clip is about; a further one may be of the other splits
            found = options(held, anything=True) if n == 0 else options(False)
        if not found and n == 0:
            raise ValueError(
                f"held_out={world.held_out}: leaves this split no (colour, shape, motion), so change held_out."
            )
        if not found:
            break  # so small a world has no further thing to show
        weights = np.asarray([weight for weight, _ in found])
        group = found[rng.choice(len(found), p=weights / weights.sum())][1]
        chosen.append(group[rng.integers(len(group))])
    return chosen


def _place(
    rng: np.random.Generator, world: World, combinations: list[Combination], camera: float, has_bar: bool
) -> tuple[tuple[Thing, ...], tuple[float, float] | None]:
    """Draw whole arrangements until nothing touches; after many tries keep the one that overlaps least."""
    seconds = np.linspace(0.0, world.duration, 17)
    best: tuple[float, tuple[Thing, ...], tuple[float, float] | None] = (-math.inf, (), None)
    for _ in range(8):
        bar_at = float(rng.uniform(-0.04, 0.04)) if has_bar else None
        things: list[Thing] = []
        taken: list[np.ndarray] = []
        worst = math.inf
        for combination in combinations:
            proposals = []
            for _ in range(12):
                thing = _propose(rng, world, combination, len(combinations), camera, bar_at)
                discs = np.column_stack([thing.path(seconds), thing.radii(seconds)])
                gap = min((_gap(discs, other) for other in taken), default=math.inf)
                proposals.append((gap, thing, discs))
                if gap > 0.02:
                    break
            gap, thing, discs = max(proposals, key=lambda proposal: proposal[0])
            things.append(thing)
            taken.append(discs)
            worst = min(worst, gap)
            if worst <= best[0]:
                break
        if worst > best[0]:
            widest = max(SHAPES[thing.shape].side * thing.radius for thing in things)
            best = (worst, tuple(things), None if bar_at is None else (bar_at, 2.1 * widest + 0.02))
        if worst > 0.02:
            break
    return best[1], best[2]


def _gap(one: np.ndarray, other: np.ndarray) -> float:
    """The least distance over time between two discs (T, 3) of x, y, radius, taken slightly larger than they are."""
    x, y, radius = (one - other)[:, 0], (one - other)[:, 1], (one + other)[:, 2]
    return float((np.hypot(x, y) - 1.1 * radius).min())


def _propose(
    rng: np.random.Generator, world: World, combination: Combination, count: int, camera: float, bar_at: float | None
) -> Thing:
    """A thing that obeys its motion and stays in the frame (a return: leaves it) for the planned duration."""
    colour, shape, motion = combination
    kind, towards_x, towards_y = MOTIONS[motion]
    outline, edge, shrink = SHAPES[shape], world.aspect / 2, world.crowding ** (count - 1)
    radius, speed = rng.uniform(*world.radius) * shrink, rng.uniform(*world.speed) * shrink
    growth = 0.0
    largest = radius
    if kind in ("grow", "shrink"):
        largest, smallest = radius * math.sqrt(world.growth), radius / math.sqrt(world.growth)
        radius, sign = (smallest, 1) if kind == "grow" else (largest, -1)
        growth = sign * (largest - smallest) / world.duration
    if kind == "return":
        turn = rng.uniform(0.46, 0.52) * world.duration
        speed = rng.uniform(*world.return_speed)
        x = towards_x * (edge + outline.side * radius + 0.03 - speed * turn)
        y = _between(rng, -0.5 + outline.top * radius, 0.5 - outline.bottom * radius)
        return Thing(colour, shape, motion, radius, (x, y), (towards_x * speed, 0.0), turn=turn)
    if bar_at is not None:  # start clear of the bar on one side, end clear of it on the other
        radius = largest = min(radius, world.radius[0] * 0.35 + world.radius[1] * 0.65, 0.13) * 0.95
        room = edge - outline.side * radius
        start = rng.uniform(0.95, 1.0) * room
        speed = (start + rng.uniform(0.95, 1.0) * room) / world.duration
        x = -towards_x * start
    else:
        room = 2 * (edge - outline.side * largest) - abs(camera) * world.duration  # a pan leaves less of it
        speed = min(speed, max(room / world.duration, 0.15))
        travel = (towards_x * speed - camera) * world.duration  # as the frame sees it
        side = edge - outline.side * largest
        x = _between(rng, -side + max(0.0, -travel), side - max(0.0, travel))
    velocity = (towards_x * speed, towards_y * speed)
    if kind == "bounce":
        y = rng.uniform(-0.49, -0.37) + outline.top * radius
        law = {"gravity": world.gravity, "restitution": world.restitution, "floor": rng.uniform(0.45, 0.49)}
        return Thing(colour, shape, motion, radius, (x, y), (velocity[0], 0.0), **law)
    travel = velocity[1] * world.duration
    top, bottom = -0.5 + outline.top * largest, 0.5 - outline.bottom * largest
    y = _between(rng, top + max(0.0, -travel), bottom - max(0.0, travel))
    return Thing(colour, shape, motion, radius, (x, y), velocity, growth=growth)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform where there is room, the middle where there is none."""
    return float(rng.uniform(low, high)) if low < high else (low + high) / 2


def _draw_background(rng: np.random.Generator, world: World, pans: bool) -> Background:
    kinds = [kind for kind in world.backgrounds if not pans or kind in ("stripes", "checker")]
    kind = str(rng.choice(kinds or ["stripes"]))
    lightness = rng.uniform(28, 90) if rng.random() < 0.6 else rng.uniform(185, 225)
    contrast = rng.choice((-1, 1)) * rng.uniform(*((28, 40) if pans else (16, 32)))
    first = lightness + rng.uniform(-6, 6, 3)  # muted: a few levels of tint
    second = first + contrast + rng.uniform(-4, 4, 3)
    angle = rng.uniform(-math.pi / 2, math.pi / 2) * (not pans)  # a pan runs across the pattern, or nobody would see it
    colours = (tuple(first.clip(8, 247).tolist()), tuple(second.clip(8, 247).tolist()))
    return Background(kind, colours, float(angle), float(rng.uniform(0.3, 0.5)), float(rng.uniform(0, 1)))


# --- words ---

_SLIDES = ("moves", "slides", "moves")
_NUMBERS = ("one thing", "two things", "three things")
_TO_THE = {side: (f"to the {side}", f"to the {side}", side, f"towards the {side}") for side in ("left", "right")}
_VERTICAL = {"up": ("up", "upwards"), "down": ("down", "downwards")}
_OTHER = {
    "bounce_in_place": ("bounces up and down", "bounces in place", "bounces on the spot"),
    "grow": ("grows", "gets larger", "grows larger"),
    "shrink": ("shrinks", "gets smaller"),
}


def _caption(
    things: Sequence[Thing],
    camera: tuple[float, float],
    bar: tuple[float, float] | None,
    world: World,
    rng: np.random.Generator | None,
) -> str:
    """In words: what, how many, where to. With no generator the first of every choice: the canonical caption."""

    def pick(options: Sequence[str]) -> str:
        return options[0] if rng is None else options[int(rng.integers(len(options)))]

    def noun(thing: Thing) -> str:
        words = [
            "a" if rng is None or len(things) > 1 or rng.random() < 0.9 else "one",
            thing.colour,
            pick(SHAPES[thing.shape].nouns),
        ]
        low, high = (bound * world.crowding ** (len(things) - 1) for bound in world.radius)
        third = (high - low) / 3
        fits = thing.growth == 0.0 and (thing.radius < low + third or thing.radius > high - third) and high > low
        if fits and rng is not None and rng.random() < world.size_words:
            words.insert(1, "small" if thing.radius < low + third else "large")
        return " ".join(words)

    def verb(motion: str) -> str:
        kind, x, y = MOTIONS[motion]
        side = "left" if x < 0 else "right"
        if bar is not None:
            behind = pick((f"moves {pick(_TO_THE[side])} behind a grey bar", f"passes behind a grey bar to the {side}"))
            return f"{behind} and comes out again"
        if kind == "slide" and y == 0:
            return f"{pick(_SLIDES)} {pick(_TO_THE[side])}"
        if kind == "slide":
            upright = "up" if y < 0 else "down"
            if x == 0:
                return f"{pick(_SLIDES)} {pick(_VERTICAL[upright])}"
            return f"{pick(_SLIDES)} " + pick(
                (
                    f"diagonally {upright} and to the {side}",
                    f"{upright} and to the {side}",
                    f"diagonally {upright} {side}",
                )
            )
        if kind == "bounce" and x != 0:
            return f"bounces {pick(_TO_THE[side])}"
        if kind == "return":
            leaves = pick(
                (f"leaves to the {side}", f"leaves the frame on the {side}", f"moves out of view to the {side}")
            )
            return f"{leaves} and {pick(('comes back', 'returns'))}"
        return pick(_OTHER[motion])

    clauses = [f"{noun(thing)} {verb(thing.motion)}" for thing in things]
    text = clauses[0]
    if len(clauses) > 1:
        *first, last = clauses
        text = ", ".join(first) + " and " + last
        if rng is not None and rng.random() < 0.4:
            text = f"{_NUMBERS[len(clauses) - 1]}: {text}"
        elif len(clauses) == 2 and pick(("and", "while")) == "while":
            text = f"{clauses[0]} while {clauses[1]}"
    if camera[0]:
        pans = f"the camera pans {pick(('left', 'to the left') if camera[0] < 0 else ('right', 'to the right'))}"
        text = pick((f"{text}, {pans}", f"{text} as {pans}"))
    return text
