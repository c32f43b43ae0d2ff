# SPDX-License-Identifier: Apache-2.0
"""Every instrument gives a number for every clip, and says beforehand what it is there to see."""

import itertools

import numpy as np
import pytest

from stvdm.data.kinetic_shapes import sample_scene
from stvdm.evaluation import instruments as shelf
from stvdm.evaluation import physics, vbench
from stvdm.evaluation.damage import DAMAGES, Shot
from stvdm.evaluation.instruments import Clips, Features

SHOTS = [Shot(sample_scene(0, index, split="test"), num_frames=5, height=32, width=32) for index in range(3)]
VIDEOS = np.stack([shot.render() for shot in SHOTS])
SCENES = [shot.scene for shot in SHOTS]


@pytest.fixture(scope="module")
def undamaged():
    return shelf.score(Clips(VIDEOS, VIDEOS, SCENES, fps=8.0))


def test_expectations_name_damages_and_no_damage_twice():
    for instrument in shelf.instruments():
        assert set(instrument.sees) | set(instrument.blind) <= DAMAGES.keys()
        assert not set(instrument.sees) & set(instrument.blind), instrument.name


def test_every_damage_is_somebodys():
    assert {name for instrument in shelf.instruments() for name in instrument.sees} == DAMAGES.keys()


def test_what_is_scored_is_what_is_listed(undamaged):
    listed = [instrument.name for instrument in shelf.instruments()]
    sets = [f"{kind} ({row.name})" for row in shelf.FEATURES for kind in ("frechet", "kernel", "precision", "recall")]
    assert len(set(listed)) == len(listed)
    assert sorted(listed) == sorted([*undamaged, *sets])
    assert {i.name for i in shelf.instruments() if i.reads == "set"} == set(sets)
    assert all(values.shape == (3,) for values in undamaged.values())


def test_a_clip_equals_itself(undamaged):
    assert (undamaged["psnr"] == shelf.PSNR_OF_EQUALS).all()
    assert (undamaged["ssim"] == 1).all() and (undamaged["excess_flicker"] == 0).all()
    assert (undamaged["change_error"] == 0).all()


def test_scores_are_those_of_their_functions(undamaged):
    for n, (video, scene) in enumerate(zip(VIDEOS, SCENES, strict=True)):
        flickering = vbench.temporal_flickering(video)
        assert undamaged["temporal_flickering"][n] == pytest.approx(flickering, abs=1e-6)
        assert undamaged["frame_change"][n] == pytest.approx(1 - flickering, abs=1e-6)  # the same, the other way round
        frames = shelf.colours(video[:, None])
        consistent = undamaged["background_consistency (colours)"][n]
        assert consistent == pytest.approx(vbench.background_consistency(frames), abs=1e-6)
        for item, value in physics.score(video, scene, fps=8.0).items():
            np.testing.assert_allclose(undamaged[f"physics {item}"][n], value, atol=1e-6)


def test_running_backwards_changes_nothing_that_has_no_direction(undamaged):
    backwards = shelf.score(Clips(VIDEOS[:, ::-1], VIDEOS, SCENES, fps=8.0))
    for name in ("excess_flicker", "frame_change", "temporal_flickering"):
        np.testing.assert_array_equal(backwards[name], undamaged[name])


def test_a_further_network_is_one_more_row():
    row = Features("first pixel", lambda videos: videos[:, 0, 0, 0].astype(float), sees=("blur",))
    names = [instrument.name for instrument in shelf.instruments((row,))]
    assert [name for name in names if "(" in name] == [
        f"{kind} (first pixel)" for kind in ("frechet", "kernel", "precision", "recall")
    ]
    assert next(i for i in shelf.instruments((row,)) if i.name == "frechet (first pixel)").expected("blur") == "sees"
    consistent = row._replace(stands_in="subject_consistency")
    assert "subject_consistency (first pixel)" in shelf.score(Clips(VIDEOS, VIDEOS, SCENES, 8.0), (consistent,))


def test_features_are_of_each_clip_alone_and_of_single_frames_too():
    for row, sizes in itertools.product(shelf.FEATURES, ((3, 5), (1, 5), (3, 1))):
        N, T = sizes
        found = row.of(VIDEOS[:N, :T])
        assert found.shape[0] == N and found.ndim == 2 and np.isfinite(found).all()
        np.testing.assert_allclose(found[:1], row.of(VIDEOS[:1, :T]), rtol=1e-4, atol=1e-5)


def test_hand_made_colours_are_means_of_fields():
    video = np.zeros((1, 2, 8, 8, 3), np.uint8)
    video[0, 0, :2, 2:4] = (255, 0, 51)  # the second of the first row, in one of two frames
    found = shelf.colours(video).reshape(4, 4, 3)
    np.testing.assert_allclose(found[0, 1], (0.5, 0, 0.1))
    assert np.count_nonzero(found) == 2


def test_random_weights_see_change_where_colours_do_not():
    shaken = VIDEOS[:, [1, 0, 3, 2, 4]]
    np.testing.assert_allclose(shelf.colours(shaken), shelf.colours(VIDEOS), atol=1e-12)
    assert np.abs(shelf.random_weights(shaken) - shelf.random_weights(VIDEOS)).max() > 1e-3


def test_a_set_is_at_no_distance_from_itself():
    features = np.random.default_rng(0).normal(size=(12, 3))
    found = shelf.distances(features, features)
    assert found["frechet"] == pytest.approx(0, abs=1e-5)
    assert found["precision"] == found["recall"] == 1
    assert shelf.distances(features + 5, features)["frechet"] == pytest.approx(75, abs=1e-3)
