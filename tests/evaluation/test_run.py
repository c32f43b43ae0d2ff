# SPDX-License-Identifier: Apache-2.0
"""The evaluation as a whole: its columns, its conditions, and what it refuses to report."""

import json

import numpy as np
import pytest

from stvdm import checkpoint
from stvdm.evaluation import physics, run


@pytest.fixture
def kinetic_model(tiny_model, tmp_path):
    """The tiny model with the whole vocabulary of kinetic shapes (its embedding grows; the new words are random)."""
    from stvdm.data.kinetic_shapes import sample_scene
    from stvdm.models.text_encoders import collect_words

    params, description = checkpoint.load_model(tiny_model)
    words = collect_words(sample_scene(0, i, split="test").caption for i in range(40))
    random, (_, width) = np.random.default_rng(1), params["text"]["words"].shape
    params["text"]["words"] = random.normal(size=(len(words) + 3, width)).astype(np.float32)
    description["config"]["text"].update(words=list(words), max_tokens=48)
    checkpoint.save_model(tmp_path / "kinetic", params, description)
    return tmp_path / "kinetic"


def test_a_model_of_noise_is_told_apart_from_real_clips(kinetic_model, tmp_path, capsys):
    report = run.main(kinetic_model, num=5, batch=2, steps=2, output=tmp_path / "out" / "results.json")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["conditions"]["steps"] == 2
    assert written["conditions"]["model_sha256"]
    cells = written["items"]["all_right"]
    assert cells["generated"]["mean"] == 0.0
    assert cells["generated"]["num"] == 5
    assert sum(cell["num"] for cell in written["all_right_by_things"].values()) == 5
    assert (tmp_path / "out" / "results.png").exists()
    assert (tmp_path / "out" / "results.gif").exists()
    assert "all_right" in capsys.readouterr().out


def test_an_item_that_real_clips_fail_is_not_reported():
    def row(mean, num=100):
        return physics.Row(mean, mean - 0.01, mean + 0.01, num)

    sure = {item: row(1.0) for item in physics.ITEMS}
    doubtful = {**sure, "shape": row(0.9), "occlusion": row(float("nan"), 0)}
    items = run.table({"generated": sure, "reconstructed": sure, "real": doubtful})
    assert items["shape"] == {"not_reported": "real clips score 0.900, below 0.95"}
    assert items["colour"]["generated"]["mean"] == 1.0
    assert "occlusion" not in items  # no prompt asked for it
    report = {"items": items, "reconstruction": dict(psnr_db=1, ssim=0, excess_flicker=0), "flicker": {}}
    text = run.as_text({**report, "all_right_by_things": {2: dict(mean=0.5, low=0.25, high=0.75, num=8)}})
    assert "of 2 things 0.500 [0.250, 0.750] (8)" in text
    assert "shape               not reported" in text


def test_prompts_do_not_change_with_their_number():
    from stvdm.data.kinetic_shapes import sample_scene

    few = [sample_scene(0, i, split="test").caption for i in range(3)]
    assert few == [sample_scene(0, i, split="test").caption for i in range(9)][:3]


def test_reconstruction_measures_what_they_say():
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    same = run.reconstruction(video, video)
    assert same["psnr_db"] > 100
    assert same["ssim"] == pytest.approx(1, abs=1e-5)
    noisy = np.clip(video.astype(int) + 20 * (-1) ** np.arange(5)[None, :, None, None, None], 0, 255).astype(np.uint8)
    assert run.reconstruction(noisy, video)["psnr_db"] < 25
