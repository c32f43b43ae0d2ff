# SPDX-License-Identifier: Apache-2.0
"""Buckets: the small, listed set of clip shapes that train together.

A bucket is a compiled shape. Every batch comes whole from one bucket, and buckets are drawn in proportion to their
weight. A bucket of one frame is a bucket of images, and any clip can give it one.

    buckets = parse([(17, 64, 64), dict(num_frames=1, height=64, width=64, batch_size=64, weight=0.25)])
    validate(buckets, global_batch=32, num_shards=4)
    assign((120, 1080, 1920), buckets)      # -> (0, 1): the positions of the buckets this video can go to
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One compiled shape.

    Attributes:
      num_frames, height, width: of the clip, in frames and pixels. One frame is an image.
      batch_size: examples a step, over all devices; None takes the loader's `global_batch`.
      weight: how often this bucket is drawn, relative to the others.
    """

    num_frames: int
    height: int
    width: int
    batch_size: int | None = None
    weight: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


def parse(entries: Iterable[Any]) -> tuple[Bucket, ...]:
    """Buckets from a config.

    Each entry is a `Bucket`, a mapping of its fields, or (num_frames, height, width[, batch_size[, weight]]).
    """
    buckets = []
    for entry in entries:
        if isinstance(entry, Bucket):
            buckets.append(entry)
            continue
        is_mapping = isinstance(entry, Mapping) or hasattr(entry, "items")  # a ConfigDict is no Mapping
        try:
            buckets.append(Bucket(**dict(entry.items())) if is_mapping else Bucket(*entry))
        except TypeError as error:
            raise ValueError(
                f"bucket={entry!r}: expected num_frames, height, width and if need be batch_size, weight ({error})"
            ) from None
    return tuple(buckets)


def problems(buckets: Sequence[Bucket], *, global_batch: int | None = None, num_shards: int = 1) -> list[str]:
    """Everything that is wrong with this set of buckets, one sentence each; empty when it is sound.

    Whether a shape fits the latent of an autoencoder is for `stvdm.config` to say.
    """
    found = []
    if not buckets:
        found.append("buckets=(): expected at least one, so list one, e.g. (17, 64, 64)")
    for bucket in buckets:
        if not (all(isinstance(n, int) for n in bucket.shape) and min(bucket.shape) >= 1):
            found.append(f"bucket {bucket}: expected positive whole numbers of frames and pixels")
            continue
        if not (math.isfinite(bucket.weight) and bucket.weight > 0):
            found.append(
                f"bucket {bucket}: weight={bucket.weight}: expected above 0, so leave out a bucket that is never drawn"
            )
        batch = bucket.batch_size if bucket.batch_size is not None else global_batch
        if batch is None:
            found.append(f"bucket {bucket}: batch_size=None and no global_batch, so give either")
        elif batch < 1 or batch % num_shards:
            found.append(
                f"bucket {bucket}: batch_size={batch}: expected a positive multiple of the {num_shards} parts it is "
                f"split into (mesh data x fsdp), so use e.g. {max(1, round(batch / num_shards)) * num_shards}"
            )
    for bucket in buckets:
        if sum(bucket.shape == other.shape for other in buckets) > 1:
            found.append(f"bucket {bucket}: listed more than once, so merge the entries and add their weights")
            break
    return found


def validate(buckets: Sequence[Bucket], *, global_batch: int | None = None, num_shards: int = 1) -> None:
    """Raise one ValueError that lists every entry of `problems`."""
    if found := problems(buckets, global_batch=global_batch, num_shards=num_shards):
        raise ValueError("\n".join(found))


def assign(shape: tuple[int, int, int], buckets: Sequence[Bucket]) -> tuple[int, ...]:
    """Which buckets a video of (frames, height, width) goes to.

    For every length it is long enough for, the buckets of that length nearest to its aspect (in the logarithm, so that
    2:1 is as far from 1:1 as 1:2 is). Several sizes of one aspect all take it: their weights decide how often each is
    drawn.
    """
    frames, height, width = shape
    distances = {
        k: abs(math.log(bucket.width / bucket.height) - math.log(width / height))
        for k, bucket in enumerate(buckets)
        if bucket.num_frames <= frames
    }
    chosen = []
    for k, distance in distances.items():
        rivals = [distances[j] for j in distances if buckets[j].num_frames == buckets[k].num_frames]
        if distance <= min(rivals) + 1e-3:
            chosen.append(k)
    return tuple(chosen)
