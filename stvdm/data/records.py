# SPDX-License-Identifier: Apache-2.0
"""Examples on disk: ArrayRecord shards with an index, for ingested videos and for latents computed once.

    directory/
      00000.array_record   one msgpack map an example: arrays as {dtype, shape, data}; zstd, random access
      00000.json           count, digest, shapes, captions, origins of that shard; written last: no shard counts without
      ...
      index.npy            (num_examples, 3): frames, height, width of every clip, for its bucket
      metadata.json        kind, schema, count, shards, fingerprint, what the writer says of itself; written at the end

Files are written under another name and then renamed: what has its name is whole. Writing goes on where it stopped,
shard by shard.

    write_shard("out", 0, [{"video": video, "caption": "a dog runs"}]);  finish("out", num_shards=1)
    RecordSource("out").read(0)["caption"]

Encoding: https://github.com/google/array_record, https://msgpack.org.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from stvdm.data.video import BadVideo

VERSION = 2
FLOATS = ("latent", "text", "image_latent", "image_tokens")  # are read in float32, however they are stored


def encode(example: Mapping[str, Any]) -> bytes:
    """A flat map of arrays, strings, numbers and lists of them -> bytes."""
    return msgpack.packb({key: _pack(value) for key, value in example.items()})


def decode(record: bytes) -> dict[str, Any]:
    """The inverse of `encode`."""
    return {key: _unpack(value) for key, value in msgpack.unpackb(record).items()}


def write_shard(
    directory: str | os.PathLike,
    shard: int,
    examples: Iterable[Mapping[str, Any]],
    *,
    job: str = "",
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Write one shard whole, or not at all.

    Args:
      directory: made if it is not there.
      shard: its number, from 0.
      examples: each with "video" (T, H, W, 3), or with "latent" and "shape", the (frames, height, width) of the clip it
        came from; and with "origin", the number of what several of them are made of, if it is known.
      job: the fingerprint of what is being written; `finished_shards` asks for the same.
      skipped: name -> reason of what was left out; looked at after the last example, so `examples` may still add to it.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shard:05d}.array_record"
    digest, shapes, captions, origins, schema = hashlib.sha256(), [], [], [], {}
    unfinished = path.with_suffix(".array_record.unfinished")
    # group_size:1 is one record a block: reading one example decompresses no other.
    writer = ArrayRecordWriter(str(unfinished), "group_size:1,zstd:3")
    try:
        for example in examples:
            origins.append(example.get("origin"))
            example = {name: value for name, value in example.items() if name != "origin"}
            record = encode(example)
            writer.write(record)
            digest.update(record)
            shapes.append(_clip_shape(example))
            captions.append(example.get("caption", ""))
            schema = {key: _describe(value) for key, value in example.items()}
    finally:
        writer.close()
    unfinished.replace(path)
    sidecar = {"count": len(shapes), "sha256": digest.hexdigest(), "schema": schema, "job": job}
    sidecar |= {"skipped": dict(skipped or {}), "shapes": shapes, "captions": captions, "origins": origins}
    _write_json(path.with_suffix(".json"), sidecar)


def finished_shards(directory: str | os.PathLike, *, job: str = "") -> set[int]:
    """Numbers of the shards that are whole.

    Raises:
      ValueError: if one of them was written by another job, so that the two would mix.
    """
    finished = set()
    for path in Path(directory).glob("[0-9]*.json"):
        other = json.loads(path.read_text("utf-8"))["job"]
        if other != job:
            raise ValueError(
                f"directory={str(directory)!r}: {path.name} was written from other data or settings ({other}, "
                f"now {job}), so write to a new directory, or delete this one"
            )
        finished.add(int(path.stem))
    return finished


def finish(directory: str | os.PathLike, *, num_shards: int, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write index.npy and metadata.json once all shards are there; returns the metadata.

    Raises:
      ValueError: if a shard is missing, or there is no example.
    """
    folder = Path(directory)
    missing = [n for n in range(num_shards) if not (folder / f"{n:05d}.json").is_file()]
    if missing:
        raise ValueError(
            f"directory={str(directory)!r}: shards {missing} of {num_shards} are missing, so write them first"
        )
    sidecars = [json.loads((folder / f"{n:05d}.json").read_text("utf-8")) for n in range(num_shards)]
    shapes = np.asarray([shape for sidecar in sidecars for shape in sidecar["shapes"]], np.int32)
    if not len(shapes):
        raise ValueError(f"directory={str(directory)!r}: no example in it, so look at what was to be written")
    schema = next(sidecar["schema"] for sidecar in sidecars if sidecar["count"])
    digests = [sidecar["sha256"] for sidecar in sidecars]
    metadata = {
        "version": VERSION,
        "kind": "latent" if "latent" in schema else "video",
        "count": len(shapes),
        "schema": schema,
        "shards": [{"file": f"{n:05d}.array_record", "count": side["count"]} for n, side in enumerate(sidecars)],
        "fingerprint": hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16],
        "skipped": {name: reason for sidecar in sidecars for name, reason in sidecar["skipped"].items()},
        "about": dict(about or {}),
    }
    unfinished = _unfinished(folder / "index.npy")
    with unfinished.open("wb") as opened:
        np.save(opened, shapes)
    unfinished.replace(folder / "index.npy")
    _write_json(folder / "metadata.json", metadata)
    return metadata


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `finish` wrote of a directory.

    Raises:
      ValueError: if the directory is not finished, or of another version.
    """
    file = Path(path) / "metadata.json"
    if not file.is_file():
        there = "one that is not all written" if Path(path).exists() else "no such directory"
        raise ValueError(
            f"path={str(path)!r}: expected a directory with metadata.json, found {there}; "
            f"`stvdm preprocess --config=... --checkpoint=... --out={path}` writes it, and goes on where it stopped"
        )
    metadata = json.loads(file.read_text("utf-8"))
    if metadata["version"] != VERSION:
        raise ValueError(f"path={str(path)!r}: version {metadata['version']}, expected {VERSION}, so write it again")
    return metadata


class RecordSource:
    """What `write_shard` and `finish` wrote, as a source for the loader.

    Raises:
      ValueError: if the directory is not finished, or of another version.
    """

    def __init__(self, path: str | os.PathLike):
        folder = Path(path)
        self.metadata = read_metadata(path)
        self.path = folder
        self.kind: Literal["video", "latent"] = self.metadata["kind"]
        self.fingerprint: str = self.metadata["fingerprint"]
        self.shapes = np.load(folder / "index.npy")
        shards = [str(folder / shard["file"]) for shard in self.metadata["shards"] if shard["count"]]
        self._sidecars = [path.removesuffix(".array_record") + ".json" for path in shards]
        self._captions: list[str] = []  # read when first asked for
        self._records = ArrayRecordDataSource(shards)
        if not len(self._records) == len(self.shapes) == self.metadata["count"]:
            raise ValueError(
                f"path={str(path)!r}: {len(self._records)} records, not {self.metadata['count']} as in metadata.json, "
                "so write it again"
            )

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int, **unused: Any) -> dict[str, Any]:
        """The whole example: "video" uint8, or `FLOATS` as far as they are there, ...; BadVideo if it is damaged."""
        try:
            example = decode(self._records[index])
        except Exception as error:  # array_record and msgpack raise what they like
            raise BadVideo(f"damaged record: {error}", f"{self.path}[{index}]") from error
        floats: dict[str, Any] = {name: example[name].astype(np.float32) for name in FLOATS if name in example}
        return {**example, **floats}

    @property
    def origins(self) -> list[int] | None:
        """The number of what each example was made of: a video may be stored in several shapes. None: not known."""
        sidecars = (json.loads(Path(sidecar).read_text("utf-8")) for sidecar in self._sidecars)
        found = [origin for sidecar in sidecars for origin in sidecar.get("origins", [None])]
        return None if None in found else found

    def caption(self, index: int) -> str:
        if not self._captions:  # of all shards at once: decoding whole latents for their captions would take hours
            for sidecar in self._sidecars:
                self._captions += json.loads(Path(sidecar).read_text("utf-8"))["captions"]
        return self._captions[index]


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "data": value.tobytes()}
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])
    return value


def _describe(value: Any) -> Any:
    return {"dtype": str(value.dtype), "ndim": value.ndim} if isinstance(value, np.ndarray) else type(value).__name__


def _clip_shape(example: Mapping[str, Any]) -> list[int]:
    return [int(n) for n in (example["shape"] if "latent" in example else example["video"].shape[:3])]


def _unfinished(path: Path) -> Path:
    """Where to write what will be `path`: a name that no other host which finishes the same directory takes."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")


def _write_json(path: Path, content: Any) -> None:
    unfinished = _unfinished(path)
    unfinished.write_text(json.dumps(content), "utf-8")
    unfinished.replace(path)
