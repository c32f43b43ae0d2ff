# SPDX-License-Identifier: Apache-2.0
"""Scores over published networks, with small random ones in their place."""

import dataclasses

import foreign
import jax
import numpy as np
import pytest

from stvdm.evaluation import published
from stvdm.interop import mapping
from stvdm.interop.judges import I3D_RULES, LPIPS_RULES, Network, i3d_shapes, lpips_shapes
from stvdm.models import clip, i3d, lpips, videomae


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


def tiny_i3d():
    model, source = i3d.I3D(**foreign.I3D), foreign.weights(foreign.golden()["i3d"]["shapes"])
    return Network(model, mapping.into(i3d_shapes(model), source, I3D_RULES))


def test_features_are_of_prepared_clips(judges):
    """VideoMAE's of the first 4 frames, I3D's of all."""
    judges = dataclasses.replace(judges, i3d=tiny_i3d())
    clips = videos(3, frames=9)
    for name, network, num in (("videomae", judges.videomae, 3), ("i3d", judges.i3d, 1)):
        prepared = videomae.prepare(clips, num_frames=4, size=15) if name == "videomae" else i3d.prepare(clips[:1])
        seen = jax.jit(network.model.apply)({"params": network.params}, prepared)
        expected = seen.features_BD if name == "videomae" else seen
        found = judges.features(name, clips[:num], batch=min(num, 2))
        assert found.shape == (num, 32 if name == "videomae" else 11)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    found = [judges.features("videomae", seen, batch=2) for seen in (clips, clips[:, :4])]
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_lpips_of_a_clip_is_the_mean_over_its_frames():
    trunk = foreign.LPIPS_TRUNKS["alex"]
    model = lpips.LPIPS(trunk, lpips.POOLS["alex"])
    source = foreign.weights(foreign.golden()["lpips"]["alex"]["shapes"])
    params = mapping.into(lpips_shapes(model), source, LPIPS_RULES)
    judges = published.Judges(lpips=Network(model, params))
    one, other = videos(2, size=40), videos(3, size=40)[:2]
    frames = jax.jit(model.apply)({"params": params}, *(v[0] / np.float32(127.5) - 1 for v in (one, other)))
    found = judges.lpips_distance(one, other, batch=4)
    assert found[0] == pytest.approx(float(np.mean(frames)), rel=1e-4)
    assert judges.lpips_distance(one, one) == pytest.approx([0, 0])
    with pytest.raises(ValueError, match="expected each with its original"):
        judges.lpips_distance(one, other[:1])


def test_digests_are_of_the_weights(judges):
    found = judges.digests()
    assert found.keys() == {"clip", "videomae"}
    params = {**judges.clip.params, "log_scale": judges.clip.params["log_scale"] + 1}
    other = dataclasses.replace(judges, clip=judges.clip._replace(params=params)).digests()
    assert other["videomae"] == found["videomae"] and other["clip"] != found["clip"]


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
