# SPDX-License-Identifier: Apache-2.0
"""Latents and text computed once, so that training need run neither the autoencoder nor a tower that reads captions or
looks at first frames: shard by shard, resumable at any moment, by one host or by many.

    source, buckets  ->  clips in a fixed order  ->  encode, read  ->  records.write_shard ... finish

For each bucket, every example that fits it gives `clips_per_example` clips, their moment and crop drawn from (seed,
example, clip). The order is fixed, so a shard is a pure function of its number, and a run that was cut short goes on
with the first shard that is missing.

    about = preprocess(encode, FolderSource("clips", fps=8), "latents", buckets=[(17, 64, 64)], batch_size=16, seed=0)
    loader = make_loader(RecordSource("latents"), buckets=[(17, 64, 64, 32)], seed=0)      # batches hold "latent"

`encode` takes uint8 (B, T, H, W, 3) and gives latent means (B, t, h, w, z); that of `stvdm.commands.preprocess` holds a
trained model. Text is stored without padding: most captions are far shorter than what a tower can read. A network that
begins with an image is given the latent of a clip's first frame followed by grey ones; of that only the first latent
frame is the clip's own, so it is encoded and stored as well.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from stvdm.data import buckets as bucketing
from stvdm.data import loader, records
from stvdm.data.folder import SkipReport
from stvdm.data.video import BadVideo

Encode = Callable[[np.ndarray], np.ndarray]
Read = Callable[[Sequence[str]], tuple[Any, np.ndarray]]  # captions -> (text_BSE, mask_BS)
Look = Callable[[Sequence[np.ndarray]], Any]  # images_HWC -> image_BSE
Clip = tuple[bucketing.Bucket, int, int]  # bucket, example, number of the clip among those of its example


class Encoders(NamedTuple):
    """What makes of clips what is stored; see `preprocess`."""

    encode: Encode
    read: Read | None
    begin: Encode | None
    look: Look | None


def preprocess(
    encode: Encode,
    source: loader.Source,
    directory: str | os.PathLike,
    *,
    buckets: Sequence[Any],
    read: Read | None = None,
    begin: Encode | None = None,
    look: Look | None = None,
    host: tuple[int, int] = (0, 1),
    seed: int = 0,
    batch_size: int = 16,
    examples_per_shard: int = 512,
    clips_per_example: int = 1,
    dtype: str = "float16",
    num_threads: int = 4,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    wait: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Encode all of `source` into `directory`; returns the metadata it wrote, with what was "skipped" and why.

    Args:
      encode: uint8 video_BTHWC -> latent_Bthwz, the means, not normalised. Always called with whole batches of one
        bucket, so that it
        compiles once a bucket: the last batch of a shard is filled up by repeating its last clip.
      source: of videos.
      directory: new, or one in which this very call was cut short.
      buckets: the clip shapes to write; see `stvdm.data.buckets`. Their batch sizes and weights play no part.
      read: captions -> (text_BSE, mask_BS), e.g. a `towers.Reader`; what is real of it is stored as "text". None: none.
      begin: as ``encode``, but of the first frames and grey ones behind them; stored as "image_latent". None: none.
      look: first frames, bytes (H, W, 3) -> image_BSE, e.g. a `towers.Looker`; stored as "image_tokens". None: none.
      host: (i, n): this is host i of n that write to one directory, and makes every n-th shard. Whichever finds all
        shards made writes the metadata; the others return {}, or `wait`.
      seed: of moments and crops.
      batch_size: clips a call of `encode`.
      examples_per_shard: clips a shard, which is what is lost when the run is cut short.
      clips_per_example: clips made of every example, each with another moment and crop.
      dtype: of the latents on disk: "float16" halves the bytes, with an error of about 0.05 %; "float32".
      num_threads: threads that read; FFmpeg lets go of the interpreter lock.
      about: what made the latents (checkpoint, its digest ...). Part of the identity of the directory.
      on_progress: called with (clips done, clips in all) after every shard.
      wait: called again and again, a pause each time, until the other hosts have made their shards too. None: this
        host does not wait for them.

    Raises:
      ValueError: if `directory` holds other data or settings, no clip can be read, nor `loader.MAX_REPLACEMENTS` in a
        row, or a latent is not finite.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}: expected 'float16' or 'float32', so choose one of them")
    if not 0 <= host[0] < host[1]:
        raise ValueError(f"host={host}: expected (i, n) with 0 <= i < n, so count hosts from 0")
    if "://" in str(directory):
        raise ValueError(
            f"directory={str(directory)!r}: expected a folder, as shards are written and read as files; mount the "
            "bucket, e.g. with gcsfuse, and give the folder where it is mounted"
        )
    if source.kind != "video":
        raise ValueError(f"source.kind={source.kind!r}: these are latents already, so give the source of the videos")
    # The weights and batch sizes say nothing about what is written: leave them out of its identity.
    parsed = tuple(dataclasses.replace(bucket, batch_size=None, weight=1.0) for bucket in bucketing.parse(buckets))
    bucketing.validate(parsed, global_batch=batch_size)
    clips: list[Clip] = [
        (bucket, int(example), clip)
        for bucket, members in zip(parsed, loader.members_of([source], parsed), strict=True)
        for example in members
        for clip in range(clips_per_example)
    ]
    identity = [
        source.fingerprint,
        [bucket.shape for bucket in parsed],
        [seed, examples_per_shard, clips_per_example, dtype],
        dict(about or {}),
    ]
    job = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    num_shards = math.ceil(len(clips) / examples_per_shard)
    finished = records.finished_shards(directory, job=job)
    encoders = Encoders(encode, read, begin, look)
    with ThreadPoolExecutor(num_threads) as pool:
        for shard in range(host[0], num_shards, host[1]):
            chosen = clips[shard * examples_per_shard : (shard + 1) * examples_per_shard]
            if shard not in finished:
                skipped: dict[str, str] = {}
                latents = _encoded(encoders, source, chosen, seed, batch_size, dtype, pool, skipped)
                records.write_shard(directory, shard, latents, job=job, skipped=skipped)
            on_progress(shard * examples_per_shard + len(chosen), len(clips))
    while len(records.finished_shards(directory, job=job)) < num_shards:  # other hosts are still at work
        if wait is None:
            return {}
        wait()
    report = getattr(source, "report", SkipReport(num_found=len(source))).to_json()
    said = {**(about or {}), "source": source.fingerprint, "source_report": report, "seed": seed, "dtype": dtype}
    if hasattr(source, "fps"):
        said["fps"] = source.fps
    return records.finish(directory, num_shards=num_shards, about=said)


def _encoded(
    encoders: Encoders,
    source: loader.Source,
    clips: Sequence[Clip],
    seed: int,
    batch_size: int,
    dtype: str,
    pool: ThreadPoolExecutor,
    skipped: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Latent examples of one shard; while a batch is encoded the next one is read."""

    def load(clip: Clip) -> dict[str, Any] | BadVideo:
        bucket, example, number = clip
        rng = np.random.default_rng([seed, *bucket.shape, example, number])
        try:
            return {**loader.read_clip(source, example, bucket, rng), "origin": example}
        except BadVideo as error:
            return BadVideo(error.reason, error.name or f"example {example}")

    groups = [list(group) for _, group in itertools.groupby(clips, key=lambda clip: clip[0])]
    batches = [group[k : k + batch_size] for group in groups for k in range(0, len(group), batch_size)]
    ahead, in_a_row = [pool.submit(load, clip) for clip in batches[0]], 0
    for following in [*batches[1:], []]:
        current, ahead = ahead, [pool.submit(load, clip) for clip in following]
        examples = []
        for result in (future.result() for future in current):
            if not isinstance(result, BadVideo):
                in_a_row = 0
                examples.append(result)
                continue
            skipped[result.name] = result.reason  # counted and named, and the rest goes on
            in_a_row += 1
            if in_a_row == loader.MAX_REPLACEMENTS:  # a disk that is gone: no empty shard is to count as made
                raise ValueError(
                    f"{in_a_row} clips in a row could not be read, the last as {result}: look at the data, and give "
                    "the same command again to go on."
                )
        if examples:
            yield from _encode_batch(encoders, examples, batch_size, dtype)


def _encode_batch(
    encoders: Encoders, batch: Sequence[dict[str, Any]], batch_size: int, dtype: str
) -> Iterator[dict[str, Any]]:
    filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
    videos = np.stack([example["video"] for example in filled])
    made: dict[str, Any] = {"latent": np.asarray(encoders.encode(videos), np.float32)}
    if encoders.begin is not None:
        made["image_latent"] = np.asarray(encoders.begin(videos), np.float32)
    if encoders.look is not None:
        made["image_tokens"] = np.asarray(encoders.look(list(videos[:, 0])), np.float32)
    if encoders.read is not None:
        text_BSE, mask_BS = encoders.read([example["caption"] for example in filled])
        rows = zip(np.asarray(text_BSE, np.float32), mask_BS, strict=True)
        made["text"] = [text_SE[mask_S] for text_SE, mask_S in rows]
    for i, example in enumerate(batch):
        stored = {}
        for name, values in made.items():
            value = values[i]
            with np.errstate(over="ignore"):  # told below, with what to do
                stored[name] = value.astype(dtype)
            if not np.isfinite(stored[name]).all():
                maker = "the autoencoder" if "latent" in name else "the tower"
                raise ValueError(
                    f"{name} of {example['caption']!r}: not finite as {dtype} (largest {np.abs(value).max():.3g}), so "
                    f"use dtype='float32' or look at {maker}"
                )
        told = {name: example[name] for name in ("caption", "origin")}
        yield {**stored, "shape": list(example["video"].shape[:3]), **told}
