# SPDX-License-Identifier: Apache-2.0
"""Decoding by content: the bar tells the time, the halves tell which way is up."""

import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from stvdm.data import video as video_files
from stvdm.data.video import BadVideo, Limits, contact_sheet, probe, read_video, side_by_side, write_gif, write_mp4

CLIPS = [
    *"h264.mp4 h264_b_frames.mkv h264_odd.mkv h264_25fps.mov hevc.mp4 hevc_10bit.mkv vp9_odd.webm".split(),
    *"av1.mp4 av1.webm mjpeg.avi mpeg4.avi rotated_90.mp4 rotated_180.mov rotated_270.mp4".split(),
    *("variable_rate.mp4", "variable_rate.mkv", "portrait.mp4", "Großes Bild.webm"),
]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_on_screen_at_the_asked_times(name, folder, coded):
    file = next((f for f in coded.GOOD if f.name == name), None)
    height, width = file.size if file else (72, 128)
    info = probe(folder / name)
    assert (info.height, info.width) == (height, width)  # upright
    assert info.seconds == pytest.approx(coded.SECONDS, abs=0.03)

    for fps in (8, 5):
        clip = read_video(folder / name, num_frames=11, fps=fps, start=0.4)
        assert clip.shape == (11, height, width, 3)
        assert clip.dtype == np.uint8
        lag = (0.4 + np.arange(11) / fps) / coded.SECONDS - [coded.bar_position(frame) for frame in clip]
        longest = 1 / 8 if "variable" in name else 1 / (file.fps if file else 24)
        # A frame stays on screen until the next one: never early, never later than the longest step between frames.
        assert lag.min() > -0.008
        assert lag.max() < longest / coded.SECONDS + 0.008
        assert np.abs(clip[:, 4, -6:].mean((0, 1)) - (200, 30, 30)).max() < 12  # red above ...
        assert np.abs(clip[:, -4, -6:].mean((0, 1)) - (30, 30, 200)).max() < 12  # ... blue below


def test_variable_rate_shows_the_very_frame_of_each_moment(folder, coded):
    ticks = np.concatenate([[0.0], np.cumsum(np.resize([1 / 48, 1 / 8, 1 / 24, 1 / 16], 200))])
    wanted = 0.41 + np.arange(16) / 8
    on_screen = [ticks[ticks <= time][-1] / coded.SECONDS for time in wanted]
    clip = read_video(folder / "variable_rate.mp4", num_frames=16, fps=8, start=0.41)
    np.testing.assert_allclose([coded.bar_position(frame) for frame in clip], on_screen, atol=0.006)


@pytest.mark.parametrize("start", [1.2, 1.7])
def test_seeking_lands_on_the_same_frames_as_reading_through(folder, start):
    whole = read_video(folder / "h264_b_frames.mkv", num_frames=72, fps=24)
    first = round(start * 24)
    clip = read_video(folder / "h264_b_frames.mkv", num_frames=10, fps=24, start=first / 24)
    np.testing.assert_array_equal(clip, whole[first : first + 10])


def test_covers_and_crops_at_the_position(folder):
    left, right = (
        read_video(folder / "h264.mp4", num_frames=1, fps=8, start=1.45, height=48, width=32, position=(0.5, x))
        for x in (0.0, 1.0)
    )
    assert left.shape == right.shape == (1, 48, 32, 3)
    whole = read_video(folder / "h264.mp4", num_frames=1, fps=8, start=1.45, height=48, width=64)
    np.testing.assert_array_equal(left, whole[:, :, :32])
    np.testing.assert_array_equal(right, whole[:, :, 32:])


@pytest.mark.parametrize(
    "matrix, turned",
    [  # as stored by phones; (a, b, c, d) with x' = a x + c y, y' = b x + d y
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # held upright: shown turned clockwise
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((-1, 0, 0, 1), np.fliplr),  # front camera
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ],
)
def test_every_display_matrix(tmp_path, matrix, turned):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32] = (250, 0, 0)
    stored[:16, 32:] = (0, 250, 0)
    stored[16:, :32] = (0, 0, 250)
    with av.open(str(tmp_path / "turned.mp4"), "w") as out:
        stream = out.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        a, b, c, d = (65536 * n for n in matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(stored)), *stream.encode()]:
            out.mux(packet)
    shown = read_video(tmp_path / "turned.mp4", num_frames=1)[0]
    assert shown.shape == turned(stored).shape
    centres = [(slice(h, None, shown.shape[0] // 2), slice(w, None, shown.shape[1] // 2)) for h in (8,) for w in (8,)]
    np.testing.assert_allclose(shown[centres[0]], turned(stored)[centres[0]], atol=12)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    with av.open(str(tmp_path / "wide.mp4"), "w") as out:
        stream = out.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for packet in [*stream.encode(av.VideoFrame(64, 48, "yuv420p")), *stream.encode()]:
            out.mux(packet)
    assert (probe(tmp_path / "wide.mp4").height, probe(tmp_path / "wide.mp4").width) == (48, 128)
    assert read_video(tmp_path / "wide.mp4", num_frames=1).shape == (1, 48, 128, 3)


def test_bytes_read_as_the_file_does(folder):
    data = (folder / "hevc.mp4").read_bytes()
    assert probe(data) == probe(folder / "hevc.mp4")
    options = {"num_frames": 5, "fps": 8, "start": 1.5, "height": 32, "width": 32}
    np.testing.assert_array_equal(read_video(data, **options), read_video(folder / "hevc.mp4", **options))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("truncated.mp4", "truncated: 3 frames"),
        ("truncated.webm", "truncated"),
        ("empty.mp4", "empty file"),
        ("text.mp4", "not a video: begins with b'#EXTM3U"),
        ("absent.mp4", "No such file"),
    ],
)
def test_bad_files_say_why(folder, name, reason):
    with pytest.raises(BadVideo) as caught:
        probe(folder / name)
    assert reason in caught.value.reason
    assert str(folder / name) in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # it has to come home from a worker
    assert (again.reason, again.name) == (caught.value.reason, caught.value.name)


def test_an_mp4_cut_before_its_index_and_noise_are_bad(folder, tmp_path):
    data = (folder / "hevc.mp4").read_bytes()  # its index is at the end
    with pytest.raises(BadVideo, match="can't be decoded"):
        probe(data[: len(data) // 2])
    with pytest.raises(BadVideo):
        read_video(data[:40] + bytes(4000), num_frames=1)


def test_too_short_and_limits_are_refused(folder):
    with pytest.raises(BadVideo, match=r"too short: ends at 3.00 s, and the clip needs 3.9"):
        read_video(folder / "h264.mp4", num_frames=25, fps=8, start=0.99)
    for limits, reason in (
        (Limits(num_bytes=1000), "bytes: the limit is 1000"),
        (Limits(num_pixels=1000), "pixels: the limit is 1000"),
        (Limits(num_frames=10), "more than 10 frames"),
        (Limits(seconds=1.0), "s long: the limit is 1 s"),
    ):
        with pytest.raises(BadVideo, match=reason):
            probe(folder / "h264.mp4", limits=limits)
    with pytest.raises(BadVideo, match="more than 10 frames"):
        read_video(folder / "h264.mp4", num_frames=24, fps=8, limits=Limits(num_frames=10))


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (300, 210)])
def test_mp4_shows_what_was_written(tmp_path, coded, size):
    video = np.stack([coded.scene(when, *size) for when in np.linspace(0.2, 0.8, 7)])
    write_mp4(tmp_path / "out.mp4", video, fps=7.5)
    info = probe(tmp_path / "out.mp4")
    factor = max(1, round(256 / min(size)))
    assert info.codec == "h264"
    assert (info.num_frames, info.fps) == (7, pytest.approx(7.5))
    assert (info.height, info.width) == tuple(n * factor + n * factor % 2 for n in size)
    back = read_video(tmp_path / "out.mp4", num_frames=7)
    expected = video_files.enlarge(video, 256)
    difference = np.abs(back[:, : expected.shape[1], : expected.shape[2]].astype(int) - expected)
    assert difference.mean() < 4


def test_gif_keeps_pixels_and_running_time(tmp_path, coded):
    video = np.stack([coded.scene(when, 64, 64) for when in np.linspace(0.2, 0.8, 9)])
    write_gif(tmp_path / "out.gif", video, fps=8)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 9
        assert gif.info["loop"] == 0
        durations = []
        for k in range(9):
            gif.seek(k)
            durations.append(gif.info["duration"])
            np.testing.assert_array_equal(np.asarray(gif.convert("RGB"))[::2, ::2], video[k])
    assert sum(durations) == pytest.approx(9 / 8 * 1000, abs=10)


def test_gif_keeps_the_colour_of_small_things(tmp_path):
    ramp = np.linspace(0, 255, 512)[:, None, None] * np.ones((1, 512, 3)) * np.linspace(0.8, 1, 512)[:, None]
    frame = np.clip(ramp + np.random.default_rng(0).normal(0, 4, ramp.shape), 0, 255).astype(np.uint8)
    for i, colour in enumerate(
        COLOURS := [(230, 210, 40), (40, 210, 220), (210, 40, 40), (50, 60, 230), (220, 50, 210)]
    ):
        frame[40 * i : 40 * i + 12, :12] = colour
    write_gif(tmp_path / "out.gif", frame[None].repeat(2, axis=0), fps=8, min_side=1)
    shown = np.asarray(Image.open(tmp_path / "out.gif").convert("RGB")).astype(int)
    for i, colour in enumerate(COLOURS):
        assert np.abs(shown[40 * i + 5, 5] - colour).max() < 25


def test_clips_side_by_side_move_each_in_its_place():
    clips = [np.full((3, 32, 48, 3), 10 * i, np.uint8) for i in range(5)]
    clips[4][1] = 200
    together = side_by_side(
        clips, ["red", "green", "blue", "", "a much longer caption than the others have here"], columns=2
    )
    assert together.shape[0] == 3
    assert together.shape[2] == 6 + 2 * (48 * 4 + 6)
    changed = np.argwhere((together[1] != together[0]).any(-1))
    assert changed[:, 1].max() < 6 + 48 * 4 and len(changed) == 128 * 192, "only the fifth clip changes, in its place"
    with pytest.raises(ValueError, match="a caption for each"):
        side_by_side(clips, ["one"])
    with pytest.raises(ValueError, match="of one shape"):
        side_by_side([clips[0], clips[0][:2]], ["one", "two"])


def test_contact_sheet_has_the_frames_and_the_words(coded):
    clips = [np.stack([coded.scene(when, 32, 32) for when in np.linspace(0.2, 0.8, n)]) for n in (17, 3)]
    sheet = np.asarray(contact_sheet(clips, ["a bar moves", "another, of only three frames"], num_frames=5))
    blank = np.asarray(contact_sheet(clips, ["", ""], num_frames=5))
    assert sheet.shape == blank.shape
    assert (sheet != blank).any(-1).sum() > 100  # the words
    first = np.kron(clips[0][0], np.ones((3, 3, 1), np.uint8))
    windows = [sheet[y : y + 96, 4 : 4 + 96] for y in range(40)]
    assert any(np.array_equal(window, first) for window in windows)
    with pytest.raises(ValueError, match="captions=1: expected one for each of the 2 videos"):
        contact_sheet(clips, ["one"])


def test_titles_in_another_encoding_are_no_reason_to_refuse(folder, tmp_path):
    with av.open(str(tmp_path / "titled.mkv"), "w") as out, av.open(str(folder / "h264.mp4")) as source:
        out.metadata["title"] = "GrXXe"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / "titled.mkv").read_bytes()
    assert b"GrXXe" in data
    assert probe(data.replace(b"GrXXe", b"Gr\xf6\xdfe")).num_frames == 72
