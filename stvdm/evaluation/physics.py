# SPDX-License-Identifier: Apache-2.0
"""Track what was generated, and compare it with what the prompt and physics say.

`score` gives for one clip, against the scene whose caption was the prompt (1 right, 0 wrong, nan where the prompt does
not ask; a clip with several things is right when all of them are):

    colour       every named colour is there                 count        as many things as named, no more
    shape        each is the shape named                     motion       its kind: slide, bounce, grow, shrink, return
    direction    it goes where it was sent (of 8)            camera       the background pans as asked, or stands still
    persistence  the same thing in every frame in which nothing hides it
    occlusion    seen, hidden by a grey bar, and seen again beyond it
    smoothness   no second difference of the path beyond what gravity and the floor can cause
    all_right    all of the above
    colour_constancy   1 - (deviation of the thing's mean colour over time) / 64 levels
    residual     rms distance from the best fit of the prompted law, in frame heights (0 is best)
    flicker      mean second difference over time of the thing's radius, relative to it (0 is best)

The last three cannot see a thing that is lost: it has none of them, and drops out of their means. So a model that draws
only what is easy to follow may do well in them; look at shape and persistence, of which a lost thing has neither.

A measurement is worth what its instrument is: an item on which real clips score below 0.95 is not reported
(`evaluation.run` scores them beside every model, `validate_tracker` alone). From `scene` come the words alone (what,
how many, where to), never its positions: a prompt leaves those free. Under a panning camera, motion is told relative to
the ground, by the camera's speed in the pixels.

    scores = [score(video_THWC, scene, fps=8) for video_THWC, scene in clips]
    for item, row in summarise(scores).items(): print(item, row.mean, row.low, row.high, row.num)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from stvdm.data.kinetic_scene import BAR_GREY, MOTIONS, Scene, Thing, bounce_height, render
from stvdm.data.kinetic_shapes import Split, World, sample_scene
from stvdm.evaluation.tracking import Track, camera_speed, levels, shape_of, track

PROMPT = ("colour", "count", "shape", "motion", "direction", "camera")
RIGHT_OR_WRONG = (*PROMPT, "persistence", "occlusion", "smoothness")
ITEMS = (*RIGHT_OR_WRONG, "all_right", "colour_constancy", "residual", "flicker")
DEFAULT_WORLD = World()
CEILING = 0.95  # an item that real clips do not reach is not reported

_TOLERANCE = 0.05  # frame heights: a jump that a person would notice, 3 pixels of 64
_MIN_TRAVEL = 0.1  # frame heights: less than this in a whole clip is standing still
_SIZE_STEP = 1.3  # radius at the end over radius at the start of something that grows (the world's is 2)


class Row(NamedTuple):
    """A mean with its 95 % interval over `num` clips; ends that are not known are nan."""

    mean: float
    low: float
    high: float
    num: int

    def cell(self) -> dict[str, float | None]:
        """As a result keeps it, with None for an end that is not known."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}


def score(video_THWC: np.ndarray, scene: Scene, *, fps: float = 8.0, world: World = DEFAULT_WORLD) -> dict[str, float]:
    """Each of ITEMS for one clip made for `scene.caption`; `world` says its gravity and what speed a floor leaves."""
    rgb = levels(video_THWC)
    seconds = np.arange(len(rgb)) / fps
    tracks = track(video_THWC)
    camera = camera_speed(rgb, fps)
    pans = scene.camera[0] != 0
    if pans:  # what a thing does is told relative to the ground
        drift = np.stack([camera * seconds, np.zeros_like(seconds)], -1)
        tracks = [dataclasses.replace(found, centre=found.centre + drift) for found in tracks]
    pairs = _match(tracks, scene.things, seconds, world)

    result = dict.fromkeys(ITEMS, math.nan)
    colours = [found.colour for found in tracks]
    result["colour"] = float(all(thing.colour in colours for thing in scene.things))
    result["count"] = float(len(tracks) == len(scene.things))
    result["camera"] = float(camera * np.sign(scene.camera[0]) > 0.04 if pans else abs(camera) < 0.04)
    verdicts = [_judge(thing, found, tracks, scene, rgb, seconds, world) for thing, found in pairs]
    for item in ITEMS:
        values = [verdict[item] for verdict in verdicts if item in verdict]
        if values:
            result[item] = min(values) if item in RIGHT_OR_WRONG else float(np.mean(values))
    result["all_right"] = min(result[item] for item in RIGHT_OR_WRONG if not math.isnan(result[item]))
    return result


def summarise(scores: Sequence[Mapping[str, float]]) -> dict[str, Row]:
    """Mean and 95 % interval of each item over the clips it applies to: Wilson's for right or wrong, else Student's."""
    items = dict.fromkeys(item for one in scores for item in one)
    return {item: row([one[item] for one in scores if item in one]) for item in items}


def row(scores: Sequence[float] | np.ndarray) -> Row:
    """One row of `summarise`, of the scores of clips; where one is NaN the item does not apply."""
    values = np.asarray(scores, np.float64)
    values = values[~np.isnan(values)]
    if len(values) and np.isin(values, (0.0, 1.0)).all():
        mean = float(values.mean())
        return Row(mean, *_wilson(mean, len(values)), len(values))
    return students(values)


def students(values: np.ndarray) -> Row:
    """Mean of values (n,) with Student's 95 % interval, which takes two of them."""
    mean, num = float(values.mean()) if len(values) else math.nan, len(values)
    half = special.stdtrit(num - 1, 0.975) * values.std(ddof=1) / math.sqrt(num) if num > 1 else math.nan
    return Row(mean, float(mean - half), float(mean + half), num)


def told(cell: Mapping[str, Any]) -> str:
    """A cell in words: 0.900 [0.850, 0.950]; the mean alone where one clip gives no interval."""
    ends = "" if cell["low"] is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell['mean']:.3f}{ends}"


def validate_tracker(
    num_clips: int = 300,
    *,
    seed: int = 0,
    world: World = DEFAULT_WORLD,
    split: Split = "validation",
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    fps: float = 8.0,
    damage: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[dict[str, Row], tuple[str, ...]]:
    """The scores of real clips, and which items they are too low on to be reported.

    `damage` may change each clip before it is scored, as an autoencoder would. Returns (rows of `summarise`, items not
    to be reported): those of `RIGHT_OR_WRONG` and "colour_constancy" whose mean is below CEILING.
    """
    scores = []
    for index in range(num_clips):
        scene = sample_scene(seed, index, split=split, world=world)
        video_THWC = render(scene, num_frames, height, width, fps)
        scores.append(score(video_THWC if damage is None else damage(video_THWC), scene, fps=fps, world=world))
    rows = summarise(scores)
    judged = (*RIGHT_OR_WRONG, "colour_constancy")
    return rows, tuple(item for item in judged if item in rows and rows[item].mean < CEILING)


def _match(
    tracks: Sequence[Track], things: Sequence[Thing], seconds: np.ndarray, world: World
) -> list[tuple[Thing, Track | None]]:
    """The track that each thing is taken to be: colour counts most, then shape, then motion, so one fault stays one."""
    if not tracks:
        return [(thing, None) for thing in things]
    looks = [(found.colour, found.shape, _kind(found, seconds, world)) for found in tracks]
    words = [(thing.colour, thing.shape, MOTIONS[thing.motion].kind) for thing in things]
    cost = [[np.dot((4, 2, 1), np.not_equal(look, word)) for look in looks] for word in words]
    chosen = dict(zip(*optimize.linear_sum_assignment(cost), strict=True))
    return [(thing, tracks[chosen[n]] if n in chosen else None) for n, thing in enumerate(things)]


def _judge(
    thing: Thing,
    found: Track | None,
    tracks: Sequence[Track],
    scene: Scene,
    rgb: np.ndarray,
    seconds: np.ndarray,
    world: World,
) -> dict[str, float]:
    """What one thing of the prompt came to."""
    kind, x, y = MOTIONS[thing.motion]
    directed = kind in ("slide", "bounce", "return")
    if found is None:
        wrong = dict.fromkeys(("shape", "motion", "persistence", "smoothness"), 0.0)
        wrong |= {"direction": 0.0} if directed else {}
        return wrong | ({"occlusion": 0.0} if scene.bar is not None else {})
    verdict = {
        "shape": float(found.shape == thing.shape),
        "motion": float(_kind(found, seconds, world) == kind),
        "persistence": float(_persists(found, tracks, kind, scene.bar is not None)),
        "smoothness": float(_is_smooth(found, kind, seconds, world)),
        "residual": _residual(found, kind, seconds, world),
    }
    if directed:
        verdict["direction"] = float(_goes(found, kind, x, y, seconds))
    if scene.bar is not None:
        verdict["occlusion"] = float(_passes_behind(found, x, rgb))
    whole = found.whole()
    colours = found.rgb[whole]
    deviation = math.sqrt(float(((colours - colours.mean(0)) ** 2).mean()))
    verdict["colour_constancy"] = max(0.0, 1 - deviation / 64)
    triples = whole[:-2] & whole[1:-1] & whole[2:]
    if triples.any():
        verdict["flicker"] = float(np.abs(np.diff(found.radius, 2))[triples].mean() / found.radius[whole].mean())
    return verdict


def _kind(found: Track, seconds: np.ndarray, world: World) -> str:
    """The motion that the path shows: slide, bounce, grow, shrink, return, still, or other."""
    if _return_side(found):
        return "return"
    ratio = found.size_ratio()
    if ratio > _SIZE_STEP or ratio < 1 / _SIZE_STEP:
        return "grow" if ratio > 1 else "shrink"
    whole = found.whole()
    path, times = found.centre[whole], seconds[whole]
    velocity, line = _line(path, times)
    bent = math.sqrt(float(((path - line) ** 2).sum(1).mean()))
    y = path[:, 1]
    fallen, risen = y - np.minimum.accumulate(y), y - np.minimum.accumulate(y[::-1])[::-1]
    if np.minimum(fallen, risen).max() > 0.08:  # it goes down and comes up again
        return "bounce" if _residual(found, "bounce", seconds, world) < min(0.1, bent) else "other"
    if bent > 0.05:
        return "other"
    return "slide" if np.abs(velocity).max() * seconds[-1] > _MIN_TRAVEL else "still"


def _return_side(found: Track) -> int:
    """-1 or 1 if it went out of the frame on the left or right and came back, else 0."""
    seen, x = np.flatnonzero(found.seen), found.centre[:, 0]
    gone = np.flatnonzero(~found.seen | (found.at_border & (found.radius < 0.75 * found.radius.max())))
    gone = gone[(gone > seen[0]) & (gone < seen[-1])]
    if len(gone) == 0:
        return 0
    before, after = gone[0] - 1, gone[-1] + 1
    side = np.sign(x[before])
    outwards, inwards = side * (x[before] - x[seen[0]]), side * (x[after] - x[seen[-1]])
    by_the_edge = found.at_border[before : after + 1].any()
    return int(side) if by_the_edge and side == np.sign(x[after]) and min(outwards, inwards) > 0.05 else 0


def _goes(found: Track, kind: str, x: int, y: int, seconds: np.ndarray) -> bool:
    """Does it go where (x, y) says: within an eighth of a turn's half for a slide, by its side for the rest?"""
    if kind == "return":
        return _return_side(found) == x
    whole = found.whole()
    velocity, _ = _line(found.centre[whole], seconds[whole])
    travel = velocity * seconds[-1]
    if kind == "bounce":
        return abs(travel[0]) < 0.15 if x == 0 else travel[0] * x > _MIN_TRAVEL
    angle = math.atan2(travel[1], travel[0]) - math.atan2(y, x)
    return float(np.hypot(*travel)) > _MIN_TRAVEL and math.cos(angle) > math.cos(math.pi / 8)


def _persists(found: Track, tracks: Sequence[Track], kind: str, has_bar: bool) -> bool:
    """Is it the same thing in each frame in which neither the bar, the frame's edge nor another thing can hide it?"""
    t = np.arange(len(found.seen))
    seen = np.flatnonzero(found.seen)
    if seen[0] > 1 or seen[-1] < len(t) - 2:
        return False
    centre = np.stack([np.interp(t, seen, found.centre[seen, n]) for n in range(2)], -1)
    excused = np.zeros(len(t), bool)
    typical = float(np.median(found.radius[found.whole()]))
    for other in tracks:
        if other is not found and other.seen.any():
            apart = np.linalg.norm(other.centre - centre, axis=1)
            excused |= np.where(other.seen, apart, np.inf) < 1.5 * (typical + other.radius)
    gaps = np.flatnonzero(np.diff(seen) > 1)
    for gap in gaps:
        first, last = seen[gap], seen[gap + 1]
        lost = np.arange(first + 1, last)
        if has_bar or (kind == "return" and found.at_border[[first, last]].any()):
            excused[lost] = True
    if (~found.seen & ~excused).any() or len(gaps) > 1 + has_bar:
        return False
    if kind not in ("grow", "shrink") and not has_bar:  # smaller for no reason
        smaller = found.seen & (found.radius < 0.75 * typical) & ~found.at_border & ~excused
        if smaller.sum() > 1:
            return False
    whole = np.flatnonzero(found.whole() & ~excused)
    halves = [part for part in (whole[whole < len(t) // 2], whole[whole >= len(t) // 2]) if len(part)]
    if found.shape and any(shape_of(found.likeness[part]) != found.shape for part in halves if len(part) > 2):
        return False
    step = np.abs(np.diff(np.log(found.radius[whole])))
    allowed = 0.25 + (0.1 * np.diff(whole) if kind in ("grow", "shrink") else 0.0)
    return bool((step < allowed).all())


def _passes_behind(found: Track, x: int, rgb: np.ndarray) -> bool:
    """Whole, then hidden by something grey, then whole again further on."""
    whole = np.flatnonzero(found.whole())
    hidden = np.flatnonzero(found.radius < 0.7 * np.median(found.radius[whole]))  # half its area
    hidden = hidden[(hidden > whole[0]) & (hidden < whole[-1])]
    if len(hidden) == 0:
        return False
    first, last = whole[whole < hidden[0]][-1], whole[whole > hidden[-1]][0]
    (x0, y0), (x1, y1) = found.centre[first], found.centre[last]
    if (x1 - x0) * x < _MIN_TRAVEL:
        return False
    height, width = rgb.shape[1:3]
    row = int(np.clip((y0 + y1) / 2 * height + height / 2, 1, height - 2))
    column = int(np.clip((x0 + x1) / 2 * height + width / 2, 1, width - 2))
    behind = rgb[hidden[len(hidden) // 2], row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3).mean(0)
    return bool(abs(behind.mean() - BAR_GREY) < 35 and np.ptp(behind) < 40)


def _is_smooth(found: Track, kind: str, seconds: np.ndarray, world: World) -> bool:
    """No second difference of the path, between whole views, that the prompted motion has no force for."""
    whole = found.whole()
    triples = whole[:-2] & whole[1:-1] & whole[2:]
    if not triples.any():
        return False
    bend = np.diff(found.centre, 2, axis=0)[triples]
    step = seconds[1] - seconds[0]
    fall = world.gravity * step**2 if kind == "bounce" else 0.0
    kick = 2 * math.sqrt(2 * world.gravity * float(np.ptp(found.centre[whole, 1]))) * step if kind == "bounce" else 0.0
    sideways, downwards = bend[:, 0], bend[:, 1]
    fits = (np.abs(sideways) < _TOLERANCE) & (downwards < fall + _TOLERANCE) & (downwards > -kick - _TOLERANCE)
    return bool(fits.all() and _gap_is_smooth(found, whole, kind))


def _gap_is_smooth(found: Track, whole: np.ndarray, kind: str) -> bool:
    """After being hidden a sliding thing is where it should be by then."""
    if kind != "slide":
        return True
    t = np.flatnonzero(whole)
    x = found.centre[t, 0]
    for n in np.flatnonzero(np.diff(t) > 1):
        if n >= 1 and abs(x[n] + (t[n + 1] - t[n]) * (x[n] - x[0]) / (t[n] - t[0]) - x[n + 1]) > 0.15:
            return False
    return True


def _residual(found: Track, kind: str, seconds: np.ndarray, world: World) -> float:
    """Root mean square distance from the best fit of a law, in frame heights."""
    whole = found.whole()
    path, times = found.centre[whole], seconds[whole]
    if kind in ("grow", "shrink"):
        still = path - path.mean(0)
        radius = found.radius[whole]
        off = radius - np.polyval(np.polyfit(times, radius, 1), times) if len(times) > 1 else radius * 0
        return math.sqrt(float((still**2).sum(1).mean() + (off**2).mean()))
    if kind == "return":  # out and back at one speed: |t - turn| straightens the path
        best = math.inf
        for turn in np.linspace(0.3, 0.7, 41) * seconds[-1]:
            _, line = _line(path, np.abs(times - turn))
            best = min(best, math.sqrt(float(((path - line) ** 2).sum(1).mean())))
        return best
    _, line = _line(path, times)
    if kind == "slide":
        return math.sqrt(float(((path - line) ** 2).sum(1).mean()))
    sideways = float(((path[:, 0] - line[:, 0]) ** 2).mean())
    return math.sqrt(sideways + _bounce_error(path[:, 1], times, world))


def _bounce_error(y: np.ndarray, times: np.ndarray, world: World) -> float:
    """Mean square distance of heights from the best bounce with the world's gravity and restitution.

    Where the fall starts, how fast, and where the floor is are unknown: a grid of them, narrowed three times.
    """
    middle = np.asarray([y[0], 0.0, float(y.max()) + 0.02])
    width = np.asarray([0.06, 0.6, 0.08])
    best = math.inf
    for _ in range(4):
        axes = [middle[n] + width[n] * np.linspace(-1, 1, 7) for n in range(3)]
        start, speed, rest = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
        rest = np.maximum(rest, start + 1e-3)
        heights = bounce_height(times, start, speed, rest, gravity=world.gravity, restitution=world.restitution)
        error = ((heights - y) ** 2).mean(-1)
        least = int(error.argmin())
        best = min(best, float(error[least]))
        middle, width = np.asarray([start[least], speed[least], rest[least]]), width / 2.5
    return best


def _line(path: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The straight line at constant speed through a path (n, 2): its velocity (2,), and its points (n, 2)."""
    centred = times - times.mean()
    velocity = (centred[:, None] * (path - path.mean(0))).sum(0) / max(float((centred**2).sum()), 1e-9)
    return velocity, path.mean(0) + centred[:, None] * velocity


def _wilson(mean: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion: sound where it is near 0 or 1."""
    middle = (mean + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(mean * (1 - mean) / num + z * z / (4 * num * num))
    return max(0.0, middle - half), min(1.0, middle + half)
