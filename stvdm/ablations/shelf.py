# SPDX-License-Identifier: Apache-2.0
"""What takes long in an ablation, made once: trainings and latents, in folders named by the digest of what they are of.

    seconds-DIGEST/     how long a step of a training takes, measured
    KIND-DIGEST/        a training: of its config, seed, versions, device and whatever else is handed in
    latents-DIGEST/     of the autoencoder's weights, the rendered world, the clips' shapes

However many cells, questions or ways of sampling use it: it is made by one job at a time, and goes on where it stopped.
Code is not in their digests (`sources` is of it, and results name that): after a change of a model or a trainer, delete
the shelf.

    made = made_once(train_dit.main, config, shelf, [digest], say)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import stvdm
from stvdm import checkpoint, preprocess
from stvdm import config as base
from stvdm.data import loader
from stvdm.data.kinetic_shapes import Split
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.sampling.pipeline import to_model_range

Say = Callable[[str], None]
SEED = 0  # of what all cells share: the clips behind the latents, and the prompts and noise of the evaluation
NUM_VALIDATION = 1024  # clips behind the held-out latents, at most
WITHOUT_EFFECT = (  # keys of a config that change how a run is watched, placed or fed, and not what comes of it
    *("seed", "autoencoder", "start_from", "data.path", "data.validation_path", "data.num_workers", "sample.previews"),
    *("mesh", "topology", "num_slices", "model.remat"),
    *("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "profile"),
)
OF_SAMPLING = ("sample.steps", "sample.guidance", "sample.sampler")  # are given anew whenever a model is sampled


def made_once(
    train: Callable[[ConfigDict, epath.PathLike], None],
    config: ConfigDict,
    shelf: epath.Path,
    identity: Sequence[Any],
    say: Say,
) -> epath.Path:
    """The folder of the finished training with this config; trains, or goes on, if it is not there."""
    name = f"{config.kind}-{_digest_of_run(config, config.seed, *identity)}"
    with alone(shelf / name, say) as made:
        if not agreed((made / "model" / checkpoint.DESCRIPTION).exists()):
            say(f"  training {config.kind} in {made}")
            train(config, made)
            if jax.process_index() == 0 and (made / "checkpoints").exists():
                (made / "checkpoints").rmtree()  # the model is exported, and there are many trainings
    return made


def measured_once(
    measure: Callable[[ConfigDict], float], config: ConfigDict, shelf: epath.Path, identity: Sequence[Any], say: Say
) -> float:
    """What a measurement of this config says, taken if it was not before: a cell that goes on keeps to it."""
    config = config.copy_and_resolve_references()
    config.total_steps, config.optimizer.learning_rate = 1_000, 1.0  # have no part in how long a step takes
    with alone(shelf / f"seconds-{_digest_of_run(config, *identity)}", say) as folder:
        path = folder / "seconds.json"
        found = json.loads(path.read_text()) if agreed(path.exists()) else measure(config)
        if jax.process_count() > 1:
            found = float(multihost_utils.broadcast_one_to_all(np.asarray(found)))
        if jax.process_index() == 0:
            path.write_text(json.dumps(found))
    return found


def _digest_of_run(config: ConfigDict, *identity: Any) -> str:
    """Of what a run with this config is of, but its seed."""
    usual = base.defaults(config.kind)
    decisive = {
        key: value
        for key, value in base.flat(config).items()
        if not under(key, (*WITHOUT_EFFECT, *OF_SAMPLING)) and (key not in usual or value != usual[key])
    }
    return short_digest(decisive, versions(), jax.devices()[0].device_kind, *identity)


def folder_of_latents(config: ConfigDict, digest: str, shelf: epath.Path) -> epath.Path:
    """Where latents lie that an autoencoder with this digest makes of the clips of a DiT's config."""
    data = config.data
    clips = [list(bucket[:3]) for bucket in data.buckets]
    return shelf / f"latents-{short_digest(digest, dict(data.world), data.num_clips, data.fps, clips)}"


def encode_clips(config: ConfigDict, coder: Autoencoder, params: Any, folder: epath.Path, say: Say) -> None:
    """Latents of rendered clips, to train on in ``folder/train`` and held out in ``folder/validation``.

    Raises:
      ValueError: in a job of several processes, which would all write them.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"data.source='latents' in {jax.process_count()} processes: expected one to encode them, so use "
            "--config.data.source=kinetic_shapes, which encodes in the step"
        )
    data = config.data.copy_and_resolve_references()
    data.source, data.path, data.validation_path = "kinetic_shapes", "", ""
    encode = jax.jit(lambda params, video: coder.apply({"params": params}, to_model_range(video), method="encode")[0])
    splits: tuple[Split, ...] = ("train", "validation")
    with alone(folder, say):
        for split in splits:
            if split == "validation":
                data.num_clips = min(data.num_clips, NUM_VALIDATION)
            if not (folder / split / "metadata.json").exists():
                say(f"  encoding the {data.num_clips} clips of {folder / split}")
                preprocess.preprocess(
                    lambda video: encode(params["autoencoder"], video),
                    loader.configured_source(data, seed=SEED, split=split),
                    folder / split,
                    buckets=data.buckets,
                    seed=SEED,
                    batch_size=32,
                )


@contextlib.contextmanager
def alone(folder: epath.Path, say: Say) -> Iterator[epath.Path]:
    """The folder, held against other jobs of this machine; in an object store nobody is held off.

    Process 0 holds it for all processes of its job, which wait for it in what they do together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "://" in str(folder) or jax.process_index() > 0:
        yield folder
        return
    import fcntl

    with open(folder / "lock", "w") as lock:  # let go of by the system when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waiting for another process, which is making {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def agreed(found: bool) -> bool:
    """What process 0 found, on all processes of a job: they train together or not at all."""
    if jax.process_count() == 1:
        return found
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))


def under(key: str, names: Sequence[str]) -> bool:
    """Whether a flat key is one of the names, or lies in a section of that name."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def versions() -> dict[str, str]:
    return {"stvdm": stvdm.__version__, "jax": jax.__version__}


@functools.cache
def sources() -> str:
    """Digest of the package's code: it is no condition, but tells which results were made by which."""
    digest = hashlib.sha256()
    root = pathlib.Path(stvdm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def short_digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
