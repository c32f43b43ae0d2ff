# SPDX-License-Identifier: Apache-2.0
"""Video files in and out, by PyAV (FFmpeg in a wheel: nothing has to be installed on the system).

Reading resamples by timestamps: frame k of a clip is the one on screen at `start + k / fps`, whatever the file's own
rate, constant or variable. Frames come out upright (the display matrix of phones is applied), with square pixels,
scaled to cover (height, width) and cropped.

    info = probe("clip.mov")                                                  # frames, seconds, fps, size; or BadVideo
    video = read_video("clip.mov", num_frames=17, fps=8, height=64, width=64) # uint8 (17, 64, 64, 3)
    write_mp4("out.mp4", video, fps=8); write_gif("out.gif", video, fps=8)

The container format is found by the file's first bytes and pinned, so that bytes are never opened as a playlist or by a
guess of FFmpeg's. Images (PNG, JPEG, WebP) are videos of one frame.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import ExifTags, Image, ImageDraw, ImageFont

from stvdm.data import transforms

File = str | os.PathLike | bytes

# Titles and comments in another encoding are no reason to refuse a file. PyAV 19 sees to that by itself.
_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
_ON_TIME = (
    2e-3  # seconds a frame may come late and still count as on screen; Matroska rounds times to whole milliseconds
)
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED of libavutil


class BadVideo(ValueError):
    """A file that can't be used. `reason` says why in a few words, `name` which one."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name

    def __reduce__(self) -> tuple:  # crosses process boundaries
        return type(self), (self.reason, self.name)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may ask of us before it is refused."""

    num_bytes: int = 4 << 30
    num_frames: int = 500_000
    num_pixels: int = 8192 * 4608  # of one frame
    seconds: float = 4 * 3600.0


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` found: size in pixels as shown (upright, square pixels), seconds, mean frames per second."""

    num_frames: int
    height: int
    width: int
    seconds: float
    fps: float
    codec: str
    container: str


def probe(file: File, *, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Walk through all packets (read, not decoded) and decode the first frame. Raises BadVideo with the reason."""
    with _open(file, limits) as (container, stream):
        first, times, ends, corrupt = None, [], [], 0
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            corrupt += packet.is_corrupt
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.is_discard:  # decoded, never shown: an edit list leaves it out
                continue
            time = packet.pts if packet.pts is not None else packet.dts
            times.append(0 if time is None else time)
            ends.append(times[-1] + (packet.duration or 0))
            if len(times) > limits.num_frames:
                raise BadVideo(f"more than {limits.num_frames} frames")
        if first is None:
            first = next(iter(stream.codec_context.decode(None)), None)
        if first is None or not times:
            raise BadVideo("no frame in it can be decoded")
        _check_frame(first, limits)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        base = float(stream.time_base or 0)
        step = max(ends) - max(times) or (1 / rate / base if base else 0)
        seconds = (max(times) + step - min(times)) * base or len(times) / rate
        if seconds > limits.seconds:
            raise BadVideo(f"{seconds:.0f} s long: the limit is {limits.seconds:.0f} s")
        promised = _promised_seconds(container, stream, rate, min(times) * base)
        if corrupt or promised * 0.9 > seconds + 1 / rate:
            whole = f" of {promised:.2f} s" if promised > 0 else ""
            raise BadVideo(f"truncated: {len(times) - corrupt} frames, {seconds:.2f} s, are left{whole}")
        height, width = _shown_size(first, stream.sample_aspect_ratio)
        if _transposes(_display_matrix(first, file)):
            height, width = width, height
        return VideoInfo(
            len(times), height, width, seconds, len(times) / seconds, stream.codec_context.name, container.format.name
        )


def read_video(
    file: File,
    *,
    num_frames: int,
    fps: float | None = None,
    start: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    position: tuple[float, float] = (0.5, 0.5),
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """One clip, uint8 (num_frames, height, width, 3).

    Args:
      file: a path, or the bytes of a file.
      num_frames: frames of the clip.
      fps: frames per second of the clip; None takes the file's mean rate.
      start: seconds into the video.
      height, width: pixels; the video is scaled to cover them and cropped. None keeps the size it has.
      position: of the crop: (0.5, 0.5) is the centre, (0, 0) the top left corner.
      limits: beyond which a file is refused.

    Raises:
      BadVideo: if it can't be opened or decoded, or ends before the clip does.
    """
    with _open(file, limits) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        wanted = start + np.arange(num_frames) / (fps or rate)
        scaler, ratio = VideoReformatter(), stream.sample_aspect_ratio
        clip: list[np.ndarray] = []
        shown, shown_array = None, None
        for frame, time in _frames_from(container, stream, start, rate, limits):
            while shown is not None and len(clip) < num_frames and wanted[len(clip)] < time - _ON_TIME:
                if shown_array is None:
                    shown_array = _to_array(shown, file, scaler, ratio, height, width, position)
                clip.append(shown_array)
            if len(clip) == num_frames:
                break
            shown, shown_array = frame, None
            end = time + (float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / rate)
        if shown is None:
            raise BadVideo("no frame in it can be decoded")
        while len(clip) < num_frames and wanted[len(clip)] < max(end, time + 1 / (fps or rate)) - _ON_TIME / 2:
            shown_array = (
                _to_array(shown, file, scaler, ratio, height, width, position) if shown_array is None else shown_array
            )
            clip.append(shown_array)
        if len(clip) < num_frames:
            raise BadVideo(f"too short: ends at {end:.2f} s, and the clip needs {wanted[-1]:.2f} s")
        if len({frame.shape for frame in clip}) > 1:
            raise BadVideo("frames change size on the way; give height and width")
        return np.stack(clip)


def write_mp4(path: str | os.PathLike, video_THWC: np.ndarray, *, fps: float, min_side: int = 256) -> None:
    """H.264 in yuv420p, which every player shows. Small clips are enlarged by a whole factor, pixels sharp."""
    video = enlarge(video_THWC, min_side)
    H, W = video.shape[1:3]
    if H % 2 or W % 2:  # 4:2:0 has half the colour samples each way
        video = np.pad(video, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("h264", rate=_fraction(fps), options={"crf": "16", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        # Said, since players take what says nothing for BT.709 where it is large: as FFmpeg makes these of RGB.
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG
        for frame in video:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_gif(path: str | os.PathLike | IO[bytes], video_THWC: np.ndarray, *, fps: float, min_side: int = 128) -> None:
    """An endless GIF, each frame with its own 256 colours, chosen so that what is small keeps its colour too."""
    few = functools.partial(
        Image.Image.quantize, colors=256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
    )
    frames = [few(Image.fromarray(frame)) for frame in enlarge(video_THWC, min_side)]
    # GIF counts hundredths of a second: round the running time, not the steps, so that the length stays right.
    ticks = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)
    frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=(np.diff(ticks) * 10).tolist(), loop=0
    )


def contact_sheet(
    videos: Sequence[np.ndarray], captions: Sequence[str], *, num_frames: int = 9, min_side: int = 96
) -> Image.Image:
    """A picture to look many clips over: a row each, evenly chosen frames from first to last, the caption above."""
    if len(videos) != len(captions):
        raise ValueError(
            f"captions={len(captions)}: expected one for each of the {len(videos)} videos, so pass as many"
        )
    gap, font = 4, ImageFont.load_default(14)
    rows = []
    for video, caption in zip(videos, captions, strict=True):
        chosen = np.unique(np.round(np.linspace(0, len(video) - 1, min(num_frames, len(video)))).astype(int))
        frames = np.pad(enlarge(video[chosen], min_side), ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
        row = frames.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3)
        lines = textwrap.wrap(caption, max(10, row.shape[1] // 8)) or [""]
        rows.append((row, lines))
    width = max(row.shape[1] for row, _ in rows) + gap
    heights = [row.shape[0] + 18 * len(lines) + gap for row, lines in rows]
    sheet = Image.new("RGB", (width, sum(heights) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for (row, lines), height in zip(rows, heights, strict=True):
        draw.multiline_text((gap, y), "\n".join(lines), fill="black", font=font)
        sheet.paste(Image.fromarray(row), (gap, y + 18 * len(lines)))
        y += height
    return sheet


def side_by_side(
    videos: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 4, min_side: int = 128
) -> np.ndarray:
    """One video of many clips of one shape, in rows of ``columns``, each with its caption above: for `write_gif`."""
    if len(videos) != len(captions) or len({video.shape for video in videos}) != 1:
        raise ValueError(
            f"{len(videos)} videos of shapes {sorted({video.shape for video in videos})} and {len(captions)} captions: "
            "expected videos of one shape, and a caption for each."
        )
    gap, font = 6, ImageFont.load_default(12)
    clips = [enlarge(video, min_side) for video in videos]
    num_frames, height, width, _ = clips[0].shape
    words = [textwrap.wrap(caption, max(10, width // 7)) or [""] for caption in captions]
    starts = range(0, len(clips), columns)
    above = [15 * max(map(len, words[start : start + columns])) for start in starts]  # of each row
    bottom = gap + sum(above) + len(above) * (height + gap)
    sheet = Image.new("RGB", (gap + columns * (width + gap), bottom), "white")
    draw, y, corners = ImageDraw.Draw(sheet), gap, []
    for start, room in zip(starts, above, strict=True):
        for column, lines in enumerate(words[start : start + columns]):
            x = gap + column * (width + gap)
            draw.multiline_text((x, y + room - 15 * len(lines)), "\n".join(lines), fill="black", font=font, spacing=1)
            corners.append((x, y + room))
        y += room + height + gap
    frames = np.repeat(np.asarray(sheet)[None], num_frames, axis=0)
    for (x, y), clip in zip(corners, clips, strict=True):
        frames[:, y : y + height, x : x + width] = clip
    return frames


def enlarge(video_THWC: np.ndarray, min_side: int) -> np.ndarray:
    """Repeat pixels by the whole factor that brings the shorter side nearest to `min_side`; never shrinks."""
    factor = max(1, round(min_side / min(video_THWC.shape[1:3])))
    return video_THWC.repeat(factor, axis=1).repeat(factor, axis=2)


# --- opening ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(file: File, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """(container, first video stream); whatever FFmpeg raises inside becomes a BadVideo with the file's name."""
    name = "" if isinstance(file, bytes) else os.fspath(file)
    try:
        size = len(file) if isinstance(file, bytes) else Path(file).stat().st_size
        if size == 0:
            raise BadVideo("empty file")
        if size > limits.num_bytes:
            raise BadVideo(f"{size} bytes: the limit is {limits.num_bytes}")
        if isinstance(file, bytes):
            head, target = file[:512], io.BytesIO(file)
        else:
            with open(file, "rb") as opened:
                head = opened.read(512)
            target = "file:" + os.path.abspath(file)  # type: ignore[assignment]  # never another protocol
        with av.open(target, "r", format=_container_format(head), **_METADATA) as container:
            if not container.streams.video:
                raise BadVideo("no video stream in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadVideo("no decoder for its codec")
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > limits.num_pixels:
                raise BadVideo(f"frames of {pixels} pixels: the limit is {limits.num_pixels}")
            stream.codec_context.thread_count = 1  # the loader has processes; threads within each would only compete
            yield container, stream
    except BadVideo as error:
        raise BadVideo(error.reason, name) from error.__cause__
    except (av.FFmpegError, OSError) as error:
        raise BadVideo(f"can't be decoded: {error.strerror or error}", name) from error


def _container_format(head: bytes) -> str:
    """FFmpeg's name of the demuxer for these first bytes."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WEBP": "webp_pipe"}.get(head[8:12]) or _unknown(head)
    if head[:1] + head[188:189] == b"GG" or head[4:5] + head[196:197] == b"GG":  # cameras put a time before each packet
        return "mpegts"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"GIF8", "gif"),
        (b"FLV\x01", "flv"),
        (b"OggS", "ogg"),
        (b"\x00\x00\x01\xba", "mpeg"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
        (b"\x06\x0e\x2b\x34\x02\x05\x01\x01", "mxf"),
        (b"\x89PNG", "png_pipe"),
        (b"\xff\xd8\xff", "jpeg_pipe"),
    ):
        if head.startswith(magic):
            return name
    return _unknown(head)


def _unknown(head: bytes) -> str:
    raise BadVideo(f"not a video: begins with {head[:8]!r}, which is no container we know")


# --- decoding --------------------------------------------------------------------------------------------------------


def _frames_from(
    container: Any, stream: Any, start: float, rate: float, limits: Limits
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with their times in seconds, beginning at or before `start`."""
    origin = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    if start > 1.0:  # nearer than that, decoding is as quick
        with contextlib.suppress(av.FFmpegError):
            container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
            frame = next(container.decode(stream), None)
            if frame is not None and frame.time is not None and frame.time - origin <= start:
                yield from _timed(_chain(frame, container.decode(stream)), origin, rate, limits)
                return
        container.seek(0)  # no index, or one that lies: from the beginning then
    yield from _timed(container.decode(stream), origin, rate, limits)


def _chain(frame: av.VideoFrame, rest: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    yield frame
    yield from rest


def _timed(
    frames: Iterator[av.VideoFrame], origin: float, rate: float, limits: Limits
) -> Iterator[tuple[av.VideoFrame, float]]:
    for count, frame in enumerate(frames):
        if count >= limits.num_frames:
            raise BadVideo(f"more than {limits.num_frames} frames")
        _check_frame(frame, limits)
        time = count / rate if frame.time is None else frame.time - origin
        if time > limits.seconds:
            raise BadVideo(f"longer than {limits.seconds:.0f} s")
        yield frame, time


def _check_frame(frame: av.VideoFrame, limits: Limits) -> None:
    if frame.width * frame.height > limits.num_pixels:
        raise BadVideo(f"a frame of {frame.width * frame.height} pixels: the limit is {limits.num_pixels}")
    if frame.is_corrupt:
        raise BadVideo("a damaged frame in it")


def _to_array(
    frame: av.VideoFrame,
    file: File,
    scaler: VideoReformatter,
    ratio: Any,
    height: int | None,
    width: int | None,
    position: tuple[float, float],
) -> np.ndarray:
    """uint8 (height, width, 3): scaled by FFmpeg while still in its own colours, then turned upright and cropped."""
    matrix = _display_matrix(frame, file)
    shown_height, shown_width = _shown_size(frame, ratio)
    if height is None or width is None:
        size = shown_height, shown_width
    else:
        target = (width, height) if _transposes(matrix) else (height, width)
        size = transforms.cover_size(shown_height, shown_width, *target)
    how = "AREA" if size[0] < frame.height else "BICUBIC"
    # One thread: FFmpeg would start as many as there are cores for every single frame.
    has_alpha = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
    colours = "rgba" if has_alpha else "rgb24"
    # Large frames that do not say how their colours were coded are taken for BT.709, as players do; FFmpeg does not.
    is_large = frame.width >= 1280 or frame.height > 576
    scaled = scaler.reformat(
        frame,
        width=size[1],
        height=size[0],
        format=colours,
        src_colorspace=Colorspace.ITU709 if is_large and frame.colorspace == _UNSPECIFIED else None,
        interpolation=how,
        threads=1,
    )
    pixels = scaled.to_ndarray()
    upright = _upright(_on_white(pixels) if has_alpha else pixels, matrix)[None]
    if height is not None and width is not None:
        upright = transforms.crop(upright, height, width, position=position)
    return np.ascontiguousarray(upright[0])


def _on_white(pixels_HWC: np.ndarray) -> np.ndarray:
    """What is transparent shows white, as on a page. Where nothing would show at all, alpha is a byte left empty."""
    colours, alpha = pixels_HWC[..., :3], pixels_HWC[..., 3:].astype(np.uint16)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8) if alpha.any() else colours


def _shown_size(frame: av.VideoFrame, ratio: Any) -> tuple[int, int]:
    """(height, width) of the stored frame once its pixels, now of this aspect ratio, are square."""
    return frame.height, max(1, round(frame.width * float(ratio))) if ratio else frame.width


# The display matrices of EXIF's orientations.
_ORIENTED = {
    1: [[1, 0], [0, 1]],
    2: [[-1, 0], [0, 1]],
    3: [[-1, 0], [0, -1]],
    4: [[1, 0], [0, -1]],
    5: [[0, 1], [1, 0]],
    6: [[0, 1], [-1, 0]],
    7: [[0, -1], [-1, 0]],
    8: [[0, -1], [1, 0]],
}


def _display_matrix(frame: av.VideoFrame, file: File) -> np.ndarray:
    """The 2 x 2 part [[a, b], [c, d]] of the display matrix: x' = a x + c y, y' = b x + d y (libavutil/display.h)."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it lies what PyAV has no name for, as the EXIF of a photograph, which Pillow reads
        opened = io.BytesIO(file) if isinstance(file, bytes) else file
        # Pillow raises what it likes of broken EXIF; then PyAV's angle, which knows no mirrors, must do
        with contextlib.suppress(Exception), Image.open(opened, formats=("JPEG", "PNG", "WEBP")) as picture:
            return np.asarray(_ORIENTED[picture.getexif().get(ExifTags.Base.Orientation, 1)])
        turn = math.radians(frame.rotation)
        return np.asarray([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    if data is None:
        return np.eye(2)
    return np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65536.0


def _transposes(matrix: np.ndarray) -> bool:
    return abs(matrix[0, 1]) > abs(matrix[0, 0])


def _upright(pixels_HWC: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply the display matrix, to the nearest of the eight ways to lay a picture down."""
    (a, b), (c, d) = matrix
    if _transposes(matrix):
        pixels_HWC, a, d = pixels_HWC.transpose(1, 0, 2), c, b
    return pixels_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _promised_seconds(container: Any, stream: Any, rate: float, first: float) -> float:
    """What the file says of its own length, counted from the time of its first frame; 0 where it says nothing."""
    if container.format.name == "mov":  # of the frames that it holds an edit list may leave some out
        return float((stream.duration or 0) * stream.time_base)
    with contextlib.suppress(ValueError):  # Matroska writes when each track ends as a tag, "00:00:02.500000000"
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
        return 3600 * hours + 60 * minutes + seconds - first
    return stream.frames / rate  # in AVI some of them may be empty: the one before stays


def _fraction(fps: float) -> Any:
    from fractions import Fraction

    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps}: expected above 0, so give e.g. 8")
    return Fraction(fps).limit_denominator(1001)
