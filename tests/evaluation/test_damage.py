# SPDX-License-Identifier: Apache-2.0
"""Each damage does what it says, as strongly as it says, and nothing else."""

import itertools
import math

import numpy as np
import pytest

from stvdm.data.kinetic_scene import Background, Scene, Thing, ground_truth
from stvdm.data.kinetic_shapes import sample_scene
from stvdm.evaluation import damage, physics
from stvdm.evaluation.damage import DAMAGES, Shot
from stvdm.evaluation.tracking import track

GREY = Background("gradient", ((100.0, 102.0, 98.0), (120.0, 118.0, 122.0)))
BALL = Thing("red", "ball", "right", 0.13, (-0.25, 0.1), (0.25, 0.0))
SHOT = Shot(Scene((BALL,), GREY, "a red ball moves to the right"))
SHOTS = [Shot(sample_scene(0, index, split="test"), num_frames=9, height=32, width=32) for index in range(8)]
MIDDLE = np.full((9, 16, 16, 3), 128, np.uint8)  # neither end of the bytes is near


def rms(differences):
    return math.sqrt(float(np.square(differences).mean()))


def difference(video, other):
    return video.astype(float) - other.astype(float)


@pytest.mark.parametrize("kind", DAMAGES.values(), ids=lambda kind: kind.name)
def test_none_of_it_is_the_clip_byte_for_byte(kind):
    for seed, shot in enumerate(SHOTS):
        np.testing.assert_array_equal(kind(shot, 0.0, seed=seed), shot.render())


@pytest.mark.parametrize("kind", DAMAGES.values(), ids=lambda kind: kind.name)
def test_more_of_it_is_farther_from_the_clip(kind):
    far = [
        [rms(difference(kind(shot, strength, seed=seed), shot.render())) for strength in kind.strengths]
        for seed, shot in enumerate(SHOTS)
    ]
    mean = [0.0, *np.mean(far, axis=0)]
    assert all(before < after for before, after in itertools.pairwise(mean)), mean


@pytest.mark.parametrize("kind", DAMAGES.values(), ids=lambda kind: kind.name)
def test_a_seed_is_always_the_same_damage(kind):
    strength = kind.strengths[kind.middle]
    one, again = (kind(SHOTS[0], strength, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert one.dtype == np.uint8 and one.shape == (9, 32, 32, 3)
    if kind.name not in ("blur", "time_reversal", "freeze"):  # nothing is drawn there
        assert any((kind(SHOTS[0], strength, seed=seed) != one).any() for seed in range(4, 8))


def test_a_function_of_pixels_leaves_the_clip_that_it_is_given():
    video = SHOT.render()
    before = video.copy()
    for kind in DAMAGES.values():
        if kind.of_pixels:
            kind.do(video, kind.strengths[0], seed=0)[:] = 0
    np.testing.assert_array_equal(video, before)


@pytest.mark.parametrize("amplitude", [3.0, 8.0, 20.0])
def test_flicker_has_its_amplitude_and_leaves_the_mean(amplitude):
    offsets = difference(damage.flicker(MIDDLE, amplitude, seed=1), MIDDLE)
    assert np.ptp(offsets, axis=(1, 2, 3)).max() == 0  # the same all over a frame
    assert rms(offsets) == pytest.approx(amplitude, abs=0.5)  # of rounding
    assert abs(offsets.mean()) < 0.5


@pytest.mark.parametrize("strength", [10.0, 25.0, 60.0])
def test_colour_drifts_evenly_and_as_far_as_is_said(strength):
    hue = difference(damage.colour_drift(MIDDLE, strength, seed=2), MIDDLE)[:, 0, 0]
    assert rms(hue[-1]) == pytest.approx(strength, abs=0.5)
    np.testing.assert_allclose(hue, np.linspace(0, 1, 9)[:, None] * hue[-1], atol=1.0)
    assert abs(hue.mean(1)).max() < 0.5  # no brighter, no darker


def test_blur_widens_an_edge_by_what_is_said():
    edge = np.where(np.arange(64) < 32, 0, 200).astype(np.uint8)
    video = np.broadcast_to(edge[None, None, :, None], (2, 64, 64, 3))
    slope = np.diff(damage.blur(video, 3 / 64)[0, 20, :, 0].astype(float))
    position = np.arange(63)
    mean = (slope * position).sum() / slope.sum()
    deviation = math.sqrt((slope * (position - mean) ** 2).sum() / slope.sum())
    assert deviation == pytest.approx(3.0, rel=0.03)


def test_running_backwards_twice_is_running_forwards():
    video = SHOT.render()
    backwards = damage.time_reversal(video, 1)
    np.testing.assert_array_equal(backwards[0], video[-1])
    np.testing.assert_array_equal(damage.time_reversal(backwards, 1), video)


def test_a_frozen_clip_stands_still_from_where_it_stops():
    video = SHOT.render()  # 16 steps
    frozen = damage.freeze(video, 0.25)
    np.testing.assert_array_equal(frozen[:13], video[:13])
    np.testing.assert_array_equal(frozen[13:], np.broadcast_to(video[12], (4, 64, 64, 3)))
    np.testing.assert_array_equal(damage.freeze(video, 1.0), np.broadcast_to(video[0], video.shape))


def test_the_last_frames_show_another_thing_in_its_place():
    video, damaged = SHOT.render(), damage.identity_swap(SHOT, 0.5, seed=0)
    first = 17 - round(0.5 * 17)
    np.testing.assert_array_equal(damaged[:first], video[:first])
    before, after = sorted(track(damaged), key=lambda found: np.flatnonzero(found.seen)[0])
    assert (before.colour, before.shape) == ("red", "ball")
    assert after.colour != "red" and after.shape != "ball"
    np.testing.assert_array_equal(before.seen, np.arange(17) < first)
    np.testing.assert_array_equal(after.seen, np.arange(17) >= first)
    path = np.where(before.seen[:, None], before.centre, after.centre)
    np.testing.assert_allclose(path, BALL.path(np.arange(17) / 8), atol=0.02)


def test_a_thing_does_not_take_on_a_colour_that_is_there():
    things = tuple(
        Thing(colour, "ball", "right", 0.08, (-0.25, 0.3 * n - 0.3), (0.2, 0.0))
        for n, colour in enumerate(("red", "yellow", "green"))
    )
    shot = Shot(Scene(things, GREY, ""))
    for seed in range(12):
        colours = [found.colour for found in track(damage.identity_swap(shot, 0.5, seed=seed))]
        assert len(set(colours)) == len(colours) == 4


@pytest.mark.parametrize("share, gone", [(0.12, 2), (0.25, 4), (0.5, 8)])
def test_a_thing_is_gone_for_as_long_as_is_said(share, gone):
    video, damaged = SHOT.render(), damage.vanishing(SHOT, share, seed=5)
    missing = np.flatnonzero((damaged != video).any((1, 2, 3)))
    assert len(missing) == gone and np.ptp(missing) == gone - 1
    empty = SHOT.render(Scene((), GREY, ""))
    np.testing.assert_array_equal(damaged[missing], empty[missing])


def test_a_thing_vanishes_while_it_could_be_seen():
    for index in range(40):
        shot = Shot(sample_scene(1, index, split="test"))
        changed = (damage.vanishing(shot, 0.12, seed=index) != shot.render()).any((1, 2, 3))
        assert changed.sum() == 2, shot.scene.caption


@pytest.mark.parametrize("jump", [0.05, 0.15, 0.3])
def test_a_thing_jumps_as_far_as_is_said_and_then_moves_on(jump):
    (found,) = track(damage.teleport(SHOT, jump, seed=0))
    away = found.centre - BALL.path(np.arange(17) / 8)
    distance = np.linalg.norm(away, axis=1)
    after = distance > jump / 2
    assert 4 <= np.flatnonzero(after)[0] < 13 and after[np.flatnonzero(after)[0] :].all()
    np.testing.assert_allclose(distance[~after], 0, atol=0.012)
    np.testing.assert_allclose(distance[after], jump, atol=0.012)


def test_a_jump_ends_inside_the_frame_and_a_bounce_keeps_its_height():
    bounce = Thing("blue", "ball", "bounce_right", 0.12, (-0.2, -0.3), (0.2, 0.0), 0.0, 3.0, 0.85, 0.47)
    shot = Shot(Scene((bounce,), GREY, ""))
    for seed in range(6):
        damaged = damage.teleport(shot, 0.3, seed=seed)
        (found,) = track(damaged)
        assert found.seen.all()
        apart = (found.centre - bounce.path(np.arange(17) / 8))[-1]
        assert np.abs(apart).max() == pytest.approx(0.3, abs=0.03)  # along one axis, the floor with it
        assert np.abs(apart).min() < 0.03


def test_what_the_tracked_physics_is_there_to_see_it_sees():
    for name, item in (("identity_swap", "persistence"), ("vanishing", "persistence"), ("teleport", "smoothness")):
        assert physics.score(SHOT.render(), SHOT.scene)[item] == 1
        assert physics.score(DAMAGES[name](SHOT, 0.25, seed=0), SHOT.scene)[item] == 0


def test_a_shot_knows_what_is_seen():
    visible = ground_truth(SHOT.scene)["visibility"][0]
    np.testing.assert_array_equal(SHOT.visibility(0), visible)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: damage.flicker(MIDDLE / 255, 1.0), "type float64: expected .* bytes"),
        (lambda: damage.flicker(MIDDLE, -1.0), "flicker of strength -1.0: expected a number of at least 0"),
        (lambda: damage.freeze(MIDDLE, 1.5), "freeze of strength 1.5: expected .* at most 1"),
        (lambda: damage.time_reversal(MIDDLE, 0.5), "expected 0, forwards, or 1, backwards"),
        (lambda: damage.identity_swap(SHOT, 2.0), "identity_swap of strength 2.0"),
        (lambda: damage.vanishing(SHOT, 2.0), "vanishing of strength 2.0"),
        (lambda: damage.teleport(SHOT, math.nan), "teleport of strength nan"),
    ],
)
def test_errors_teach(call, said):
    with pytest.raises(ValueError, match=said):
        call()
