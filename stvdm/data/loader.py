# SPDX-License-Identifier: Apache-2.0
"""One loader for every source: deterministic, resumable from the step alone, the same on any number of processes.

    source -> seed -> shuffle -> repeat -> random_map(read) -> rows of this process -> batch      one line a bucket
    mix(lines, weights)[start_step:]                                                              one batch a step

Every arrow is random access (a `grain.MapDataset`), so batch number `step` is a pure function of (sources, buckets,
seed, step). The random clip and crop of an element come from the generator `random_map` makes of its global position,
before rows are dealt out: shard s of S is rows [s B / S, (s + 1) B / S) of each global batch of B, and a process reads
the shards that its devices hold. Which those are the mesh says, not the number of processes: where the devices of one
example belong to several processes, each of these reads it.

    loader = make_loader(KineticShapes(seed=0), buckets=[(17, 64, 64, 32)], seed=0)
    batch = next(loader)       # {"video": uint8 (B, T, H, W, 3), "caption": list of str, "index": int64 (B,)}
    loader.position            # JSON for the checkpoint; later: check_position(saved, loader.position)

A source is anything with the attributes of `Source`; `FolderSource` and `RecordSource` are the others here.
"""

import dataclasses
import hashlib
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import grain
import numpy as np

from stvdm.data import buckets as bucketing
from stvdm.data import kinetic_shapes, transforms
from stvdm.data.buckets import Bucket
from stvdm.data.folder import FolderSource, SkipReport
from stvdm.data.records import FLOATS, RecordSource
from stvdm.data.video import BadVideo

MAX_REPLACEMENTS = 64  # files in a row that may fail before reading gives up


class Source(Protocol):
    """What the loader asks of a source.

    Attributes:
      kind: "video", or "latent" for cached latents, which can't be cropped: they go only to the bucket of exactly their
        shape.
      fingerprint: changes whenever an example does.
      shapes: (frames, height, width) of every example, in pixels; None if it makes whatever shape it is asked for.
    """

    @property
    def kind(self) -> Literal["video", "latent"]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def shapes(self) -> Sequence[tuple[int, int, int]] | np.ndarray | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int, *, num_frames: int, height: int, width: int, rng: np.random.Generator) -> dict[str, Any]:
        """{"video": uint8 (at least num_frames, H, W, 3), "caption": str}; BadVideo if it can't be read."""

    def caption(self, index: int) -> str: ...


class KineticShapes:
    """The procedural world of `stvdm.data.kinetic_shapes`, rendered as it is read: any shape, nothing on disk."""

    kind: Literal["video"] = "video"
    shapes = None

    def __init__(
        self,
        *,
        seed: int = 0,
        split: kinetic_shapes.Split = "train",
        num_clips: int = 50_000,
        fps: float = 8.0,
        world: kinetic_shapes.World | None = None,
    ):
        self.seed, self.split, self.num_clips, self.fps = seed, split, num_clips, fps
        self.world = world or kinetic_shapes.World()
        self.fingerprint = _digest("kinetic_shapes", seed, split, num_clips, fps, dataclasses.asdict(self.world))

    def __len__(self) -> int:
        return self.num_clips

    def read(self, index: int, *, num_frames: int, height: int, width: int, rng: np.random.Generator) -> dict[str, Any]:
        scene = kinetic_shapes.sample_scene(self.seed, index, split=self.split, world=self.world)
        if num_frames == 1:  # an image shows any moment of the scene: the second of two frames so far apart
            moment = rng.uniform(1e-3, self.world.duration)
            video = kinetic_shapes.render(scene, num_frames=2, height=height, width=width, fps=1 / moment)[1:]
        else:
            video = kinetic_shapes.render(scene, num_frames=num_frames, height=height, width=width, fps=self.fps)
        return {"video": video, "caption": scene.caption}

    def caption(self, index: int) -> str:
        return kinetic_shapes.sample_scene(self.seed, index, split=self.split, world=self.world).caption


class StoredKineticShapes:
    """The same world, written to disk before by `stvdm.data.kinetic_shapes_tfds.write`, whose result is `path`."""

    kind: Literal["video"] = "video"

    def __init__(self, path: str | Path, *, split: kinetic_shapes.Split = "train"):
        from stvdm.data import kinetic_shapes_tfds  # TFDS takes seconds to import, and only this source needs it

        self._decode = kinetic_shapes_tfds.decode
        self._records = kinetic_shapes_tfds.read(path, split=split)
        info = json.loads((Path(path) / "dataset_info.json").read_text("utf-8"))
        self.fingerprint = _digest([info.get(key) for key in ("name", "configName", "version", "splits")], split)
        made = json.loads(info["configDescription"])
        self.fps, self.world = made["fps"], kinetic_shapes.World(**made["world"])
        self.shapes = [self.read(0)["video"].shape[:3]] * len(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int, **unused: Any) -> dict[str, Any]:
        return self._decode(self._records[index])

    def caption(self, index: int) -> str:
        return bytes(self._records[index]["caption"]).decode()


class Part:
    """Some examples of a source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, list(indices)
        self.kind = source.kind
        self.fingerprint = _digest("part", source.fingerprint, self._indices)
        self.shapes = None if source.shapes is None else [source.shapes[index] for index in self._indices]
        if hasattr(source, "names"):
            self.names = [source.names[index] for index in self._indices]
        self.report = getattr(source, "report", SkipReport(num_found=len(source)))

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, **how: Any) -> dict[str, Any]:
        return self._source.read(self._indices[index], **how)

    def caption(self, index: int) -> str:
        return self._source.caption(self._indices[index])


def configured_sources(data: Any, *, seed: int) -> tuple[Source, Source]:
    """(training clips, held-out clips) of a config's ``data`` section.

    Held out are the validation split of kinetic shapes, what lies in ``data.validation_path``, or else the share
    ``data.validation_share`` of the clips, evenly spaced and at least one for each bucket that has two.
    """
    train = configured_source(data, seed=seed)
    if data.source == "kinetic_shapes" or data.validation_path:
        return train, configured_source(data, seed=seed, split="validation")
    members, origins = members_of([train], bucketing.parse(data.buckets)), getattr(train, "origins", None)
    held_out = _held_out(members, share=data.validation_share, origins=origins)
    if not held_out:
        warnings.warn("too few clips to hold any out: evaluation sees those that are trained on", stacklevel=2)
        return train, train
    return Part(train, sorted(set(range(len(train))) - held_out)), Part(train, sorted(held_out))


def _held_out(members: Sequence[np.ndarray | range], *, share: float, origins: Sequence[int] | None = None) -> set[int]:
    """Every so many-th example of each bucket, and what is of one origin with it; each bucket keeps one to train on."""
    every = max(2, round(1 / share))
    of = (lambda index: index) if origins is None else origins.__getitem__
    owners: dict[int, list[int]] = {}
    for k, indices in enumerate(members):
        for index in map(int, indices):
            owners.setdefault(of(index), []).append(k)
    left, chosen = [len(indices) for indices in members], set()
    for indices in members:
        for index in map(int, indices[every - 1 :: every] if len(indices) >= every else indices[-1:]):
            origin = of(index)
            if origin not in chosen and all(left[k] > owners[origin].count(k) for k in owners[origin]):
                chosen.add(origin)
                for k in owners[origin]:
                    left[k] -= 1
    return {index for indices in members for index in map(int, indices) if of(index) in chosen}


def configured_source(data: Any, *, seed: int, split: kinetic_shapes.Split = "train") -> Source:
    """All clips of one split of a config's ``data`` section: of kinetic shapes, rendered as they are read if no
    ``path`` has them, or of ``path`` or ``validation_path``.

    Raises:
      ValueError: for another split than "train" of a folder or of latents that names no ``validation_path``, for stored
        kinetic shapes of another rate or world than the config's, latents of another rate, and for a source that is
        none of these.
    """
    world = kinetic_shapes.World.of(data.world)  # whatever is read: samples may be judged by it
    if data.source == "kinetic_shapes":
        if data.path:
            stored = StoredKineticShapes(data.path, split=split)
            _check_same("fps", data.fps, stored.fps, data.path)
            _check_same("world", world, stored.world, data.path)
            return stored
        return KineticShapes(seed=seed, split=split, num_clips=data.num_clips, fps=data.fps, world=world)
    if split != "train" and not data.validation_path:
        raise ValueError(
            f"split={split!r}: data.validation_path='': expected the folder of the held-out clips, so name it, or take "
            "the split 'train'"
        )
    path = data.path if split == "train" else data.validation_path
    if data.source == "folder":
        return FolderSource(path, fps=data.fps)
    if data.source == "latents":
        latents = RecordSource(path)
        _check_same("fps", data.fps, latents.metadata["about"].get("fps", data.fps), path)  # older ones do not say
        return latents
    raise ValueError(f"data.source={data.source!r}: expected one of kinetic_shapes, folder, latents.")


def _check_same(name: str, here: Any, there: Any, path: str) -> None:
    if there != here:
        raise ValueError(
            f"data.{name}={here!r}: expected that of the clips in {path!r}, since samples are shown and judged by it; "
            f"they were written with {name}={there!r}"
        )


class Loader:
    """An endless iterator of batches. `step` is the number of the next, `report` says what was skipped so far."""

    def __init__(
        self,
        dataset: Any,
        sources: Sequence[Source],
        *,
        start_step: int,
        num_workers: int,
        identity: Mapping[str, Any],
        report: SkipReport,
    ):
        self.step = start_step
        self.report = report
        self._sources = sources
        self._dataset, self._num_workers, self._identity = dataset, num_workers, dict(identity)
        self._batches: list[Any] = []  # the running iterator, or nothing
        weakref.finalize(self, _stop, self._batches)

    @property
    def position(self) -> dict[str, Any]:
        """Where we are, as JSON: all it takes to go on from here, with any number of processes and workers."""
        return {"step": self.step, **self._identity}

    def captions(self, at_most: int | None = None) -> Iterator[str]:
        """The captions of all examples, in the order of the sources; of more than `at_most` so many, evenly spaced."""
        total = sum(map(len, self._sources))
        count = min(total, at_most or total)
        return (self.caption_of(i * total // count) for i in range(count))

    def caption_of(self, index: int) -> str:
        """That of one example (the batch's "index")."""
        source, local = _place_of(self._sources, index)
        return source.caption(local)

    def name_of(self, index: int) -> str:
        """What people call an example: its file, or its number (the batch's "index")."""
        return _name_of(self._sources, index)

    def batch_at(self, step: int) -> dict[str, Any]:
        """Any batch, out of turn: replays one step alone."""
        return self._deliver(self._dataset[step])

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, Any]:
        if not self._batches:
            self._batches.append(self._start())
        batch = self._deliver(next(self._batches[0]))
        if (
            self._num_workers
        ):  # out of the memory shared with the worker, which is unmapped under whoever still holds it at exit
            batch = {key: _copied(value) for key, value in batch.items()}
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead; happens by itself when the loader goes or Python ends. `next` starts again."""
        _stop(self._batches)

    def _start(self) -> Any:
        # The elements are whole batches: grain's default of 500 read ahead would be many gigabytes.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        batches = self._dataset[self.step :].to_iter_dataset(ahead)
        if self._num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain asks absl for its flags; outside absl.app nobody has parsed them
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2))
        return iter(batches)

    def _deliver(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name, reason in batch.pop("replaced"):  # travels with the batch, as reading happens in other processes
            if name not in self.report.skipped:
                warnings.warn(f"{name}: {reason}; the next good one is read in its place", stacklevel=3)
            self.report.replaced(name, reason)
        return batch


def make_loader(
    sources: Source | Sequence[Source],
    *,
    buckets: Sequence[Any],
    seed: int,
    global_batch: int | None = None,
    start_step: int = 0,
    num_workers: int = 0,
    num_shards: int = 1,
    shards: Sequence[int] = (0,),
    flip: bool = False,
) -> Loader:
    """Batches of `sources`, from `start_step` on.

    Args:
      sources: one or several; they are read as one long list.
      buckets: `Bucket`s or what `buckets.parse` makes them of.
      seed: of order, clips and crops.
      global_batch: examples a step, over all devices, for buckets that do not say.
      start_step: the first batch to deliver, i.e. the number of steps already made.
      num_workers: processes that read ahead; 0 reads in a thread of this one.
      num_shards: equal parts that the rows of a global batch are split into.
      shards: which of them this process reads, in this order.
      flip: mirror half the clips left-right. Off, because captions say "left" and "right".

    Raises:
      ValueError: if the buckets are unsound, or one of them fits no example.
    """
    sources = tuple(sources) if isinstance(sources, Sequence) else (sources,)
    parsed = bucketing.parse(buckets)
    bucketing.validate(parsed, global_batch=global_batch, num_shards=num_shards)
    if len({source.kind for source in sources}) != 1:
        raise ValueError(
            f"sources={[s.kind for s in sources]}: expected all videos or all latents, so make a loader for each"
        )
    report = SkipReport()
    for source in sources:
        report.merge(getattr(source, "report", SkipReport(num_found=len(source))))
    all_members = members_of(sources, parsed)
    report.skipped.update(_in_no_bucket(sources, parsed, all_members))
    lines = []
    for bucket, members in zip(parsed, all_members, strict=True):
        batch_size = bucket.batch_size or global_batch or 0
        line = (
            grain.MapDataset.source(range(len(members)))
            .seed(int(np.random.SeedSequence([seed, *bucket.shape]).generate_state(1)[0]))
            .shuffle()
            .repeat()
            .random_map(_Read(sources, members, bucket, flip))
        )
        rows = _Rows(line, batch_size, num_shards, shards)
        lines.append(rows.batch(rows.num_local, drop_remainder=True, batch_fn=_stack))
    dataset = grain.MapDataset.mix(lines, weights=[bucket.weight for bucket in parsed])
    identity = {
        "seed": seed,
        "fingerprint": fingerprint(sources),
        "buckets": [[*bucket.shape, bucket.batch_size or global_batch, bucket.weight] for bucket in parsed],
        "flip": flip,
    }
    return Loader(dataset, sources, start_step=start_step, num_workers=num_workers, identity=identity, report=report)


def fingerprint(sources: Source | Sequence[Source]) -> str:
    """Of what is read: equal fingerprints mean equal examples in equal order."""
    sources = tuple(sources) if isinstance(sources, Sequence) else (sources,)
    return sources[0].fingerprint if len(sources) == 1 else _digest(*(source.fingerprint for source in sources))


def check_position(saved: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """The step to resume from, if the data is still what it was.

    Raises:
      ValueError: if seed, data, buckets or flipping changed: `step` would then mean other batches, some seen twice,
        some never.
    """
    saved, now = json.loads(json.dumps(dict(saved))), json.loads(json.dumps(dict(now)))
    changed = [
        f"  {key}: saved {saved.get(key)!r}, now {now[key]!r}"
        for key in now
        if key != "step" and saved.get(key) != now[key]
    ]
    if changed:
        raise ValueError(
            f"the data is not what step {saved.get('step')} was trained on:\n"
            + "\n".join(changed)
            + "\nso give back the old data settings, or start from step 0 in a new workdir with these weights"
        )
    return int(saved["step"])


def served(source: Source, buckets: Sequence[Any]) -> list[Any]:
    """Those of a config's buckets that some held-out example fits.

    Raises:
      ValueError: if there is none.
    """
    members = members_of([source], bucketing.parse(buckets), allow_empty=True)
    found = [bucket for bucket, indices in zip(buckets, members, strict=True) if len(indices)]
    if not found and source.shapes is not None:
        raise ValueError(
            f"data.buckets={tuple(buckets)}: none takes one of the {len(source)} held-out clips, the first of which is "
            f"{'x'.join(map(str, source.shapes[0]))}, so name others as data.validation_path, or none, for a share of "
            "those that are trained on."
        )
    return found


def members_of(
    sources: Sequence[Source], buckets: Sequence[Bucket], *, allow_empty: bool = False
) -> list[np.ndarray | range]:
    """For each bucket, the global indices of the examples that go to it.

    Raises:
      ValueError: if a bucket would have none, unless ``allow_empty``.
    """
    total = sum(len(source) for source in sources)
    if all(source.shapes is None for source in sources):
        return [range(total)] * len(buckets)
    found: list[list[int]] = [[] for _ in buckets]
    seen: dict[tuple[int, int, int], int] = {}
    start = 0
    for source in sources:
        for index in range(len(source)):
            if source.shapes is None:
                chosen: Sequence[int] = range(len(buckets))
            else:
                frames, height, width = map(int, source.shapes[index])
                shape = (frames, height, width)
                seen[shape] = seen.get(shape, 0) + 1
                if source.kind == "latent":
                    chosen = [k for k, bucket in enumerate(buckets) if bucket.shape == shape]
                else:
                    chosen = bucketing.assign(shape, buckets)
            for k in chosen:
                found[k].append(start + index)
        start += len(source)
    for bucket, indices in zip(buckets, found, strict=True):
        if not indices and not allow_empty:
            common = ", ".join(
                f"{'x'.join(map(str, s))} ({n})" for s, n in sorted(seen.items(), key=lambda x: -x[1])[:5]
            )
            raise ValueError(
                f"bucket {bucket}: none of the {total} examples fits it, so drop it or change it; they are {common}"
            )
    return [np.asarray(indices, np.int64) for indices in found]


def _place_of(sources: Sequence[Source], index: int) -> tuple[Source, int]:
    """The source of an example, and its number there."""
    start = 0
    for source in sources:
        if index - start < len(source):
            return source, index - start
        start += len(source)
    raise IndexError(f"example {index}: there are {start}")


def _name_of(sources: Sequence[Source], index: int) -> str:
    """The file of an example, if its source has files, or its number among those of all sources."""
    source, local = _place_of(sources, index)
    return source.names[local] if hasattr(source, "names") else f"example {index}"


def _in_no_bucket(
    sources: Sequence[Source], buckets: Sequence[Bucket], members: Sequence[np.ndarray | range]
) -> dict[str, str]:
    """Name -> reason of the examples that no bucket takes, most often because they are too short."""
    if any(isinstance(indices, range) for indices in members):
        return {}  # every bucket takes all
    taken = np.unique(np.concatenate(members))
    skipped, start = {}, 0
    for source in sources:
        for index in np.setdiff1d(np.arange(len(source)), taken - start).tolist():
            shape = "x".join(map(str, source.shapes[index])) if source.shapes is not None else "?"
            skipped[_name_of(sources, start + index)] = (
                f"fits no bucket: it is {shape}, they are {', '.join(map(str, buckets))}"
            )
        start += len(source)
    return skipped


def read_clip(
    source: Source, index: int, bucket: Bucket, rng: np.random.Generator, *, flip: bool = False
) -> dict[str, Any]:
    """One example of exactly the bucket's shape, its moment and crop drawn from `rng`; or BadVideo."""
    num_frames, height, width = bucket.shape
    example = source.read(index, num_frames=num_frames, height=height, width=width, rng=rng)
    if source.kind == "latent":
        return {name: example[name] for name in ("caption", *FLOATS) if name in example}
    video = transforms.choose_clip(example["video"], num_frames, rng=rng)
    video = transforms.resize_and_crop(video, height, width, position=(rng.uniform(), rng.uniform()))
    if flip and rng.random() < 0.5:
        video = transforms.flip(video)
    return {"video": video, "caption": example["caption"]}


def _stop(batches: list[Any]) -> None:
    while batches:
        batches.pop().close()


class _Read:
    """Position in a bucket, and a generator -> one example of exactly the bucket's shape."""

    def __init__(self, sources: Sequence[Source], members: "np.ndarray | range", bucket: Bucket, flip: bool):
        self.sources, self.members, self.bucket, self.flip = sources, members, bucket, flip
        self.starts = np.cumsum([0, *(len(source) for source in sources)])

    def __call__(self, position: int, rng: np.random.Generator) -> dict[str, Any]:
        replaced = []
        for attempt in range(min(len(self.members), MAX_REPLACEMENTS)):
            index = int(self.members[(position + attempt) % len(self.members)])
            which = int(np.searchsorted(self.starts, index, side="right")) - 1
            try:
                local = index - int(self.starts[which])
                example = read_clip(self.sources[which], local, self.bucket, rng, flip=self.flip)
            except BadVideo as error:
                replaced.append((error.name or f"example {index}", error.reason))
                continue
            return {**example, "index": index, "replaced": replaced}
        listed = "\n".join(f"  {name}: {reason}" for name, reason in replaced)
        raise ValueError(f"{len(replaced)} examples in a row could not be read, so look at the data:\n{listed}")


class _Rows(grain.MapDataset):
    """Of every global batch the rows of some of its shards."""

    def __init__(self, parent: Any, global_batch: int, num_shards: int, shards: Sequence[int]):
        super().__init__(parent)
        each = global_batch // num_shards
        self._global = global_batch
        self._rows = [row for shard in shards for row in range(shard * each, (shard + 1) * each)]
        self.num_local = len(self._rows)

    def __len__(self) -> int:
        return len(self._parent) // self._global * self.num_local

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self.num_local)
        return self._parent[step * self._global + self._rows[row]]


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {
        key: np.stack([example[key] for example in examples])
        for key in ("video", "latent", "image_latent", "image_tokens")
        if key in examples[0]
    }
    batch["caption"] = [example["caption"] for example in examples]
    if "text" in examples[0]:
        batch["text"] = [example["text"] for example in examples]  # each as long as its caption
    batch["index"] = np.asarray([example["index"] for example in examples], np.int64)
    batch["replaced"] = [pair for example in examples for pair in example["replaced"]]
    return batch


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return np.array(value) if isinstance(value, np.ndarray) else value


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
