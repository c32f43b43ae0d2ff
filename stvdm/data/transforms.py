# SPDX-License-Identifier: Apache-2.0
"""Pixels and frames into the shape of a bucket. NumPy and Pillow only.

A clip is scaled until it just covers the target (aspect kept), then what hangs over is cut away:

    scale = max(height / H, width / W);  crop = (scale H, scale W) -> (height, width)

    video = resize_and_crop(video, 64, 96)          # uint8 (T, H, W, 3) -> (T, 64, 96, 3)
    video = choose_clip(video, 17, rng=rng)         # 17 frames in a row, from anywhere in the clip

There is no colour or geometric augmentation here, and the horizontal flip is something one must ask for: captions say
"left" and "right", and a flipped clip of "a ball rolls to the right" teaches the opposite of what it says.
"""

import numpy as np
from PIL import Image


def cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers the target."""
    scale = max(target_height / height, target_width / width)
    return max(target_height, round(height * scale)), max(target_width, round(width * scale))


def crop(video_THWC: np.ndarray, height: int, width: int, *, position: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Cut (height, width) out; `position` in [0, 1]^2: (0.5, 0.5) is the centre, (0, 0) the top left corner."""
    _, H, W, _ = video_THWC.shape
    if height > H or width > W:
        raise ValueError(
            f"crop={(height, width)}: larger than the video {(H, W)}, so resize it first (`resize_and_crop`)"
        )
    top, left = round(position[0] * (H - height)), round(position[1] * (W - width))
    return video_THWC[:, top : top + height, left : left + width]


def resize_and_crop(
    video_THWC: np.ndarray, height: int, width: int, *, position: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (T, height, width, 3), aspect kept; antialiased when it shrinks."""
    T, H, W, C = video_THWC.shape
    covering = cover_size(H, W, height, width)
    if covering != (H, W):
        resized = np.empty((T, *covering, C), np.uint8)
        for frame, out in zip(video_THWC, resized, strict=True):
            out[:] = np.asarray(Image.fromarray(frame).resize(covering[::-1], Image.Resampling.BICUBIC))
        video_THWC = resized
    return crop(video_THWC, height, width, position=position)


def choose_clip(video_THWC: np.ndarray, num_frames: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """`num_frames` consecutive frames, from a random place; from the beginning without `rng`. One frame is an image."""
    spare = len(video_THWC) - num_frames
    if spare < 0:
        raise ValueError(
            f"num_frames={num_frames}: the video has {len(video_THWC)}, so ask for fewer frames or leave this video out"
        )
    start = 0 if rng is None else int(rng.integers(spare + 1))
    return video_THWC[start : start + num_frames]


def flip(video_THWC: np.ndarray) -> np.ndarray:
    """Mirror left and right. Only for captions that name no side."""
    return video_THWC[:, :, ::-1]
