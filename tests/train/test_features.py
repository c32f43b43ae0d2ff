# SPDX-License-Identifier: Apache-2.0
"""What the feature network is taught: that the answers are those of the clips, and the damage what it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.data.kinetic_scene import COLOURS, MOTIONS, render
from stvdm.data.kinetic_shapes import sample_scene
from stvdm.models import video_features
from stvdm.train import features

SCENES = [sample_scene(5, index) for index in range(8)]


def test_answers_are_those_of_the_scene():
    videos, truth = features.clips(5, range(8), split="train", damaged=0.0)
    for i, scene in enumerate(SCENES):
        np.testing.assert_array_equal(videos[i], render(scene, 17, 32, 32, 8.0))
        assert truth["colour"][i].sum() == len(scene.things)
        for thing in scene.things:
            at = list(COLOURS).index(thing.colour)
            assert truth["colour"][i, at] == 1
            assert list(MOTIONS)[truth["motion"][i, at]] == thing.motion
            if MOTIONS[thing.motion].kind == "slide" and not scene.camera[0]:
                assert truth["speed"][i, at] == pytest.approx(np.hypot(*thing.velocity), rel=1e-3)
    assert (truth["damage"] == 0).all()


def test_clips_are_the_same_whatever_is_asked_for_beside_them():
    few, _ = features.clips(5, range(3, 5), split="train", damaged=1.0)
    more, truth = features.clips(5, range(8), split="train", damaged=1.0)
    np.testing.assert_array_equal(few, more[3:5])
    assert (truth["damage"] > 0).all()


@pytest.mark.parametrize("what", features.DAMAGES)
def test_damage_is_what_it_is_called(what):
    for number, scene in enumerate(SCENES):
        whole = render(scene, 17, 32, 32, 8.0)
        made = features.damage(scene, what, np.random.default_rng(number))
        assert made.shape == whole.shape and made.dtype == np.uint8
        changed = (made != whole).any(axis=(1, 2, 3))
        ratio = made.astype(float).mean((1, 2, 3)) / whole.mean((1, 2, 3))
        if what == "none":
            assert not changed.any()
        elif what == "order":
            rows = sorted(frame.tobytes() for frame in made), sorted(frame.tobytes() for frame in whole)
            assert rows[0] == rows[1]
        elif what == "flicker":
            assert ratio.std() > 0.02
        elif what == "noise":
            assert np.abs(made.astype(float) - whole).std() > 2 and ratio.std() < 0.05  # grain, no flicker
        elif what == "vanishing":
            assert not changed[0]
            number_away = np.diff(changed.astype(int))
            assert (number_away == 1).sum() <= 2  # one stretch, which a thing that is out of sight may part
        elif what == "jump":
            assert not changed[0]
        else:
            sharpness = [np.abs(np.diff(clip.astype(float), axis=2)).mean() for clip in (made, whole)]
            assert sharpness[0] < sharpness[1]


def test_only_what_makes_sense_is_asked():
    """The motion of frames out of order, and the shape of a colour that is not there, have no say in the loss."""
    _, truth = features.clips(5, range(4), split="train", damaged=0.0)
    truth["in_order"][:] = 0
    sizes = dict(features.PARTS)
    said = {name: jnp.ones((4, size)) for name, size in sizes.items()}
    slopes = jax.jit(jax.grad(lambda said: sum(features.losses(said, truth).values())))(said)
    assert not slopes["motion"].any() and not slopes["speed"].any()
    shapes = np.abs(slopes["shape"].reshape(4, features.NUM_COLOURS, -1)).sum(-1)
    np.testing.assert_array_equal(shapes > 0, truth["colour"] > 0)
    assert all(np.abs(slopes[name]).max() > 0 for name in ("colour", "camera", "bar", "backdrop", "damage"))


@pytest.mark.slow
def test_a_short_training_learns_something_and_can_be_loaded(tmp_path):
    before, after = (features.main(str(tmp_path), steps=steps, batch=16, num_test=48) for steps in (1, 60))
    error = "mean error of speed, frame heights a second"
    assert after["validation"][error] < before["validation"][error] / 2
    net = video_features.load(tmp_path)
    videos, _ = features.clips(5, range(32), split="train", damaged=0.0)
    assert np.abs(net.extract(videos).std(0) - 1).max() < 0.8
