# SPDX-License-Identifier: Apache-2.0
"""Your own videos: a folder of captioned files, an autoencoder for them, and a transformer that makes more.

Square clips of 17 frames (two seconds), and single frames beside them; other shapes are further entries of
data.buckets. A place to start from, for one accelerator of 16 GB: what it reaches depends on your videos. Unproven.

    stvdm data check my_videos --frames=17 --fps=8
    stvdm train autoencoder --config=configs/my_videos.py:autoencoder --workdir=runs/mine/autoencoder
    stvdm train dit --config=configs/my_videos.py:dit --workdir=runs/mine/dit

What a step needs at the peak of the 15.75 GiB of a TPU v5e, by

    stvdm plan --config=configs/my_videos.py:autoencoder --compile --quick
    stvdm plan --config=configs/my_videos.py:dit --autoencoder=configs/my_videos.py:autoencoder --compile --quick

    autoencoder   7.97 GiB   27.05 without micro-batches: with 96 channels at full size the output of a layer takes
                             0.1 GiB a clip, and the layers of a stage are computed again together
    dit           6.91 GiB

No GPU has been measured. A CPU joins fewer layers into one and takes several times as much: begin there with
--config.data.buckets='((17,32,32,4,1.0),)'. Where memory is short raise --config.optimizer.accumulate, up to the batch.
"""

from ml_collections import ConfigDict

from stvdm import config as base

VARIANTS = ("autoencoder", "dit")


def get_config(variant: str = "autoencoder") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    config = _autoencoder() if variant == "autoencoder" else _dit()
    config.data.source = "folder"
    config.data.path = "my_videos"
    config.data.buckets = ((17, 128, 128, 16, 1.0), (1, 128, 128, 16, 0.25))  # videos give single frames too
    config.data.num_workers = 2
    config.total_steps = 100_000
    config.topology = "v5e:1x1"
    return config.lock()


def _autoencoder() -> ConfigDict:
    config = base.autoencoder()
    config.model.convolution = "separable"
    config.model.remat = "stages"
    config.optimizer.accumulate = 4
    return config


def _dit() -> ConfigDict:
    config = base.dit()
    config.autoencoder = "runs/mine/autoencoder"
    config.flow.shift = config.sample.shift = 0.0  # images have fewer tokens than clips, and need less noise
    config.model.remat = "attention"
    return config
