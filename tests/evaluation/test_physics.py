# SPDX-License-Identifier: Apache-2.0
"""The tracker is right about real clips, and each item falls when, and mostly only when, its own thing is broken."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage

from stvdm.data.kinetic_scene import Background, Scene, Thing, ground_truth, render
from stvdm.data.kinetic_shapes import World, sample_scene
from stvdm.evaluation import physics
from stvdm.evaluation.tracking import camera_speed, levels, track

GREY = Background("gradient", ((70.0, 72.0, 68.0), (90.0, 88.0, 92.0)))
BALL = Thing("red", "ball", "right", 0.13, (-0.3, 0.2), (0.3, 0.0))
SQUARE = Thing("cyan", "square", "up_left", 0.12, (0.3, 0.0), (-0.2, -0.2))
BOUNCE = Thing("blue", "triangle", "bounce_right", 0.14, (-0.25, -0.3), (0.25, 0.0), 0.0, 3.0, 0.85, 0.47)
GROWING = Thing("green", "ball", "grow", 0.09, (0.0, -0.1), growth=0.045)
RETURNING = Thing("yellow", "square", "return_left", 0.13, (-0.15, 0.1), (-0.5, 0.0), turn=1.0)


def scene_of(*things, **fields):
    return Scene(things, GREY, "", **fields)


def like_an_autoencoder(video_THWC):
    """Blur and noise, about 30 dB."""
    blurred = ndimage.gaussian_filter(video_THWC.astype(np.float32), (0, 0.7, 0.7, 0))
    noise = np.random.default_rng(int(video_THWC[0].sum())).normal(0, 6, video_THWC.shape)
    return np.clip(blurred + noise + 0.5, 0, 255).astype(np.uint8)


def test_blur_and_noise_are_about_30_db():
    clips = [render(sample_scene(0, index)) for index in range(6)]
    errors = [((like_an_autoencoder(clip).astype(float) - clip) ** 2).mean() for clip in clips]
    assert 26 < 10 * math.log10(255**2 / np.mean(errors)) < 32


@pytest.mark.parametrize("num_clips, damage", [(60, None), (30, like_an_autoencoder)])
def test_real_clips_are_judged_right(num_clips, damage):
    rows, not_reported = physics.validate_tracker(num_clips, seed=1, damage=damage)
    assert not_reported == ()
    assert rows["all_right"].mean >= 0.95 and rows["residual"].mean < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "split, size, damage", [("validation", 64, None), ("test", 64, like_an_autoencoder), ("validation", 32, None)]
)
def test_many_real_clips_are_judged_right(split, size, damage):
    world = World(num_things=(0.4, 0.3, 0.3), occluder=0.3, pan=0.2)
    rows, not_reported = physics.validate_tracker(
        300, seed=2, world=world, split=split, height=size, width=size, damage=damage
    )
    assert not_reported == () and min(row.num for row in rows.values()) > 40


def test_tracks_are_where_things_are():
    scene = scene_of(BALL, SQUARE, BOUNCE)
    truth = ground_truth(scene)
    tracks = {found.colour: found for found in track(render(scene))}
    assert set(tracks) == {"red", "cyan", "blue"}
    for n, thing in enumerate(scene.things):
        found = tracks[thing.colour]
        clear = truth["visibility"][n] > 0.98
        assert clear.sum() > 8 and found.shape == thing.shape
        np.testing.assert_allclose(found.centre[clear] * 64 + 31.5, truth["tracks"][n][clear], atol=0.5)
        np.testing.assert_allclose(found.radius[clear] * 64, truth["radius"][n][clear], rtol=0.06)


def test_a_float_clip_is_the_same_clip():
    video = render(scene_of(BALL))
    assert physics.score(video / 127.5 - 1.0, scene_of(BALL)) == pytest.approx(
        physics.score(video, scene_of(BALL)), nan_ok=True, abs=1e-3
    )
    with pytest.raises(ValueError, match="score clips one by one"):
        track(video[None])


@pytest.mark.parametrize("speed", [-0.13, 0.0, 0.08, 0.13])
def test_the_camera_is_measured(speed):
    stripes = Background("stripes", ((70.0,) * 3, (100.0,) * 3), period=0.4)
    video = render(Scene((BALL,), stripes, "", camera=(speed, 0.0)))
    assert camera_speed(levels(like_an_autoencoder(video)), 8.0) == pytest.approx(speed, abs=0.01)


ALL = (*physics.RIGHT_OR_WRONG, "all_right")


def wrong_items(video, scene, **options):
    scores = physics.score(video, scene, **options)
    return {item for item in ALL if scores[item] == 0} - {"all_right"}


@pytest.mark.parametrize("thing", [BALL, SQUARE, BOUNCE, GROWING, RETURNING], ids=lambda thing: thing.motion)
def test_undamaged_clips_have_no_fault(thing):
    assert wrong_items(render(scene_of(thing)), scene_of(thing)) == set()


@pytest.mark.parametrize(
    "thing, change, expected",
    [
        (BALL, {"colour": "magenta"}, {"colour"}),
        (BALL, {"shape": "square"}, {"shape"}),
        (SQUARE, {"shape": "ball"}, {"shape"}),
        (BOUNCE, {"shape": "diamond"}, {"shape"}),
        (BALL, {"velocity": (0.0, 0.0)}, {"direction", "motion"}),
        (BALL, {"velocity": (0.3, -0.2)}, {"direction"}),
        (BOUNCE, {"velocity": (0.0, 0.0)}, {"direction"}),
        (BOUNCE, {"gravity": 0.0}, {"motion"}),
        (GROWING, {"growth": 0.0}, {"motion"}),
        (GROWING, {"growth": -0.02, "radius": 0.13}, {"motion"}),
        (RETURNING, {"turn": None}, {"motion", "direction", "persistence"}),
        (RETURNING, {"turn": None, "velocity": (0.2, 0.0)}, {"motion", "direction"}),
    ],
)
def test_a_thing_that_is_not_as_prompted(thing, change, expected):
    assert wrong_items(render(scene_of(dataclasses.replace(thing, **change))), scene_of(thing)) == expected


@pytest.mark.parametrize("thing", [BALL, SQUARE, BOUNCE])
def test_time_reversed_goes_the_other_way(thing):
    assert "direction" in wrong_items(render(scene_of(thing))[::-1], scene_of(thing))


def test_growing_reversed_is_another_kind():
    assert wrong_items(render(scene_of(GROWING))[::-1], scene_of(GROWING)) == {"motion"}


def test_one_thing_too_few_or_too_many():
    two, one = scene_of(BALL, SQUARE), scene_of(BALL)
    assert wrong_items(render(two), one) == {"count"}
    assert {"count", "colour"} <= wrong_items(render(one), two)
    twin = dataclasses.replace(BALL, position=(-0.3, -0.2))
    assert wrong_items(render(scene_of(BALL, twin)), one) == {"count"}
    assert wrong_items(render(scene_of()), one) >= {"count", "colour", "shape", "motion", "direction", "persistence"}


def test_vanishing_is_not_persisting():
    video, empty = render(scene_of(BALL)), render(scene_of())
    for gone in (slice(6, 9), slice(12, None), slice(0, 4)):
        damaged = video.copy()
        damaged[gone] = empty[gone]
        assert wrong_items(damaged, scene_of(BALL)) == {"persistence"}


def test_becoming_another_thing_is_not_persisting():
    video = render(scene_of(BALL))
    for change in ({"radius": 0.09}, {"shape": "triangle"}, {"colour": "green"}):
        damaged = np.concatenate([video[:9], render(scene_of(dataclasses.replace(BALL, **change)))[9:]])
        assert "persistence" in wrong_items(damaged, scene_of(BALL)), change


def test_a_jump_is_not_smooth():
    moved = dataclasses.replace(BALL, position=(-0.3, -0.1))
    damaged = np.concatenate([render(scene_of(BALL))[:9], render(scene_of(moved))[9:]])
    assert "smoothness" in wrong_items(damaged, scene_of(BALL))
    assert physics.score(damaged, scene_of(BALL))["residual"] > 0.03


def test_frames_out_of_order_are_not_smooth():
    order = np.random.default_rng(0).permutation(17)
    assert "smoothness" in wrong_items(render(scene_of(BALL))[order], scene_of(BALL))


def test_occlusion_wants_a_bar_to_hide_behind_and_a_thing_to_come_out():
    passing = Thing("red", "ball", "right", 0.11, (-0.37, 0.0), (0.37, 0.0))
    scene = scene_of(passing, bar=(0.0, 0.26))
    video = render(scene)
    assert wrong_items(video, scene) == set()
    assert wrong_items(render(scene_of(passing)), scene) == {"occlusion"}  # no bar
    no_return = np.concatenate([video[:9], render(scene_of(bar=(0.0, 0.26)))[9:]])
    assert {"occlusion", "persistence"} <= wrong_items(no_return, scene)
    turned_back = np.concatenate([video[:9], video[:8][::-1]])
    assert {"occlusion", "direction"} <= wrong_items(turned_back, scene)


def test_a_pan_is_asked_for_and_motion_is_told_relative_to_the_ground():
    checker = Background("checker", ((60.0,) * 3, (95.0,) * 3), period=0.4)
    slow = Thing("red", "ball", "left", 0.13, (0.0, 0.0), (-0.15, 0.0))
    scene = Scene((slow,), checker, "", camera=(-0.14, 0.0))  # it hardly moves in the frame
    assert wrong_items(render(scene), scene) == set()
    still = dataclasses.replace(scene, camera=(0.0, 0.0))
    assert wrong_items(render(still), scene) == {"camera"}
    assert "camera" in wrong_items(render(scene), still)
    assert "camera" in wrong_items(render(dataclasses.replace(scene, camera=(0.14, 0.0))), scene)


def test_drifting_colour_and_flickering_size_are_measured():
    video = render(scene_of(BALL))
    good = physics.score(video, scene_of(BALL))
    fading = np.linspace(1, 0.75, 17)[:, None, None, None]
    assert physics.score((video * fading).astype(np.uint8), scene_of(BALL))["colour_constancy"] < (
        good["colour_constancy"] - 0.1
    )
    larger = render(scene_of(dataclasses.replace(BALL, radius=0.145)))
    flickering = np.where((np.arange(17) % 2)[:, None, None, None] == 0, video, larger)
    assert physics.score(flickering, scene_of(BALL))["flicker"] > 3 * good["flicker"]


def test_wrong_gravity_shows_in_the_residual():
    good = physics.score(render(scene_of(BOUNCE)), scene_of(BOUNCE))
    moon = scene_of(dataclasses.replace(BOUNCE, gravity=1.8))
    assert good["residual"] < 0.01
    assert physics.score(render(moon), scene_of(BOUNCE))["residual"] > 5 * good["residual"]
    assert physics.score(render(moon), moon, world=World(gravity=1.8))["residual"] < 0.01


def test_summary_intervals():
    scores = [{"colour": 1.0, "residual": 0.01 * n, "occlusion": math.nan} for n in range(10)]
    rows = physics.summarise(scores)
    assert rows["colour"] == (1.0, pytest.approx(0.722, abs=1e-3), 1.0, 10)  # Wilson: 10 of 10
    assert rows["residual"].low < 0.045 < rows["residual"].high and rows["residual"].mean == pytest.approx(0.045)
    assert rows["occlusion"].num == 0 and math.isnan(rows["occlusion"].mean)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_intervals_of_few_clips_are_as_wide_as_they_have_to_be(num):
    rng = np.random.default_rng(num)
    rows = [physics.row(rng.normal(0.1, 0.02, num)) for _ in range(1000)]
    assert np.mean([row.low < 0.1 < row.high for row in rows]) == pytest.approx(0.95, abs=0.025)


def test_one_clip_has_no_interval():
    row = physics.row([0.125, math.nan])
    assert (row.mean, row.num) == (0.125, 1) and math.isnan(row.low) and math.isnan(row.high)
    assert row.cell() == {"mean": 0.125, "low": None, "high": None, "num": 1}
    assert physics.told(row.cell()) == "0.125"
    assert physics.told(physics.row([1.0, 1.0, 0.0, 1.0]).cell()) == "0.750 [0.301, 0.954]"


def test_an_item_that_real_clips_fail_is_not_reported():
    _, not_reported = physics.validate_tracker(8, seed=1, damage=lambda video: video[::-1])
    assert "direction" in not_reported and "colour" not in not_reported
