# SPDX-License-Identifier: Apache-2.0
"""Autoencoders for clips of real video, on TPU slices: 4x8x8 times smaller into 16 channels, or 4x16x16 into 48.

    stvdm plan --config=configs/pod_autoencoder.py:480p-v5p
    stvdm train autoencoder --config=configs/pod_autoencoder.py:480p-v5p --workdir=gs://BUCKET/autoencoder \
        --config.data.path=/mnt/videos

Expects a folder of your own videos (`data.path`). **Unproven**: compiled for these slices, never run on one.

    stvdm plan --config=configs/pod_autoencoder.py --variants --quick

what each of them needs at the peak of what a device has, how long no step is shorter than, and the MFU at that:

    256p-v5e     12.34 of 15.75 GiB   0.63 s   75%
    480p-v5p     30.17 of 95.74 GiB  0.414 s   75%
    480p-v6e     19.11 of 31.25 GiB  0.207 s   75%
    720p-tpu7x   23.92 of 94.75 GiB  0.129 s   75%
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from stvdm import config as base


class Run(NamedTuple):
    kind: str
    video: tuple[int, int, int]  # frames, height, width
    batch: int
    topology: str
    mesh: dict[str, int]


RUNS = {
    "256p-v5e": Run("4x8x8", (17, 256, 256), 64, "v5e:4x8", dict(data=32)),
    "480p-v5p": Run("4x8x8", (17, 480, 832), 32, "v5p:4x4x4", dict(data=32, context=2)),
    "480p-v6e": Run("4x8x8", (17, 480, 832), 32, "v6e:8x8", dict(data=16, context=4)),
    "720p-tpu7x": Run("4x16x16", (17, 704, 1280), 32, "tpu7x:4x4x4", dict(data=32, context=4)),
}
VARIANTS = tuple(RUNS)


def get_config(variant: str = "480p-v5p") -> ConfigDict:
    if variant not in RUNS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(RUNS)}.")
    run = RUNS[variant]
    config = base.autoencoder()
    config.topology = run.topology
    config.mesh.update(run.mesh)
    if run.kind == "4x16x16":  # like the encoder of Wan 2.2's: two pixels a side in one, then as often halved
        config.model.latent_channels = 48
        config.model.unshuffle = 2
        config.model.width = 160
        config.model.shortcuts = True
    config.model.remat = "stages"
    config.model.dtype = "bfloat16"
    config.data.source = "folder"
    config.data.path = "data/videos"
    config.data.fps = 16.0
    config.data.flip = True
    config.data.num_workers = 16
    config.data.buckets = ((*run.video, run.batch, 0.8), (1, *run.video[1:], 4 * run.batch, 0.2))
    config.loss.perceptual = 0.1
    config.loss.adversarial = 0.1
    config.loss.adversarial_start = 50_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2_000
    config.total_steps = 200_000
    config.ema_decay = 0.9995
    config.eval_every = 5_000
    config.checkpoint_every = 2_000
    return config.lock()
