# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a step are those that its shapes say, and grow with what a variant adds."""

import math

import pytest

from stvdm.ablations import cost
from stvdm.models.patterns import Pattern
from stvdm.sampling import pipeline


@pytest.fixture
def tiny(bases):
    """A DiT's config without text that is worth counting, and its autoencoder."""
    run = bases("tiny")
    return run.dit, pipeline.autoencoder_of(run.autoencoder.model.to_dict())


def test_clips_are_the_tokens_that_the_model_sees(tiny):
    config, coder = tiny
    assert cost.grid_of(config, coder, config.data.buckets[0]) == (5, 4, 4)
    assert cost.batch_of(config, coder, config.data.buckets[0])["latent"].shape == (32, 5, 8, 8, 8)


def test_a_pattern_costs_the_pairs_that_it_sees(tiny):
    config, coder = tiny
    grid, B, D, layers = (5, 4, 4), 32, config.model.width, config.model.num_layers

    def flops(*cycle):
        config.model.attention, config.model.window = cycle, (1, 1, 1)
        return cost.training_flops(config, coder)

    def of_pairs(kind):
        share = Pattern(kind, grid, (1, 1, 1)).share
        return 3 * B * layers * 2 * 2 * D * share * math.prod(grid) ** 2  # queries x keys, weights x values

    full = flops("full")
    for kind in ("frame", "window"):
        assert full - flops(kind) == pytest.approx(of_pairs("full") - of_pairs(kind), rel=1e-3)
    assert flops("frame", "time") - flops("frame") == pytest.approx(
        (of_pairs("time") - of_pairs("frame")) / 2, rel=1e-3
    )


@pytest.mark.slow
def test_seconds_are_those_of_real_steps(tiny, monkeypatch):
    """By a clock that moves on by a second when it is looked at, and a third as fast for images."""
    config, coder = tiny
    config.data.buckets = ((5, 32, 32, 8, 3.0), (1, 32, 32, 8, 1.0))
    config.model.width, config.model.num_layers, config.model.mlp_width = 24, 1, 24
    looked = []
    monkeypatch.setattr(
        cost.time, "perf_counter", lambda: looked.append(0) or len(looked) * (1 if len(looked) < 11 else 3)
    )
    assert cost.seconds_per_step(config, coder, num=3) == pytest.approx((3 * 1 + 3) / 4)
    assert len(looked) == 20


def test_a_step_costs_the_mean_of_its_buckets(tiny):
    config, coder = tiny
    clips = cost.training_flops(config, coder)
    config.data.buckets = ((1, 32, 32, 32, 1.0),)
    images = cost.training_flops(config, coder)
    config.data.buckets = ((17, 32, 32, 32, 3.0), (1, 32, 32, 32, 1.0))
    assert images < clips / 2  # a fifth of the tokens, and all of the text
    assert cost.training_flops(config, coder) == pytest.approx((3 * clips + images) / 4)
