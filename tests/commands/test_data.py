# SPDX-License-Identifier: Apache-2.0
"""What `stvdm data` writes and says."""

import shlex

import numpy as np
import pytest
from PIL import Image

from stvdm import cli


def test_data_kinetic_shapes_writes_the_splits(stand_in):
    written = []
    stand_in(
        "stvdm.data.kinetic_shapes_tfds",
        KineticShapesConfig=dict,
        write=lambda folder, config: written.append((folder, config)),
    )
    assert cli.main(shlex.split("data kinetic_shapes --out d --num 100 --seed 4 --width 32")) == 0
    ((folder, config),) = written
    assert folder == "d"
    assert config["num_clips"] == {"train": 100, "validation": 5, "test": 5}
    assert (config["seed"], config["height"], config["width"], config["num_frames"]) == (4, 64, 32, 17)


@pytest.mark.parametrize("words", ["--fps=0", "--fps=nan", "--seed=-1"])
def test_data_kinetic_shapes_refuses_what_no_clip_has_before_it_begins(words, tmp_path, failure):
    error = failure("data", "kinetic_shapes", f"--out={tmp_path}/d", "--num=2", words)
    assert "expected a seed of at least 0, and fps above 0" in error
    assert not (tmp_path / "d").exists()


def test_data_check_prints_what_would_be_skipped(tmp_path, capsys):
    from stvdm.data import video

    for name, num_frames in (("long", 12), ("short", 3), ("silent", 12)):
        video.write_mp4(tmp_path / f"{name}.mp4", np.zeros((num_frames, 32, 32, 3), np.uint8), fps=8, min_side=32)
    (tmp_path / "long.txt").write_text("nothing moves")
    (tmp_path / "short.txt").write_text("nothing moves")
    assert cli.main(["data", "check", str(tmp_path), "--frames=9", "--fps=8"]) == 0
    report = capsys.readouterr().out
    assert "1 of 3 clips are used" in report
    assert "short.mp4: too short" in report and "silent.mp4: no caption" in report
    assert "pictures" not in report
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    (tmp_path / "still.txt").write_text("nothing moves")
    assert cli.main(["data", "check", str(tmp_path), "--frames=9", "--fps=8"]) == 0
    assert "1 of those used are pictures, which only buckets of 1 frame take" in capsys.readouterr().out
