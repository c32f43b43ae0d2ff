# SPDX-License-Identifier: Apache-2.0
"""A folder of real coded files, made on the spot: the codecs, containers and accidents that one meets in the wild.

    make_folder("clips")                   # or: python tests/data/coded_files.py clips

Every good clip shows the same scene: a white bar that moves from the left edge to the right edge in `seconds`, over a
red upper and a blue lower half. So the picture tells the time (`bar_position`) and which way is up.
"""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Coded:
    """How to code one file."""

    name: str
    codec: str
    size: tuple[int, int] = (96, 128)  # height, width, as shown
    fps: float = 24.0
    seconds: float = SECONDS
    pixel_format: str = "yuv420p"
    rotation: int = 0  # degrees counter-clockwise, in the display matrix
    times: str = "constant"  # or "variable"
    options: tuple[tuple[str, str], ...] = ()


GOOD = (
    Coded("h264.mp4", "h264"),
    Coded("h264_b_frames.mkv", "h264", options=(("bf", "3"), ("g", "24"))),
    Coded("h264_odd.mkv", "h264", size=(71, 93), pixel_format="yuv444p"),
    Coded("h264_25fps.mov", "h264", fps=25.0),
    Coded("hevc.mp4", "hevc", options=(("x265-params", "log-level=error"),)),
    Coded("hevc_10bit.mkv", "hevc", pixel_format="yuv420p10le", options=(("x265-params", "log-level=error"),)),
    Coded("vp9.webm", "libvpx-vp9", size=(72, 128), options=(("deadline", "realtime"), ("cpu-used", "8"))),
    Coded("vp9_odd.webm", "libvpx-vp9", size=(75, 101), options=(("deadline", "realtime"), ("cpu-used", "8"))),
    Coded("av1.mp4", "libsvtav1", options=(("preset", "12"),)),
    Coded("av1.webm", "libsvtav1", options=(("preset", "12"),)),
    Coded("mjpeg.avi", "mjpeg", fps=15.0, pixel_format="yuvj420p"),
    Coded("mpeg4.avi", "mpeg4", fps=30.0),
    Coded("rotated_90.mp4", "h264", size=(128, 96), rotation=90),
    Coded("rotated_180.mov", "h264", rotation=180),
    Coded("rotated_270.mp4", "hevc", size=(160, 90), rotation=270, options=(("x265-params", "log-level=error"),)),
    Coded("variable_rate.mp4", "h264", times="variable"),
    Coded("variable_rate.mkv", "h264", times="variable"),
    Coded("portrait.mp4", "h264", size=(160, 90)),
)
BAD = ("truncated.mp4", "truncated.webm", "empty.mp4", "text.mp4", "too_short.mp4", "no_caption.mp4", "absent.mp4")


def make_folder(directory: str | Path) -> Path:
    """Write all files with captions, in sidecars and in metadata.jsonl. 18 clips and an image are good, 7 are not."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, coded in enumerate(GOOD):
        write_clip(folder / coded.name, coded)
        caption = f"a white bar moves to the right, {coded.name.split('.')[0].replace('_', ' ')}"
        if number % 2:
            (folder / coded.name).with_suffix(".txt").write_text(caption + "\n", "utf-8")
        else:
            lines.append(f'{{"file_name": "{coded.name}", "text": "{caption}"}}\n')
    (folder / "vp9.webm").rename(folder / "Großes Bild.webm")
    lines = [line.replace('"vp9.webm"', '"Großes Bild.webm"') for line in lines]
    Image.fromarray(scene(0.5, 96, 128)).save(folder / "still.png")
    (folder / "still.txt").write_text("a white bar in the middle", "utf-8")

    whole = folder / "whole"
    write_clip(whole, Coded("", "h264", options=(("movflags", "+faststart"),)), container="mp4")
    (folder / "truncated.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    write_clip(whole, Coded("", "libvpx-vp9", options=(("deadline", "realtime"), ("cpu-used", "8"))), container="webm")
    (folder / "truncated.webm").write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    whole.unlink()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("#EXTM3U\nhttp://127.0.0.1/not-a-video\n" * 20, "utf-8")
    write_clip(folder / "too_short.mp4", Coded("", "h264", seconds=0.25))
    write_clip(folder / "no_caption.mp4", Coded("", "h264"))
    for name in BAD:
        if name != "no_caption.mp4":
            lines.append(f'{{"file_name": "{name}", "text": "a white bar moves to the right"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
    return folder


def scene(when: float, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) at `when` in [0, 1]: red above, blue below, a white bar at that part of the width."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2] = (200, 30, 30)
    frame[height // 2 :] = (30, 30, 200)
    centre = when * (width - 1)
    frame[:, np.abs(np.arange(width) - centre) <= 0.06 * width] = 255
    return frame


def bar_position(frame_HWC: np.ndarray) -> float:
    """Where the white bar is, as a part of the width: inverts `scene` while no edge cuts the bar (0.1 to 0.9)."""
    green = np.clip(frame_HWC[:, :, 1].astype(float).mean(0) - 80, 0, None)
    return float((green * np.arange(len(green))).sum() / green.sum() / (len(green) - 1))


def write_clip(path: Path, coded: Coded, *, container: str | None = None) -> None:
    """Code one file, in a thread that then ends.

    SVT-AV1, as root, gives the thread that calls it a real-time priority and fails to take it back. Whatever that one
    starts afterwards inherits it, and two busy threads of it keep two cores from everything else, for ever.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_write_clip, path, coded, container).result()


def _write_clip(path: Path, coded: Coded, container: str | None) -> None:
    height, width = coded.size
    stored = (width, height) if coded.rotation % 180 else (height, width)
    options = dict(coded.options)
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    count = round(coded.seconds * coded.fps)
    ticks = np.arange(count) / coded.fps
    if coded.times == "variable":  # long and short steps in turn, between 1/48 and 1/8 of a second
        steps = np.resize([1 / 48, 1 / 8, 1 / 24, 1 / 16], 10 * count)
        ticks = np.concatenate([[0.0], np.cumsum(steps)])
        ticks = ticks[ticks < coded.seconds]
    with av.open(str(path), "w", format=container, options=movflags) as out:
        # AVI knows no times, only a rate.
        base = Fraction(1, 4800) if coded.times == "variable" else 1 / Fraction(coded.fps).limit_denominator(1001)
        stream = out.add_stream(coded.codec, rate=Fraction(coded.fps).limit_denominator(1001), options=options)
        stream.height, stream.width = stored
        stream.pix_fmt, stream.time_base = coded.pixel_format, base
        stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        if coded.rotation:
            stream.set_display_rotation(coded.rotation)
        for tick in ticks:
            # The player turns the stored picture counter-clockwise, so it is stored turned clockwise.
            pixels = np.rot90(scene(tick / SECONDS, height, width), -coded.rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(tick / base), base
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


if __name__ == "__main__":
    print(make_folder(sys.argv[1]))
