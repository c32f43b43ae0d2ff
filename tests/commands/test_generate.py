# SPDX-License-Identifier: Apache-2.0
"""What `stvdm generate` writes, asks for and refuses."""

import hashlib
import json
import shlex
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvdm import cli


@pytest.fixture
def generated(stand_in):
    noted = {}

    class Pipeline:
        @classmethod
        def load(cls, checkpoint, **more):
            noted["checkpoint"], noted["more"] = checkpoint, more
            return cls()

        def generate(self, prompts, *, num, progress, made, **settings):
            noted["settings"] = settings
            warnings.warn("clips of another size", stacklevel=1)
            for done in range(1, 4):
                progress(done, 3)
            asked = [(prompt, settings["seed"] + i) for prompt in prompts for i in range(num)]

            def result(first, last):
                return types.SimpleNamespace(
                    videos=np.zeros((last - first, 5, 16, 16, 3), np.uint8),
                    latents=np.arange(first * 4, last * 4, dtype=np.float32).reshape(-1, 1, 2, 2, 1),
                    prompts=[prompt for prompt, _ in asked[first:last]],
                    seeds=[seed for _, seed in asked[first:last]],
                    settings={"fps": 8.0, "steps": np.int64(30), "model_sha256": "ab"},
                )

            for i in range(len(asked)):
                if i == noted.get("fails_at"):
                    raise KeyboardInterrupt
                made(result(i, i + 1))
            return result(0, len(asked))

    stand_in("stvdm.sampling.pipeline", Pipeline=Pipeline)
    return noted


def test_generate_writes_clips_contact_sheet_and_what_makes_them_again(tmp_path, generated, capsys):
    command = ["generate", "A red ball!", "two", "--num", "2", "--seed", "7", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    stems = ["a-red-ball-7", "a-red-ball-8", "two-7", "two-8"]
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".mp4", ".gif", ".json")} | {"contact.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert generated["checkpoint"] is None  # the bundled one
    record = json.loads((tmp_path / "out" / "two-8.json").read_text())
    latent = np.arange(12, 16, dtype=np.float32)
    assert record["latent_sha256"] == hashlib.sha256(latent.tobytes()).hexdigest()
    assert (record["prompt"], record["seed"], record["steps"], record["model_sha256"]) == ("two", 8, 30, "ab")
    assert shlex.split(record["command"]) == ["stvdm", *command]
    assert {"jax", "stvdm", "python"} <= record["versions"].keys()
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "loading the model",
        "compiling",
        "stvdm: warning: clips of another size",
        "denoising 1/3",
        "denoising 3/3",
    ]
    assert captured.out.splitlines()[-1].endswith("contact.png")


def test_clips_of_one_name_do_not_overwrite_each_other(tmp_path, generated):
    assert cli.main(["generate", "a ball", "A ball!", "a ball", "?", f"--output={tmp_path}"]) == 0
    assert {path.stem for path in tmp_path.glob("*.mp4")} == {"a-ball-0", "a-ball-0-2", "a-ball-0-3", "clip-0"}


def test_clips_that_were_made_stay_when_a_later_one_is_not(tmp_path, generated, capsys):
    generated["fails_at"] = 2
    assert cli.main(["generate", "a red ball", "--num=3", f"--output={tmp_path}"]) == 130
    kept = {f"a-red-ball-{seed}.{kind}" for seed in (0, 1) for kind in ("mp4", "gif", "json")}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/a-red-ball-{seed}.mp4" for seed in (0, 1)]


def test_a_clip_that_is_half_written_has_no_name(tmp_path, generated, monkeypatch):
    def cut_short(path, *_, **__):
        Path(path).write_bytes(b"GIF89a")
        raise KeyboardInterrupt

    monkeypatch.setattr("stvdm.data.video.write_gif", cut_short)
    assert cli.main(["generate", "a red ball", f"--output={tmp_path}"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_earlier_clips_are_never_lost(tmp_path, generated, capsys):
    command = ["generate", "a red ball", f"--output={tmp_path}"]
    for _ in range(3):
        assert cli.main(command) == 0
        (tmp_path / "a-red-ball-0.gif").write_text("mine")
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"{tmp_path}/a-red-ball-0-3.mp4", f"{tmp_path}/contact-3.png"]
    stems = ["a-red-ball-0", "a-red-ball-0-2", "a-red-ball-0-3"]
    sheets = {"contact.png", "contact-2.png", "contact-3.png"}
    clips = {f"{stem}.{kind}" for stem in stems for kind in ("mp4", "gif", "json")}
    assert {path.name for path in tmp_path.iterdir()} == clips | sheets
    assert (tmp_path / "a-red-ball-0.gif").read_text() == "mine"


def test_where_clips_can_not_go_is_known_before_anything_is_computed(tmp_path, generated, failure, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["generate", "a red ball", f"--output={tmp_path}/file"]) == 1
    assert f"{tmp_path}/file" in capsys.readouterr().err
    assert "--output=gs://bucket/clips: expected a folder of this machine" in failure(
        "generate", "a red ball", "--output=gs://bucket/clips"
    )
    assert not generated


def test_a_prompt_without_quotes_is_no_prompt_for_each_word(tmp_path, generated, failure):
    said = failure("generate", "a", "red", "ball", f"--output={tmp_path}")
    assert "3 prompts" in said and 'write stvdm generate "a red ball"; ' in said
    assert "write" in failure("generate", "a red ball", "grows", "slowly")
    assert not generated
    assert cli.main(["generate", "sunset", "a red ball", "rain", f"--output={tmp_path}"]) == 0


def test_generate_passes_its_options_on_and_leaves_the_rest_to_the_checkpoint(tmp_path, generated):
    words = "generate x --steps 5 --guidance 2.5 --sampler dpm++ --frames 9 --height 32 --checkpoint runs/dit --output"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    assert generated["checkpoint"] == "runs/dit"
    assert generated["settings"] == {
        "steps": 5,
        "guidance": 2.5,
        "sampler": "dpm++",
        "seed": 0,
        "num_frames": 9,
        "height": 32,
        "width": None,
        "negative": None,
        "image": None,
        "guidance_low": None,
    }


def test_generate_reads_a_picture_and_what_should_not_be_seen(tmp_path, generated):
    pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    words = [
        "generate",
        "x",
        f"--output={tmp_path}",
        f"--image={tmp_path / 'first.png'}",
        "--negative",
        "blurred, grey",
    ]
    assert cli.main([*words, "--guidance-low=3"]) == 0
    np.testing.assert_array_equal(generated["settings"].pop("image"), pixels)
    assert generated["settings"]["negative"] == "blurred, grey"
    assert generated["settings"]["guidance_low"] == 3


def test_what_is_no_picture_is_refused(tmp_path, generated, failure):
    (tmp_path / "first.png").write_text("words")
    assert "first.png" in failure("generate", "x", f"--output={tmp_path}", f"--image={tmp_path / 'first.png'}")


def test_generate_takes_several_adapters_with_weights_and_a_tower(generated, tmp_path):
    words = ["generate", "x", f"--output={tmp_path}", "--lora=runs/a:0.5", "--lora=gs://b/c", "--tower=umt5"]
    assert cli.main([*words, "--image-tower=clip"]) == 0
    adapters = [("runs/a", 0.5), ("gs://b/c", 1.0)]
    assert generated["more"] == {"adapters": adapters, "tower": "umt5", "image_tower": "clip"}
