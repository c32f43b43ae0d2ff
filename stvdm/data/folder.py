# SPDX-License-Identifier: Apache-2.0
"""Your own videos: a folder of video files (and images) with captions, as a source for the loader.

    clips/                       clips/
      dog.mp4                      metadata.jsonl     {"file_name": "dog.mp4", "text": "a dog runs"}
      dog.txt   "a dog runs"       dog.mp4            or metadata.csv with the columns file_name,text

Every file is looked at once, when the source is made: all packets are read, the first frame decoded. What can't be used
is left out, counted, and named with its reason; what breaks later, while training, is replaced by the next good file
and counted too.

    source = FolderSource("clips", fps=8, min_frames=17)
    print(source.report)         # 13 of 16 clips are used; 3 are not: ...
    source.read(0, num_frames=17, height=64, width=64, rng=np.random.default_rng(0))["caption"]
"""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stvdm.data.video import DEFAULT_LIMITS, BadVideo, Limits, VideoInfo, probe, read_video

VIDEO_SUFFIXES = frozenset(
    (
        ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .vob .3gp .3g2 .flv .f4v .ogv .wmv .asf .mxf "
        ".gif .png .jpg .jpeg .webp"
    ).split()
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclasses.dataclass
class SkipReport:
    """What was left out, and why.

    Attributes:
      num_found: files looked at.
      skipped: name -> reason, of files never used.
      num_replaced: name -> how often reading it failed later, so that another was read in its place.
      reasons: name -> the last reason of those.
    """

    num_found: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    num_replaced: dict[str, int] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_used(self) -> int:
        return self.num_found - len(self.skipped)

    @property
    def replacements(self) -> dict[str, Any]:
        """What grows while it is read, as JSON, of which another report can be made."""
        return {"num_replaced": dict(self.num_replaced), "reasons": dict(self.reasons)}

    def replaced(self, name: str, reason: str) -> None:
        """Count one failure while reading."""
        self.num_replaced[name] = self.num_replaced.get(name, 0) + 1
        self.reasons[name] = reason

    def merge(self, other: "SkipReport") -> None:
        self.num_found += other.num_found
        self.skipped.update(other.skipped)
        self.reasons.update(other.reasons)
        for name, count in other.num_replaced.items():
            self.num_replaced[name] = self.num_replaced.get(name, 0) + count

    def to_json(self) -> dict[str, Any]:
        return {"num_used": self.num_used, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.num_used} of {self.num_found} clips are used"]
        if self.skipped:
            lines[0] += f"; {len(self.skipped)} are not:"
            lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        if self.num_replaced:
            lines.append(f"{sum(self.num_replaced.values())} times another was read in place of:")
            lines += [f"  {name} ({n} times): {self.reasons[name]}" for name, n in self.num_replaced.items()]
        return "\n".join(lines)


class FolderSource:
    """A folder of captioned videos.

    Args:
      path: the folder; files in folders below it count too.
      fps: frames per second that clips are read at; a file with fewer repeats frames.
      min_frames: a video shorter than this many frames at `fps` is left out (images never are). By default nothing is
        too short, and each file goes to the buckets that it is long enough for.
      limits: beyond which a file is refused.

    Raises:
      ValueError: if no file can be used; the message lists the reasons.
    """

    kind: Literal["video"] = "video"

    def __init__(self, path: str | os.PathLike, *, fps: float, min_frames: int = 1, limits: Limits = DEFAULT_LIMITS):
        self.path, self.fps, self.limits = Path(path), fps, limits
        if not self.path.is_dir():
            raise ValueError(f"path={str(path)!r}: expected a folder of videos, so check it (`--config.data.path`)")
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps={fps}: expected above 0, so give the rate that clips are to be read at, e.g. 8")
        captions = _read_captions(self.path)
        below = (str(file.relative_to(self.path)) for file in self.path.rglob("*") if not file.name.startswith("."))
        found = sorted(
            name
            for name in {*below, *captions}  # what captions name may lie behind a link, or elsewhere
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and (self.path / name).is_file()
        )
        others = sorted(captions.keys() - set(found))
        not_used = {
            name: f"{Path(name).suffix or 'no suffix'}: not one of {' '.join(sorted(VIDEO_SUFFIXES))}"
            if (self.path / name).is_file()
            else "named in the metadata, but not there"
            for name in others
        }
        self.report = SkipReport(len(found) + len(not_used), not_used)
        self.names: list[str] = []
        self.captions: list[str] = []
        self.infos: list[VideoInfo] = []
        looked_at = functools.partial(_look_at, self.path, captions, fps, min_frames, limits)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # FFmpeg lets go of the interpreter lock
            for name, result in zip(found, pool.map(looked_at, found), strict=True):
                if isinstance(result, str):
                    self.report.skipped[name] = result
                    continue
                self.names.append(name)
                self.captions.append(result[0])
                self.infos.append(result[1])
        if not self.names:
            raise ValueError(
                f"path={str(path)!r}: no usable video in it, so add some, each with a caption (`clip.txt` beside "
                f"`clip.mp4`, or metadata.jsonl or .csv with file_name and text).\n{self.report}"
            )
        self.shapes = [(_frames_at(info, fps), info.height, info.width) for info in self.infos]
        identity = [fps, self.names, self.captions, [(self.path / name).stat().st_size for name in self.names]]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, *, num_frames: int, height: int, width: int, rng: np.random.Generator) -> dict[str, Any]:
        """A clip from a random moment, with a random crop; raises BadVideo if the file can't be read (any more)."""
        name, info = self.names[index], self.infos[index]
        spare = max(0.0, info.seconds - num_frames / self.fps)
        start = 0.0 if info.num_frames == 1 else float(rng.uniform(0, spare))
        try:
            video = read_video(
                self.path / name,
                num_frames=num_frames,
                fps=self.fps,
                start=start,
                height=height,
                width=width,
                position=(float(rng.uniform()), float(rng.uniform())),
                limits=self.limits,
            )
        except BadVideo as error:
            raise BadVideo(error.reason, name) from error
        return {"video": video, "caption": self.captions[index]}

    def caption(self, index: int) -> str:
        return self.captions[index]


def _look_at(
    path: Path, captions: Mapping[str, str], fps: float, min_frames: int, limits: Limits, name: str
) -> tuple[str, VideoInfo] | str:
    """(caption, info) of a usable file, or the reason why it is none."""
    try:
        info = probe(path / name, limits=limits)
        frames = _frames_at(info, fps)
        if info.num_frames > 1 and frames < min_frames:
            clip = f"{min_frames} frames at {fps:g} per second is {min_frames / fps:.2f} s"
            return f"too short: {info.seconds:.2f} s, and a clip of {clip}"
        sidecar = (path / name).with_suffix(".txt")
        caption = captions.get(name, "")
        if not caption and sidecar.is_file():
            caption = sidecar.read_text("utf-8-sig")  # as the metadata: editors on Windows begin with a mark
    except BadVideo as error:
        return error.reason
    except (OSError, UnicodeDecodeError) as error:
        return f"can't be read: {error}"
    caption = " ".join(caption.split())
    return (caption, info) if caption else f"no caption: neither {sidecar.name} nor a line of metadata.jsonl or .csv"


def _frames_at(info: VideoInfo, fps: float) -> int:
    """Frames at `fps` that a video has; its last one is shown until its end. An image is one."""
    return 1 if info.num_frames == 1 else max(1, math.floor(info.seconds * fps + 1e-2))


def _read_captions(path: Path) -> dict[str, str]:
    """file_name -> text, from metadata.jsonl or metadata.csv, where there is one."""
    captions: dict[str, str] = {}
    for file in (path / name for name in METADATA_FILES):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix == ".csv":
                rows: list[Any] = list(csv.DictReader(opened))
            else:
                rows = [_parse(line, file, number) for number, line in enumerate(opened, 1) if line.strip()]
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or "text" not in row:
                raise ValueError(f"{file}, entry {number}: {row!r}: expected file_name and text, so name both")
            captions[os.path.normpath(row["file_name"])] = str(row["text"] or "")
    return captions


def _parse(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: expected JSON, so mend that line ({error})") from None
