# SPDX-License-Identifier: Apache-2.0
"""VBench's dimensions on clips whose scores can be worked out by hand."""

import numpy as np
import pytest

from stvdm.evaluation import vbench


def test_consistency_is_the_mean_of_two_cosines():
    features = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    # frame 1: cos 0 with the first, 0 with the one before; frame 2: cos -1 (counts 0) and 0
    assert vbench.subject_consistency(features) == 0
    features = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    half = np.sqrt(0.5)
    assert vbench.subject_consistency(features) == pytest.approx(((half + half) / 2 + (0 + half) / 2) / 2)
    assert vbench.background_consistency(np.ones((5, 3))) == pytest.approx(1)


def test_flickering_is_the_mean_absolute_difference():
    video = np.zeros((3, 2, 2, 3), np.uint8)
    assert vbench.temporal_flickering(video) == 1
    video[1] = 51
    assert vbench.temporal_flickering(video) == pytest.approx(1 - 51 / 255)


def test_smoothness_compares_every_second_frame_with_what_its_neighbours_foretell():
    mean = lambda one, other: (one + other) / 2  # noqa: E731
    ramp = np.broadcast_to(np.arange(0, 100, 20, dtype=np.uint8)[:, None, None, None], (5, 2, 2, 3))
    assert vbench.motion_smoothness(ramp, mean) == 1
    jumpy = ramp.copy()
    jumpy[3] += 51
    assert vbench.motion_smoothness(jumpy, mean) == pytest.approx(1 - 51 / 2 / 255)
    assert vbench.motion_smoothness(jumpy[:4], mean) == 1, "the last frame has one neighbour only"
    odd = np.full((3, 2, 2, 3), [0], np.uint8)
    odd[1:] = np.array([1, 3])[:, None, None, None]
    assert vbench.motion_smoothness(odd, mean) == 1, "of the 1.5 foretold 1 is left, as on a cast to bytes"


def test_a_clip_moves_if_enough_of_its_steps_do():
    flow = np.zeros((15, 64, 128, 2))  # 16 frames: 4 steps have to move, farther than 1.5 pixels
    flow[:3, :8, :64] = [1.2, 1.2]  # 512 of 8192 places: more than 5 %
    assert vbench.dynamic_degree(flow) == 0
    flow[3, :8, :64] = [1.2, 1.2]
    assert vbench.dynamic_degree(flow) == 1
    flow[3, :4, :64] = 0  # half of the 5 % now stand still
    assert vbench.dynamic_degree(flow) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: vbench.subject_consistency(np.ones((1, 4))), "at least 2 frames"),
        (lambda: vbench.temporal_flickering(np.zeros((4, 2, 2, 3))), "float64: expected .* bytes"),
        (lambda: vbench.motion_smoothness(np.zeros((2, 2, 2, 3), np.uint8), np.add), "at least 3 frames"),
        (lambda: vbench.dynamic_degree(np.zeros((0, 4, 4, 2))), "at least 1 step"),
    ],
)
def test_errors_teach(call, said):
    with pytest.raises(ValueError, match=said):
        call()
