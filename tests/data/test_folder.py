# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from stvdm.data.folder import FolderSource, SkipReport


def test_every_bad_file_is_named_and_every_good_one_read(folder, coded):
    source = FolderSource(folder, fps=8, min_frames=17)
    assert source.report.num_found == len(coded.GOOD) + 1 + len(coded.BAD)
    assert set(source.report.skipped) == set(coded.BAD)
    assert len(source) == source.report.num_used == len(coded.GOOD) + 1
    assert source.names == sorted(source.names)
    for name, reason in (
        ("truncated.mp4", "truncated"),
        ("truncated.webm", "truncated"),
        ("empty.mp4", "empty file"),
        ("text.mp4", "not a video"),
        ("too_short.mp4", "too short: 0.25 s, and a clip of 17 frames at 8 per second is 2.12 s"),
        ("no_caption.mp4", "no caption: neither no_caption.txt nor"),
        ("absent.mp4", "named in the metadata, but not there"),
    ):
        assert source.report.skipped[name].startswith(reason)
        assert f"  {name}: {reason}" in str(source.report)
    assert json.loads(json.dumps(source.report.to_json()))["num_used"] == len(source)

    for index, name in enumerate(source.names):
        num_frames = 1 if name == "still.png" else 17
        example = source.read(index, num_frames=num_frames, height=32, width=32, rng=np.random.default_rng(index))
        assert example["video"].shape == (num_frames, 32, 32, 3)
        stem = name.split(".")[0].replace("_", " ")
        assert stem in example["caption"] or name in ("still.png", "Großes Bild.webm")


def test_moment_and_crop_come_from_the_generator_alone(folder, coded):
    source = FolderSource(folder, fps=8)
    index = source.names.index("h264.mp4")

    def read(seed):
        return source.read(index, num_frames=5, height=96, width=128, rng=np.random.default_rng(seed))["video"]

    np.testing.assert_array_equal(read(1), read(1))
    begins = [coded.bar_position(read(seed)[0]) for seed in range(12)]
    assert np.ptp(begins) > 0.3  # from anywhere in the clip


def test_fingerprint_follows_names_captions_and_rate(folder, tmp_path):
    def make(caption, fps):
        (tmp_path / "a.mp4").write_bytes((folder / "h264.mp4").read_bytes())
        (tmp_path / "a.txt").write_text(caption)
        return FolderSource(tmp_path, fps=fps).fingerprint

    assert make("one", 8) == make("one", 8)
    assert len({make("one", 8), make("two", 8), make("one", 12)}) == 3


def test_csv_and_folders_below(folder, tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("below/a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((folder / "hevc.mp4").read_bytes())
    (tmp_path / "metadata.csv").write_text('file_name,text\nbelow/a.mp4,"a bar, white"\n./b.mp4,another\n', "utf-8")
    source = FolderSource(tmp_path, fps=8)
    assert dict(zip(source.names, source.captions, strict=True)) == {"b.mp4": "another", "below/a.mp4": "a bar, white"}


def test_captions_may_begin_with_the_mark_of_an_editor(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes((folder / "hevc.mp4").read_bytes())
    (tmp_path / "a.txt").write_text("a bar", "utf-8-sig")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.mp4,another\n", "utf-8-sig")
    assert FolderSource(tmp_path, fps=8).captions == ["a bar", "another"]


def test_clips_that_the_metadata_names_are_found_behind_links_and_elsewhere(folder, tmp_path):
    clips, elsewhere = tmp_path / "clips", tmp_path / "elsewhere"
    for place in (clips, elsewhere):
        place.mkdir()
        (place / "a.mp4").write_bytes((folder / "hevc.mp4").read_bytes())
    (clips / "linked").symlink_to(elsewhere)
    names = ["a.mp4", "linked/a.mp4", "../elsewhere/a.mp4", str(elsewhere / "a.mp4")]
    (clips / "metadata.jsonl").write_text("".join(f'{{"file_name": "{name}", "text": "a bar"}}\n' for name in names))
    source = FolderSource(clips, fps=8)
    assert source.names == sorted(names), str(source.report)
    assert source.read(3, num_frames=2, height=8, width=8, rng=np.random.default_rng(0))["video"].shape == (2, 8, 8, 3)


def test_a_codec_that_nobody_decodes_and_a_suffix_that_nobody_knows_are_named(folder, tmp_path):
    good = (folder / "h264.mp4").read_bytes()
    assert good.count(b"avc1") >= 1
    (tmp_path / "good.mp4").write_bytes(good)
    (tmp_path / "strange.mp4").write_bytes(good.replace(b"avc1", b"zzzz"))
    (tmp_path / "clip.rmvb").write_bytes(good)
    names = ("good.mp4", "strange.mp4", "clip.rmvb")
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{name}", "text": "a bar"}}\n' for name in names))
    source = FolderSource(tmp_path, fps=8)
    assert source.names == ["good.mp4"]
    assert "codec" in source.report.skipped["strange.mp4"]
    assert source.report.skipped["clip.rmvb"].startswith(".rmvb: not one of .3g2")


def test_errors_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of videos"):
        FolderSource(tmp_path / "nowhere", fps=8)
    with pytest.raises(ValueError, match=r"no usable video.*\n0 of 0 clips"):
        FolderSource(tmp_path, fps=8)
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"0 of 1 clips are used; 1 are not:\n  a.mp4: empty file"):
        FolderSource(tmp_path, fps=8)
    with pytest.raises(ValueError, match="fps=0: expected above 0"):
        FolderSource(tmp_path, fps=0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "x"}\n{"file": 1}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, entry 2: .*expected file_name and text"):
        FolderSource(tmp_path, fps=8)
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1: expected JSON"):
        FolderSource(tmp_path, fps=8)


def test_reports_add_up():
    one, other = SkipReport(3, {"a": "empty file"}), SkipReport(2)
    other.replaced("b", "gone")
    other.replaced("b", "gone")
    one.merge(other)
    assert (one.num_found, one.num_used, one.num_replaced) == (5, 4, {"b": 2})
    assert str(one).splitlines() == [
        "4 of 5 clips are used; 1 are not:",
        "  a: empty file",
        "2 times another was read in place of:",
        "  b (2 times): gone",
    ]
