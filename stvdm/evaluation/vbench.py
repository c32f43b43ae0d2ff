# SPDX-License-Identifier: Apache-2.0
"""Five of VBench's dimensions, as VBench defines them, over features, flows and frames that the caller brings.

VBench (Huang et al. 2024, arXiv:2311.17982; definitions read from its published code, November 2026) takes features
of DINO ViT-B/16 for subjects and of CLIP ViT-B/32 for backgrounds, optical flow of RAFT and in-between frames of
AMT-S. With those networks a function here gives VBench's number of a clip; with others, a relative of it, which may be
compared with itself alone. A dimension's score is the mean over clips; VBench takes that of the two consistencies over
all pairs of frames of all clips, so that a long clip counts for more (subjects', where its processes are several, over
clips). Frames are bytes, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def subject_consistency(features_TE: np.ndarray) -> float:
    """How alike a clip's frames are to its first and to the one before: at most 1.

    Mean over frames t >= 1 of (max(0, cos(f_0, f_t)) + max(0, cos(f_{t-1}, f_t))) / 2, for DINO features f.

    Cannot see: that nothing moves, which scores best. A subject that changes as a whole but slowly.

    Raises:
      ValueError: for fewer than 2 frames.
    """
    features = np.asarray(features_TE, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}: expected (frames, features), at least 2 frames.")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    first = np.clip(unit[1:] @ unit[0], 0, None)
    before = np.clip((unit[1:] * unit[:-1]).sum(1), 0, None)
    return float((first + before).mean() / 2)


def background_consistency(features_TE: np.ndarray) -> float:
    """`subject_consistency` over CLIP image features, which look at the whole frame. Cannot see: the same."""
    return subject_consistency(features_TE)


def temporal_flickering(video_THWC: np.ndarray) -> float:
    """(255 - mean absolute difference of neighbouring frames) / 255: 1 for a clip that stands still.

    VBench takes it of prompts for static scenes only. Cannot see: why pixels change, so that motion counts as flicker;
    flicker slower than a frame.

    Raises:
      ValueError: for frames that are not bytes, or fewer than 2.
    """
    video = _bytes(video_THWC, least=2)
    return float((255 - np.abs(np.diff(video, axis=0)).mean(axis=(1, 2, 3)).mean()) / 255)


def motion_smoothness(video_THWC: np.ndarray, between: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """(255 - e) / 255, e the mean absolute error of every second frame against what its neighbours foretell.

    Args:
      video_THWC: frames as bytes.
      between: (frame_HWC, frame_HWC) -> the frame halfway between them, 0 to 255; VBench's is AMT-S. Made
        bytes by cutting off fractions, as there.

    Cannot see: that nothing moves, which scores best. Jumps of whole frames that ``between`` explains away.

    Raises:
      ValueError: for frames that are not bytes, or fewer than 3.
    """
    video = _bytes(video_THWC, least=3)
    kept = video[::2]
    errors = [
        np.abs(np.trunc(np.clip(between(one, other), 0, 255)) - true).mean()
        for one, other, true in zip(kept[:-1], kept[1:], video[1::2], strict=False)
    ]
    return float((255 - np.mean(errors)) / 255)


def dynamic_degree(flow_THW2: np.ndarray) -> float:
    """1 if a clip moves, 0 if it hardly does: is the flow large in enough of its steps?

    A step moves if the mean length of its largest 5 % of flow vectors is above 6 pixels for each 256 of the shorter
    side. A clip of n frames moves if round(n / 4) of its n - 1 steps do. Frames are 8 a second.

    Args:
      flow_THW2: pixels that each place moves from a frame to the next; VBench's is RAFT's.

    Cannot see: what moves, or how well. Slow motion.

    Raises:
      ValueError: for a flow without steps.
    """
    flow = np.asarray(flow_THW2, np.float64)
    if flow.ndim != 4 or flow.shape[-1] != 2 or not len(flow):
        raise ValueError(f"flow of shape {flow.shape}: expected (steps, height, width, 2), at least 1 step.")
    steps, height, width, _ = flow.shape
    lengths = np.sort(np.linalg.norm(flow, axis=-1).reshape(steps, -1), axis=1)[:, ::-1]
    largest = lengths[:, : max(1, int(height * width * 0.05))].mean(axis=1)
    moving = int((largest > 6.0 * min(height, width) / 256).sum())
    return float(moving >= round(4 * (steps + 1) / 16))


def _bytes(video_THWC: np.ndarray, *, least: int) -> np.ndarray:
    video = np.asarray(video_THWC)
    if video.dtype != np.uint8 or video.ndim != 4 or len(video) < least:
        raise ValueError(
            f"video of shape {video.shape} and type {video.dtype}: expected (frames, height, width, channels) of "
            f"bytes, at least {least} frames."
        )
    return video.astype(np.float64)
