# SPDX-License-Identifier: Apache-2.0
"""The feature network of the package: what is claimed of it, on clips it never saw."""

import importlib.resources
import json

import numpy as np
import pytest

from stvdm.data.kinetic_scene import render
from stvdm.data.kinetic_shapes import sample_scene
from stvdm.evaluation.distributions import frechet_distance
from stvdm.models import video_features
from stvdm.train import features as training

NUM = 96
FOLDER = importlib.resources.files("stvdm") / "bundled" / "features"


@pytest.fixture(scope="module")
def net():
    return video_features.bundled()


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(3, index, split="validation") for index in range(2 * NUM)]


@pytest.fixture(scope="module")
def real(scenes):
    return np.stack([render(scene, 17, 32, 32, 8.0) for scene in scenes])


def test_it_is_small_and_says_how_it_was_made(net):
    assert (FOLDER / "model.safetensors").stat().st_size < 1_000_000
    about = json.loads((FOLDER / "model.json").read_text())
    assert about["sha256"] == net.digest
    assert about["accuracy"].keys() == {"validation", "test"}
    assert [tuple(part) for part in about["heads"]] == list(training.PARTS)


def test_it_tells_what_its_description_says(net):
    """Within four standard errors, of clips that are neither those it learned from nor those that it was tested on."""
    about = json.loads((FOLDER / "model.json").read_text())["accuracy"]["validation"]
    found = training.accuracy(net, split="validation", num=NUM, seed=7)
    for item in ("colours and count", "shape", "motion", "camera", "backdrop", "damage"):
        spread = np.sqrt(max(about[item] * (1 - about[item]), 0.01) / NUM)
        assert found[item] > about[item] - 4 * spread, item
    assert found["colours and count"] > 0.5 and found["motion"] > 2 / 15  # chance: below a tenth; a fifteenth


def test_features_of_real_clips_are_of_order_one(net, real):
    features = net.extract(real)
    assert features.shape == (2 * NUM, 64) and features.dtype == np.float64
    assert np.abs(features.mean(0)).max() < 0.6
    assert features.std(0).min() > 0.5 and features.std(0).max() < 1.6


@pytest.mark.parametrize("what", ["order", "flicker", "noise", "vanishing", "jump", "blur"])
def test_the_distance_sees_what_the_network_was_taught_to_hear(net, real, scenes, what):
    """Of half of the clips, damaged, from the other half: farther than undamaged ones."""
    features = net.extract(real)
    random = np.random.default_rng(0)
    damaged = np.stack([training.damage(scene, what, random) for scene in scenes[:NUM]])
    floor = frechet_distance(features[NUM:], features[:NUM])
    assert frechet_distance(features[NUM:], net.extract(damaged)) > 1.1 * floor


def test_clips_of_any_size_and_length_have_features(net, scenes):
    clips = {size: np.stack([render(s, 17, size, size, 8.0) for s in scenes[:16]]) for size in (32, 64)}
    small, large = (net.extract(clips[size]) for size in (32, 64))
    apart = np.linalg.norm(small - large, axis=1).mean()
    assert apart < 0.5 * np.linalg.norm(small - np.roll(small, 1, axis=0), axis=1).mean()
    for T, H, W in ((1, 32, 32), (5, 16, 16), (34, 20, 24)):
        assert np.isfinite(net.extract(np.zeros((2, T, H, W, 3), np.uint8))).all()


def test_batches_do_not_show(net, real):
    np.testing.assert_allclose(net.extract(real[:5], batch=2), net.extract(real[:5], batch=5), rtol=1e-3, atol=1e-4)


def test_errors_teach(net):
    with pytest.raises(ValueError, match="type float64: expected bytes"):
        net.extract(np.zeros((1, 5, 16, 16, 3)))
