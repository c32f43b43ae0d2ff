# SPDX-License-Identifier: Apache-2.0
"""Scores over published networks, with small random ones in their place."""

import numpy as np
import pytest

from stvdm.evaluation import published
from stvdm.models import clip


@pytest.fixture(scope="module")
def judges(networks):
    return published.Judges.load(networks)


def videos(num, frames=3, size=20):
    random = np.random.default_rng(num)
    return random.integers(0, 256, (num, frames, size, size, 3), dtype=np.uint8)


def test_the_clip_score_is_its_formula():
    text, images = np.array([3.0, 4.0]), np.array([[6.0, 8.0], [-4.0, 3.0], [-3.0, -4.0], [5.0, 0.0]])
    assert published.clip_score(text, images) == pytest.approx(100 * (1 + 0 + 0 + 0.6) / 4)  # cosines 1, 0, -1, 0.6


@pytest.mark.parametrize("sign", [1, -1])
def test_the_clip_score_of_a_clip_is_the_mean_over_its_frames(judges, sign):
    clips, captions = videos(3), ["red ball", "a square", "blue"]
    model, params, tokenizer = judges.clip
    turned = {
        **params,
        "text": {**params["text"], "projection": {"kernel": sign * params["text"]["projection"]["kernel"]}},
    }
    judges = published.Judges(clip=judges.clip._replace(params=turned))
    scores = judges.clip_score(clips, captions, batch=4)
    text = sign * model.apply({"params": params}, tokenizer(captions)[0], method="read").embedding_BE
    for i in range(3):
        images = model.apply({"params": params}, clip.prepare(clips[i], 15), method="look").embedding_BE
        cos = [float(text[i] @ image / np.linalg.norm(text[i]) / np.linalg.norm(image)) for image in images]
        assert scores[i] == pytest.approx(100 * np.maximum(cos, 0).mean(), rel=1e-4, abs=1e-4)
    assert scores.max() > 1 or sign == 1  # these random towers disagree, unless one is turned round


def test_the_clip_score_does_not_see_time(judges):
    clips = videos(2)
    forwards, backwards = (judges.clip_score(v, ["a", "b"]) for v in (clips, clips[:, ::-1]))
    np.testing.assert_allclose(forwards, backwards, rtol=1e-6)


def test_batches_do_not_show(judges):
    clips, captions = videos(5), list("abcde")
    np.testing.assert_allclose(
        judges.clip_score(clips, captions, batch=2), judges.clip_score(clips, captions, batch=7), rtol=1e-4, atol=1e-4
    )


def test_errors_teach(judges, tmp_path):
    with pytest.raises(ValueError, match="2 clips and 1 captions"):
        judges.clip_score(videos(2), ["one"])
    with pytest.raises(ValueError, match=r"expected a folder with any of clip/"):
        published.Judges.load(tmp_path)
    with pytest.raises(ValueError, match=r"clip: its weights are not at hand"):
        published.Judges().clip_score(videos(1), ["one"])
