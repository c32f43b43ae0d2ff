# SPDX-License-Identifier: Apache-2.0
"""Follow the coloured things of a clip: what they look like and where they are, from the pixels alone.

    pixels -> nearest palette colour or none -> connected components -> linked through time -> shape by overlap

Made for the world of `stvdm.data.kinetic_shapes`, where backgrounds are nearly grey: the direction of a pixel away from
grey names its colour, and half the palette's saturation is the edge, wherever blur and noise have moved the rest. Grey
things are not seen, and hues between those of the palette are nothing. The camera's speed comes from the background.

    for found in track(video_THWC):
        print(found.colour, found.shape, found.centre[0], found.radius[0])
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage, optimize

from stvdm.data.kinetic_scene import AREA, COLOURS, SHAPES, signed_distance


@dataclasses.dataclass(frozen=True)
class Track:
    """One thing followed through the clip. Lengths in frame heights, (0, 0) the middle of the frame, y downwards."""

    colour: str
    shape: str  # "" when it looks like none of them
    centre: np.ndarray  # (T, 2) as (x, y), nan where it is not seen
    radius: np.ndarray  # (T,) of a thing of that shape and as many pixels; 0 where it is not seen
    at_border: np.ndarray  # (T,) bool: cut by the frame
    rgb: np.ndarray  # (T, 3) mean colour, 0 to 255; nan where it is not seen
    likeness: np.ndarray  # (T, shapes) overlap with each of SHAPES, 0 to 1; nan where it is not seen

    @property
    def seen(self) -> np.ndarray:
        return self.radius > 0

    def whole(self) -> np.ndarray:
        """Frames (T,) that show all of it: no smaller than its size around then, as being cut or hidden makes it."""
        inside = self.seen & ~self.at_border
        start, slope = self._size(inside if inside.sum() >= 6 else self.seen)
        expected = start + slope * np.arange(len(inside))
        whole = self.seen & (self.radius > np.where(self.at_border, 0.95, 0.9) * expected)
        return whole if whole.sum() >= 4 else self.seen

    def _size(self, frames: np.ndarray) -> tuple[float, float]:
        """Radius at frame 0 and its change a frame, through the larger values: hiding only makes a thing smaller."""
        t, kept = np.arange(len(frames)), frames
        start, slope = 0.0, 0.0
        for _ in range(8):
            slope, start = np.polyfit(t[kept], self.radius[kept], 1) if kept.sum() > 1 else (0.0, self.radius.max())
            above = kept & (self.radius > 0.95 * (start + slope * t))
            if above.sum() < 4 or above.sum() == kept.sum():
                break
            kept = above
        return float(start), float(slope)

    def size_ratio(self) -> float:
        """Radius at the end over radius at the start."""
        start, slope = self._size(self.whole())
        return max(start + slope * (len(self.radius) - 1), 1e-3) / max(start, 1e-3)


def track(video_THWC: np.ndarray, *, min_frames: int = 3) -> list[Track]:
    """Everything coloured that is in the clip for at least `min_frames` frames, largest first.

    Args:
      video_THWC: uint8, or float in [-1, 1].

    Raises:
      ValueError: if it is not such a clip.
    """
    rgb = levels(video_THWC)
    height, width = rgb.shape[1:3]
    labels, near = _segment(rgb)
    tracks = []
    for index, colour in enumerate(COLOURS):
        pieces = _components(labels == index, height)
        for chain in _link(pieces, len(rgb), height):
            if len(chain) >= min_frames:
                tracks.append(_describe(colour, chain, rgb, near == index, height, width))
    return sorted(tracks, key=lambda found: -float(found.radius.sum()))


def camera_speed(rgb: np.ndarray, fps: float) -> float:
    """Horizontal speed of the camera, frame heights per second: the shift that makes the background stand still.

    Grey pixels are averaged over bands of rows and laid over each other for each candidate speed; the right one leaves
    the least variance over time. A background without a pattern says nothing: then 0. `rgb` is what `levels` returns.
    """
    num_frames, height, width, _ = rgb.shape
    red, green, blue = np.moveaxis(rgb, -1, 0)
    grey = (red + green + blue) / 3
    coloured = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue) > 45
    clear = ~ndimage.binary_dilation(coloured, np.ones((1, 5, 5), bool))
    num_bands = min(8, height)
    edges = np.linspace(0, height, num_bands + 1).astype(int)[:-1]
    weight = np.add.reduceat(clear.astype(np.float64), edges, axis=1)
    value = np.add.reduceat(grey * clear, edges, axis=1) / np.maximum(weight, 1)

    moments = np.stack([weight, weight * value, weight * value**2])  # (3, T, bands, W)

    def variance(speed: float) -> float:
        shift = np.arange(num_frames) / fps * speed * height
        shift -= shift.min()
        sums = np.zeros((3, num_bands, width + int(shift.max()) + 2))
        for t, (whole, part) in enumerate(zip(shift.astype(int), shift % 1, strict=True)):
            sums[..., whole : whole + width] += (1 - part) * moments[:, t]
            sums[..., whole + 1 : whole + 1 + width] += part * moments[:, t]
        total, first, second = sums
        return float((second - first**2 / np.maximum(total, 1e-9)).sum() / max(total.sum(), 1e-9))

    speeds = np.linspace(-0.24, 0.24, 25)
    costs = np.asarray([variance(speed) for speed in speeds])
    best = int(costs.argmin())
    if costs[len(speeds) // 2] < 1.25 * costs[best] + 1.0:
        return 0.0
    if 0 < best < len(speeds) - 1:  # the parabola through the three lowest
        below, least, above = costs[best - 1 : best + 2]
        bend = below - 2 * least + above
        return float(speeds[best] + 0.5 * (below - above) / max(bend, 1e-9) * (speeds[1] - speeds[0]))
    return float(speeds[best])


def shape_of(likeness: np.ndarray) -> str:
    """The shape that the clearer half of some views (n, shapes) is most like, or "" if it is like none."""
    clearest = likeness[np.argsort(-likeness.max(1))[: (len(likeness) + 1) // 2]].mean(0)
    return list(SHAPES)[int(clearest.argmax())] if clearest.max() > 0.75 else ""


def levels(video_THWC: np.ndarray) -> np.ndarray:
    """A clip, uint8 or float in [-1, 1], as float32 levels, 0 to 255."""
    video_THWC = np.asarray(video_THWC)
    if video_THWC.ndim != 4 or video_THWC.shape[-1] != 3:
        raise ValueError(
            f"video of shape {video_THWC.shape}: expected (frames, height, width, 3), so score clips one by one."
        )
    if video_THWC.dtype == np.uint8:
        return video_THWC.astype(np.float32)
    return np.clip((video_THWC.astype(np.float32) + 1) * 127.5, 0, 255)


class _Piece(NamedTuple):
    """A connected component in one frame, lengths in pixels."""

    t: int
    x: float
    y: float
    area: float
    box: tuple[slice, slice, slice]
    mask: np.ndarray  # (rows, columns) of the box


def _segment(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Palette index of each pixel (T, H, W), or -1; and the same for the saturated inside alone, for the colour."""
    palette = np.asarray(list(COLOURS.values()), np.float32)
    away = palette - palette.mean(1, keepdims=True)
    length = np.linalg.norm(away, axis=1)
    red, green, blue = np.moveaxis(rgb, -1, 0)  # numpy is slow along an axis of three
    grey = (red + green + blue) / 3
    saturation = np.stack([red - grey, green - grey, blue - grey])
    along = np.tensordot(away / length[:, None], saturation, 1)
    best, strength = along.argmax(0), along.max(0)
    aligned = strength**2 > 0.85**2 * (saturation**2).sum(0)  # nearer than half way to the next hue
    strength = strength / length[best]
    return np.where(aligned & (strength > 0.5), best, -1), np.where(aligned & (strength > 0.8), best, -1)


def _components(mask_THW: np.ndarray, height: int) -> list[_Piece]:
    """Connected components of each frame that are large enough, and thicker than the seam between two things."""
    if mask_THW.sum() < 0.004 * height**2:
        return []
    flat = np.zeros((3, 3, 3), bool)
    flat[1] = True  # eight neighbours within a frame, none across frames
    labelled, _ = ndimage.label(mask_THW, flat)
    pieces = []
    for number, box in enumerate(ndimage.find_objects(labelled), 1):
        mask = labelled[box][0] == number
        area = int(mask.sum())
        if area < 0.002 * height**2 or not _is_thick(mask):
            continue
        rows, columns = np.nonzero(mask)
        pieces.append(_Piece(box[0].start, columns.mean() + box[2].start, rows.mean() + box[1].start, area, box, mask))
    return pieces


def _is_thick(mask: np.ndarray) -> bool:
    """Does a 3 x 3 block fit in somewhere?"""
    rows = mask[2:] & mask[1:-1] & mask[:-2] if len(mask) > 2 else mask[:0]
    return bool((rows[:, 2:] & rows[:, 1:-1] & rows[:, :-2]).any()) if mask.shape[1] > 2 else False


def _link(pieces: Sequence[_Piece], num_frames: int, height: int) -> list[list[_Piece]]:
    """Pieces of one colour as chains through time.

    A chain waits for its thing however long it is gone and takes it back wherever it turns up: a jump is then seen as
    one (in smoothness), and a new chain means a further thing. Chains that never amount to much are fragments.
    """
    chains: list[list[_Piece]] = []
    for t in range(num_frames):
        now = [piece for piece in pieces if piece.t == t]
        if not now:
            continue
        cost = [[_unlikeness(chain, piece, height) for piece in now] for chain in chains]
        taken = dict(zip(*optimize.linear_sum_assignment(cost), strict=True)) if chains else {}
        for row, column in taken.items():
            chains[row].append(now[column])
        chains += [[piece] for column, piece in enumerate(now) if column not in taken.values()]
    areas = [max(piece.area for piece in chain) for chain in chains]
    enough = max(0.005 * height**2, 0.15 * max(areas, default=0))
    return [chain for chain, area in zip(chains, areas, strict=True) if area > enough]


def _unlikeness(chain: list[_Piece], piece: _Piece, height: int) -> float:
    """From where the chain's thing should be by now, in frame heights, and how unlike its size is."""
    last, x, y = chain[-1], chain[-1].x, chain[-1].y
    if len(chain) > 1 and piece.t - chain[-2].t == 2:
        x, y = 2 * x - chain[-2].x, 2 * y - chain[-2].y
    return math.hypot(piece.x - x, piece.y - y) / height + 0.1 * abs(math.log(piece.area / last.area))


def _describe(
    colour: str, chain: list[_Piece], rgb: np.ndarray, core_THW: np.ndarray, height: int, width: int
) -> Track:
    num_frames = len(rgb)
    centre, means = np.full((num_frames, 2), np.nan), np.full((num_frames, 3), np.nan)
    area, at_border = np.zeros(num_frames), np.zeros(num_frames, bool)
    likeness = np.full((num_frames, len(SHAPES)), np.nan)
    for piece in chain:
        centre[piece.t] = (piece.x - (width / 2 - 0.5)) / height, (piece.y - (height / 2 - 0.5)) / height
        _, rows, columns = piece.box
        at_border[piece.t] = rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width
        area[piece.t] = piece.area
        core = piece.mask & core_THW[piece.box][0]
        means[piece.t] = rgb[piece.box][0][core if core.sum() > 4 else piece.mask].mean(0)
        likeness[piece.t] = _overlap(piece)
    shape = shape_of(likeness[area > 0.6 * area.max()])  # smaller ones may be cut or hidden
    radius = np.sqrt(area / AREA[shape or "ball"]) / height
    return Track(colour, shape, centre, radius, at_border, means, likeness)


def _overlap(piece: _Piece) -> list[float]:
    """Intersection over union with each shape of the same centre and area."""
    rows, columns = piece.mask.shape
    pad = 1 + max(rows, columns) // 4
    mask = np.pad(piece.mask, pad)
    dx = (np.arange(columns + 2 * pad) - pad + piece.box[2].start - piece.x)[None, :]
    dy = (np.arange(rows + 2 * pad) - pad + piece.box[1].start - piece.y)[:, None]
    found = []
    for shape in SHAPES:
        template = signed_distance(shape, dx, dy, np.sqrt(piece.area / AREA[shape])) < 0
        found.append(float((mask & template).sum() / (mask | template).sum()))
    return found
