# SPDX-License-Identifier: Apache-2.0
"""Noise that is shifted is found where it was shifted to, and the frame in between is the one in between."""

import numpy as np
import pytest

from stvdm.data.kinetic_scene import Background, Scene, Thing, ground_truth, render
from stvdm.evaluation import block_matching, vbench

INSIDE = np.s_[8:-8, 8:-8]


def translated_noise(speed, num_frames=4, height=32, width=48):
    """(T, H, W, 3) uint8 that moves `speed` (x, y) pixels a frame."""
    noise = np.random.default_rng(0).integers(0, 256, (height + 60, width + 60, 3), np.uint8)
    corners = [(30 - t * speed[1], 30 - t * speed[0]) for t in range(num_frames)]
    return np.stack([noise[y : y + height, x : x + width] for y, x in corners])


@pytest.mark.parametrize("speed", [(0, 0), (3, -2), (-4, 4), (1, 0)])
def test_the_flow_of_translated_noise_is_exact(speed):
    flow = block_matching.flow(translated_noise(speed), reach=4)
    assert flow.shape == (3, 32, 48, 2)
    np.testing.assert_array_equal(flow[:, *INSIDE], np.broadcast_to(speed, (3, 16, 32, 2)))


@pytest.mark.parametrize("speed", [(0, 0), (2, -1), (-2, 2)])
def test_the_frame_in_between_is_exact(speed):
    video = translated_noise(speed)
    between = block_matching.between(video[0], video[2], reach=4)
    np.testing.assert_array_equal(between[INSIDE], video[1][INSIDE])


def test_odd_steps_end_half_a_pixel_off():
    one, other = translated_noise((1, 0), num_frames=2)
    between = block_matching.between(one, other, reach=4)
    np.testing.assert_array_equal(between[INSIDE], one[INSIDE])


def test_where_nothing_is_to_be_seen_nothing_moves():
    assert not block_matching.flow(np.full((3, 16, 16, 3), 90, np.uint8)).any()


def test_what_moves_farther_than_the_reach_is_not_found():
    flow = block_matching.flow(translated_noise((6, 0)), reach=4)
    assert not (flow[:, *INSIDE] == (6, 0)).all(-1).any()


def test_a_sliding_thing_moves_as_it_truly_does():
    plain = Background("plain", ((80.0, 80.0, 80.0), (80.0, 80.0, 80.0)))
    small = Thing("yellow", "square", "right", 0.09, (-0.2, 0.0), (0.375, 0.0))  # 3 pixels a frame
    scene = Scene((small,), plain, "")
    flow, truth = block_matching.flow(render(scene, num_frames=9)), ground_truth(scene, num_frames=9)
    for t, (x, y) in enumerate(truth["tracks"][0, :-1].round().astype(int)):
        np.testing.assert_array_equal(flow[t, y - 2 : y + 2, x - 2 : x + 2].reshape(-1, 2), [[3, 0]] * 16)
        assert not flow[t, :8].any()
    assert vbench.dynamic_degree(flow) == 1


def test_motion_is_foretold_better_than_by_the_mean():
    video = translated_noise((3, 1), num_frames=7)
    mean = vbench.motion_smoothness(video, lambda one, other: (one + other) / 2)
    assert vbench.motion_smoothness(video, lambda *pair: block_matching.between(*pair, reach=8)) > mean + 0.1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: block_matching.flow(np.zeros((1, 8, 8, 3))), "num_frames=1: .* at least 2"),
        (lambda: block_matching.flow(np.zeros((2, 8, 9, 3))), "whole squares of 4 pixels"),
        (lambda: block_matching.flow(np.zeros((2, 8, 8, 3)), reach=5), "reach=5: expected 1 to 4"),
        (lambda: block_matching.between(np.zeros((8, 8, 3)), np.zeros((8, 4, 3))), "two of one shape"),
    ],
)
def test_errors_teach(call, said):
    with pytest.raises(ValueError, match=said):
        call()
