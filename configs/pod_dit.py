# SPDX-License-Identifier: Apache-2.0
"""Transformers worth renting a pod for: 130 M to 14 B parameters, 480p and 720p, 17 to 129 frames.

    stvdm plan --config=configs/pod_dit.py:1.3b-480p-81f-v5p
    stvdm train dit --config=configs/pod_dit.py:1.3b-480p-81f-v5p --workdir=gs://BUCKET/dit \
        --config.autoencoder=gs://BUCKET/autoencoder --config.data.path=/mnt/latents

Expects latents that `stvdm preprocess` made. The sizes called 1.3b, 5b and 14b have the shapes of Wan 2.1 and 2.2
(arXiv:2503.20314). Parameters and plans leave out the words, which are collected from the captions. **Unproven**:
compiled for these slices, never run on one.

    stvdm plan --config=configs/pod_dit.py --variants

what each of them needs at the peak of what a device has, how long no step is shorter than, and the MFU at that:

    b-480p-17f-v5e          4.81 of 15.75 GiB  0.289 s   81%
    l-480p-33f-v5e          1.74 of 15.75 GiB  0.648 s   69%
    xl-480p-49f-v6e         2.97 of 31.25 GiB  0.354 s   69%
    1.3b-480p-81f-v5p       7.13 of 95.74 GiB   2.66 s   69%
    1.3b-720p-81f-v6e       3.80 of 31.25 GiB    1.5 s   68%
    1.3b-480p-129f-tpu7x   10.63 of 94.75 GiB   2.36 s   68%
    5b-704p-121f-v5p        6.71 of 95.74 GiB   2.39 s   70%
    14b-480p-81f-v5p        9.72 of 95.74 GiB   3.87 s   70%
    14b-720p-81f-v5p       10.31 of 95.74 GiB   7.72 s   69%
    14b-720p-81f-v6e        7.60 of 31.25 GiB   3.86 s   69%
    14b-720p-129f-tpu7x    12.87 of 94.75 GiB   6.88 s   68%
    14b-480p-81f-2xv5p     12.50 of 95.74 GiB   3.87 s   70%
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from stvdm import config as base
from stvdm.models.dit import SIZES

SIZE_OF = {"b": "B", "l": "L", "xl": "XL", "1.3b": "wan-1.3b", "5b": "wan-5b", "14b": "wan-14b"}
SPACE = {"480p": (480, 832), "720p": (720, 1280), "704p": (704, 1280)}


class Run(NamedTuple):
    size: str
    frames: int
    space: str
    batch: int
    topology: str
    mesh: dict[str, int]
    remat: str
    num_slices: int = 1
    autoencoder: str = "480p-v5p"  # of configs/pod_autoencoder.py


RUNS = {
    "b-480p-17f-v5e": Run("b", 17, "480p", 64, "v5e:4x4", dict(data=16), "attention"),
    "l-480p-33f-v5e": Run("l", 33, "480p", 64, "v5e:8x8", dict(fsdp=64), "everything"),
    "xl-480p-49f-v6e": Run("xl", 49, "480p", 64, "v6e:8x8", dict(fsdp=64), "everything"),
    "1.3b-480p-81f-v5p": Run("1.3b", 81, "480p", 16, "v5p:2x2x4", dict(fsdp=16), "everything"),
    "1.3b-720p-81f-v6e": Run("1.3b", 81, "720p", 32, "v6e:8x16", dict(fsdp=32, context=4), "everything"),
    "1.3b-480p-129f-tpu7x": Run("1.3b", 129, "480p", 32, "tpu7x:2x2x4", dict(fsdp=32), "everything"),
    "5b-704p-121f-v5p": Run(
        "5b", 121, "704p", 32, "v5p:4x4x4", dict(fsdp=32, context=2), "everything", 1, "720p-tpu7x"
    ),
    "14b-480p-81f-v5p": Run("14b", 81, "480p", 16, "v5p:4x4x4", dict(fsdp=16, context=4), "everything"),
    "14b-720p-81f-v5p": Run("14b", 81, "720p", 8, "v5p:4x4x4", dict(fsdp=8, context=8), "everything"),
    "14b-720p-81f-v6e": Run("14b", 81, "720p", 32, "v6e:16x16", dict(fsdp=32, context=8), "everything"),
    "14b-720p-129f-tpu7x": Run("14b", 129, "720p", 16, "tpu7x:4x4x4", dict(fsdp=16, context=8), "everything"),
    "14b-480p-81f-2xv5p": Run("14b", 81, "480p", 32, "v5p:4x4x4", dict(data=2, fsdp=16, context=4), "everything", 2),
}
VARIANTS = tuple(RUNS)


def get_config(variant: str = "1.3b-480p-81f-v5p") -> ConfigDict:
    if variant not in RUNS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(RUNS)}.")
    run = RUNS[variant]
    config = base.dit()
    config.topology, config.num_slices = run.topology, run.num_slices
    config.mesh.update(run.mesh)
    config.autoencoder = f"configs/pod_autoencoder.py:{run.autoencoder}"  # a plan needs its shapes, a run its weights
    config.model.update(SIZES[SIZE_OF[run.size]])
    config.model.remat = run.remat
    config.model.dtype = "bfloat16"
    config.text.width = 512
    config.text.num_layers = 6
    config.text.num_heads = 8
    config.text.max_tokens = 128
    config.data.source = "latents"
    config.data.path = "data/latents"
    config.data.fps = 16.0
    config.data.num_workers = 8
    config.data.buckets = ((run.frames, *SPACE[run.space], run.batch, 1.0),)
    config.flow.shift = 3.0 if run.space == "480p" else 5.0
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-3
    config.optimizer.b2 = 0.95
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 2_000
    config.total_steps = 200_000
    config.ema_decay = 0.9999
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.sample.steps = 50
    config.sample.guidance = 5.0
    config.sample.shift = config.flow.shift
    return config.lock()
