# SPDX-License-Identifier: Apache-2.0
"""Decoding by content: the bar tells the time, the halves tell which way is up."""

import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps

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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path, suffix, orientation):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32] = (250, 0, 0)
    stored[16:, :32] = (0, 0, 250)
    file, exif = tmp_path / f"photo.{suffix}", Image.Exif()
    exif[0x112] = orientation  # as cameras write it, beside much else
    Image.fromarray(stored).save(file, exif=exif, quality=95)
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    shown = read_video(file, num_frames=1)[0]
    assert (probe(file).height, probe(file).width) == shown.shape[:2] == expected.shape[:2]
    assert np.abs(shown.astype(int) - expected).mean() < 4
    np.testing.assert_array_equal(read_video(file.read_bytes(), num_frames=1)[0], shown)


@pytest.mark.parametrize("how", [{"suffix": "png"}, {"suffix": "webp", "lossless": True, "exact": True}])
def test_what_is_transparent_is_white(tmp_path, how):
    file, drawing = tmp_path / f"drawing.{how.pop('suffix')}", np.zeros((32, 32, 4), np.uint8)
    drawing[8:24, 8:24, 3] = 255  # black on nothing, below which black lies too
    drawing[8:16, 8:24, :3] = (200, 100, 50)
    drawing[4, 4] = (0, 0, 0, 128)
    Image.fromarray(drawing).save(file, **how)
    shown = read_video(file, num_frames=1)[0]
    for place, colour in (((0, 0), 255), ((12, 12), (200, 100, 50)), ((20, 12), 0), ((4, 4), 127)):
        np.testing.assert_array_equal(shown[place], colour)


def test_indexed_pictures_have_transparent_colours_too(tmp_path):
    indices = np.zeros((32, 32), np.uint8)
    indices[8:24, 8:24] = 1
    drawing = Image.fromarray(indices).convert("P")
    drawing.putpalette([0, 0, 0, 20, 20, 20])
    drawing.save(tmp_path / "drawing.png", transparency=0)
    shown = read_video(tmp_path / "drawing.png", num_frames=1)[0]
    assert (shown[0, 0].tolist(), shown[16, 16].tolist()) == ([255] * 3, [20] * 3)


def test_an_alpha_that_nobody_set_hides_nothing(tmp_path):
    with av.open(str(tmp_path / "screen.avi"), "w") as out:
        stream = out.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgra"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.broadcast_to(np.uint8([10, 20, 30, 0]), (32, 32, 4)).copy(), "bgra")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert read_video(tmp_path / "screen.avi", num_frames=2)[1, 5, 5].tolist() == [30, 20, 10]


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    with av.open(str(tmp_path / "wide.mp4"), "w") as out:
        stream = out.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for packet in [*stream.encode(av.VideoFrame(64, 48, "yuv420p")), *stream.encode()]:
            out.mux(packet)
    assert (probe(tmp_path / "wide.mp4").height, probe(tmp_path / "wide.mp4").width) == (48, 128)
    assert read_video(tmp_path / "wide.mp4", num_frames=1).shape == (1, 48, 128, 3)


@pytest.mark.parametrize(
    "suffix, codec, container, options",
    [("mts", "h264", "mpegts", {"mpegts_m2ts_mode": "1"}), ("mxf", "mpeg2video", "mxf", {})],
)
def test_containers_of_cameras(tmp_path, coded, suffix, codec, container, options):
    file, size = tmp_path / f"clip.{suffix}", (96, 128)
    with av.open(str(file), "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for tick in range(50):
            for packet in stream.encode(av.VideoFrame.from_ndarray(coded.scene(tick / 50, *size))):
                out.mux(packet)
        out.mux(stream.encode())
    assert (probe(file).num_frames, probe(file).seconds) == (50, pytest.approx(2, abs=0.01))
    shown = read_video(file, num_frames=3, fps=5, start=1.2)
    np.testing.assert_allclose([coded.bar_position(frame) for frame in shown], [0.6, 0.7, 0.8], atol=0.03)


def remux(source, target, *, later=0.0):
    """The packets of a file in another, so much later; what then begins before 0 is left out of an MP4, not lost."""
    with av.open(str(source)) as into, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as out:
        stream = into.streams.video[0]
        copied = out.add_stream_from_template(stream)
        for packet in into.demux(stream):
            if packet.dts is not None:
                packet.pts += round(later / stream.time_base)
                packet.dts += round(later / stream.time_base)
                packet.stream = copied
                out.mux(packet)


@pytest.mark.parametrize("cut", [0.5, 2.25])  # before and after the second of the key frames, one a second
def test_of_a_file_that_was_cut_without_coding_it_anew_what_is_shown_counts(tmp_path, coded, cut):
    coded.write_clip(tmp_path / "whole.mp4", coded.Coded("", "h264", options=(("g", "24"),)))
    remux(tmp_path / "whole.mp4", tmp_path / "cut.mp4", later=-cut)
    left = coded.SECONDS - cut
    assert probe(tmp_path / "cut.mp4").seconds == pytest.approx(left, abs=0.1)
    assert probe(tmp_path / "cut.mp4").num_frames == pytest.approx(24 * left, abs=2)
    shown = read_video(tmp_path / "cut.mp4", num_frames=3, fps=8, start=0.2)
    expected = (cut + 0.2 + np.arange(3) / 8) / coded.SECONDS
    np.testing.assert_allclose([coded.bar_position(frame) for frame in shown], expected, atol=0.03)


@pytest.mark.parametrize("name", ["variable_rate.mp4", "vp9_odd.webm"])
def test_a_piece_of_a_recording_that_keeps_its_times_is_whole(folder, tmp_path, name):
    remux(folder / name, tmp_path / "piece.mkv", later=10.0)
    assert probe(tmp_path / "piece.mkv").seconds == pytest.approx(probe(folder / name).seconds, abs=0.01)
    clips = [read_video(path, num_frames=4, fps=8, start=1.3) for path in (folder / name, tmp_path / "piece.mkv")]
    np.testing.assert_array_equal(*clips)


def test_an_avi_with_empty_frames_is_whole(tmp_path, coded):
    coded.write_clip(tmp_path / "clip.mkv", coded.Coded("", "mpeg4", fps=8.0))
    with av.open(str(tmp_path / "clip.mkv")) as into, av.open(str(tmp_path / "clip.avi"), "w") as out:
        stream = into.streams.video[0]
        copied = out.add_stream_from_template(stream)
        copied.time_base = copied.codec_context.time_base = Fraction(1, 24)  # so two of three are empty
        for packet in into.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    assert probe(tmp_path / "clip.avi").num_frames == 24
    assert probe(tmp_path / "clip.avi").seconds == pytest.approx(3, abs=0.2)


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


def test_mp4_says_how_its_colours_were_made(tmp_path):
    write_mp4(tmp_path / "out.mp4", np.broadcast_to(np.uint8([200, 60, 30]), (2, 720, 1280, 3)), fps=8)
    with av.open(str(tmp_path / "out.mp4")) as file:
        frame = next(file.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (Colorspace.ITU601, ColorRange.MPEG)  # 2, 0: nothing is said
    assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - [200, 60, 30]).max() <= 3


@pytest.mark.parametrize(
    ("size", "standard"), [((720, 1280), "ITU709"), ((1280, 720), "ITU709"), ((480, 832), "ITU601")]
)
def test_colours_that_nothing_is_said_of_are_those_that_players_show(tmp_path, size, standard):
    colour = np.uint8([200, 60, 30])
    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("h264", rate=8)
        (stream.height, stream.width), stream.pix_fmt = size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (*size, 3)).copy())
        coded = frame.reformat(format="yuv420p", dst_colorspace=standard)
        coded.colorspace = 2  # unspecified
        for packet in [*stream.encode(coded), *stream.encode()]:
            out.mux(packet)
    for to in ({}, {"height": 64, "width": 64}):
        shown = read_video(tmp_path / "clip.mp4", num_frames=1, **to)
        assert np.abs(shown.astype(int) - colour).max() <= 4
    Image.fromarray(np.broadcast_to(colour, (*size, 3)).copy()).save(tmp_path / "still.png")
    assert (read_video(tmp_path / "still.png", num_frames=1) == colour).all()


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
