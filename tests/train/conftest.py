# SPDX-License-Identifier: Apache-2.0
"""Configs so small that a test can train them."""

import jax
import numpy as np
import pytest

from stvdm import checkpoint, preprocess, sharding
from stvdm import config as base
from stvdm.data import loader
from stvdm.interop import towers


def _small(config, **changes):
    """The changes (dotted keys with '__') and what all tests want: no warm-up, no clutter."""
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate = 3e-3
    config.data.num_clips = 64
    config.log_every = 1
    config.eval_every = 0
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.fixture
def autoencoder_config(tiny_model):
    _, description = checkpoint.load_model(tiny_model)

    def make(**changes):
        config = base.autoencoder()
        config.model.update(description["autoencoder"])
        config.data.buckets = ((5, 16, 16, 8, 1.0),)
        config.statistics_batches = 1
        return _small(config, **changes)

    return make


@pytest.fixture
def one_device(monkeypatch):
    """Trainers see a machine with one device, however many the tests force."""
    whole = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: whole(**axes, devices=jax.devices()[:1]))


@pytest.fixture
def dit_config(tiny_model):
    """A tiny transformer on an untrained autoencoder, on rendered clips."""
    _, description = checkpoint.load_model(tiny_model)

    def make(**changes):
        config = base.dit()
        config.autoencoder = str(tiny_model)
        config.data.buckets = ((5, 16, 16, 8, 1.0),)
        config.model.update({key: value for key, value in description["config"]["model"].items() if value is not None})
        config.text.update({**description["config"]["text"], "words": (), "max_tokens": 40})
        config.sample.update(dict(steps=2, previews=("a red ball bounces to the right",)))
        return _small(config, **changes)

    return make


@pytest.fixture
def tower_config(dit_config, tower, tmp_path):
    """Its captions are read by a published tower, its latents are ready: `stored` with the tower's text, or without."""

    def make(*, stored, text_path="cross", padding="masked", **changes):
        folder = tmp_path / f"latents_{stored}"
        if not folder.exists():
            preprocess.preprocess(
                lambda video: np.random.default_rng(int(video.sum())).normal(size=(len(video), 3, 4, 4, 4)),
                loader.KineticShapes(num_clips=64),
                folder,
                buckets=[(5, 16, 16)],
                read=towers.reader(tower, max_tokens=96) if stored else None,
                about={"text": towers.identity(tower, max_tokens=96)} if stored else {},
                dtype="float32",
            )
        text = {"tower": str(tower), "tower_dtype": "float32", "padding": padding, "max_tokens": 96, "width": 24}
        return dit_config(
            total_steps=2,
            data__source="latents",
            data__path=str(folder),
            model__text_path=text_path,
            flow__caption_dropout=0.5,
            **{f"text__{name}": value for name, value in text.items()},
            **changes,
        )

    return make
