# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of video, latent and tokens, against worked numbers and round trips."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import shapes

LATENT = (30, 64, 64)  # of 5 s at 24 fps, 512 x 512, compressed 4 in time and 8 in space


def test_five_seconds_at_512_give_the_known_numbers():
    video = (120, 512, 512)
    assert math.prod(video) * 3 == 94_371_840
    assert shapes.latent_shape(video, temporal=4, spatial=8, grouping="uniform") == LATENT
    assert math.prod(LATENT) * 16 == 1_966_080
    assert shapes.compression_ratio(video, LATENT, latent_channels=16) == 48


@pytest.mark.parametrize(
    ("patch", "num_tokens"), [((1, 2, 2), 30_720), ((2, 2, 2), 15_360), ((1, 4, 4), 7_680), ((2, 4, 4), 3_840)]
)
def test_tokens_by_patch(patch, num_tokens):
    assert math.prod(shapes.token_grid(LATENT, patch)) == num_tokens


def test_other_known_grids():
    assert math.prod(shapes.token_grid((1, 128, 128), (1, 2, 2))) == 4_096  # a 1024 x 1024 image
    assert shapes.token_grid(LATENT, LATENT) == (1, 1, 1)  # the whole latent in one token
    assert shapes.latent_shape((80, 256, 256), temporal=4, spatial=8, grouping="uniform") == (20, 32, 32)
    assert shapes.latent_shape((48, 8, 8), temporal=4, spatial=8, grouping="uniform")[0] == 12


@pytest.mark.parametrize(("frames", "latent_frames"), [(121, 31), (81, 21), (49, 13), (17, 5), (1, 1)])
def test_causal_grouping_keeps_the_first_frame_alone(frames, latent_frames):
    assert shapes.latent_shape((frames, 8, 8), temporal=4, spatial=8)[0] == latent_frames
    assert shapes.video_shape((latent_frames, 1, 1), temporal=4, spatial=8) == (frames, 8, 8)


def test_attention_pairs():
    grid = shapes.token_grid(LATENT, (1, 2, 2))
    assert shapes.attention_pairs(grid) == 943_718_400
    assert shapes.attention_pairs(grid, "frame") == 31_457_280
    assert shapes.attention_pairs(grid, "time") == 921_600
    assert shapes.attention_pairs(grid, "factorised") == 32_378_880
    assert round(943_718_400 / 32_378_880, 1) == 29.1
    assert shapes.attention_pairs((1, 4, 4), "frame") == shapes.attention_pairs((1, 4, 4), "full") == 16**2
    assert shapes.attention_pairs((7, 1, 1), "time") == 49
    by_hand = sum((i + 1) * 6 * 6 for i in range(5))  # each of 5 frames of 6 tokens sees itself and those before
    assert shapes.attention_pairs((5, 2, 3), "block_causal") == by_hand
    near = sum(abs(a - b) <= 1 for a in range(5) for b in range(5)) * sum(
        abs(a - b) <= 2 for a in range(4) for b in range(4)
    )
    assert shapes.attention_pairs((5, 4, 2), "window", window=(1, 2, 9)) == near * 2**2


def test_video_shape_inverts_latent_shape():
    for grouping, latent in (("causal", (6, 3, 5)), ("uniform", (6, 3, 5))):
        video = shapes.video_shape(latent, temporal=4, spatial=8, grouping=grouping)
        assert shapes.latent_shape(video, temporal=4, spatial=8, grouping=grouping) == latent


def test_patches_round_trip_and_keep_their_place():
    latent = jnp.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    patch = (2, 3, 2)
    grid = shapes.token_grid((4, 6, 8), patch)
    tokens = shapes.patchify(latent, patch)
    assert tokens.shape == (2, 2 * 2 * 4, 2 * 3 * 2 * 3)
    np.testing.assert_array_equal(shapes.unpatchify(tokens, grid, patch), latent)
    token = tokens[1].reshape(*grid, -1)[1, 0, 2]  # second half of time, upper half, third pair of columns
    np.testing.assert_array_equal(token, latent[1, 2:4, 0:3, 4:6].reshape(-1))  # channel last inside


def test_pixel_shuffle_round_trips_and_gathers_squares():
    video = jnp.arange(1 * 2 * 4 * 6 * 3).reshape(1, 2, 4, 6, 3)
    packed = shapes.space_to_depth(video, 2)
    np.testing.assert_array_equal(shapes.depth_to_space(packed, 2), video)
    np.testing.assert_array_equal(packed[0, 1, 1, 2], video[0, 1, 2:4, 4:6].reshape(-1))


@pytest.mark.parametrize("grouping, frames", [("causal", 17), ("uniform", 16)])
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 2), (2, 2, 1)])
def test_every_pixel_has_one_token_which_stands_for_it(grouping, frames, patch):
    video, geometry = (frames, 16, 24), dict(patch=patch, temporal=4, spatial=4, grouping=grouping)
    latent = shapes.latent_shape(video, temporal=4, spatial=4, grouping=grouping)
    grid = tuple(-(-size // p) for size, p in zip(latent, patch, strict=True))  # 5 latent frames in patches of 2: 3
    counts = np.zeros(video, int)
    token = shapes.token_of_pixel(tuple(np.ogrid[:frames, :16, :24]), **geometry)
    for place in np.ndindex(grid):
        region = shapes.pixels_of_token(place, **geometry)
        counts[region] += 1
        for axis in range(3):
            assert (np.broadcast_to(token[axis], video)[region] == place[axis]).all()
    assert (counts == 1).all()


def test_the_first_frame_of_a_causal_clip_has_tokens_of_its_own():
    geometry = dict(patch=(1, 2, 2), temporal=4, spatial=8)
    assert shapes.pixels_of_token((0, 0, 1), **geometry) == (slice(0, 1), slice(0, 16), slice(16, 32))
    assert shapes.pixels_of_token((2, 0, 1), **geometry) == (slice(5, 9), slice(0, 16), slice(16, 32))
    assert shapes.token_of_pixel((8, 15, 16), **geometry) == (2, 0, 1)
    assert shapes.token_of_pixel((8, 15, 16), **geometry, grouping="uniform") == (2, 0, 1)
    assert shapes.token_of_pixel((7, 15, 16), **geometry, grouping="uniform") == (1, 0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: shapes.latent_shape((24, 64, 64), temporal=4, spatial=8),
            r"num_frames=24: .* use 4k\+1, e\.g\. 21 or 25",
        ),
        (lambda: shapes.latent_shape((2, 64, 64), temporal=4, spatial=8), r"e\.g\. 1 or 5"),
        (
            lambda: shapes.latent_shape((9, 64, 64), temporal=4, spatial=8, grouping="uniform"),
            r"use 4k, e\.g\. 8 or 12",
        ),
        (lambda: shapes.latent_shape((9, 60, 64), temporal=4, spatial=8), r"height=60: .* e\.g\. 56 or 64"),
        (lambda: shapes.latent_shape((9, 64, 3), temporal=4, spatial=8), r"width=3: .* e\.g\. 8\."),
        (lambda: shapes.latent_shape((9, 64, 64), temporal=4, spatial=8, grouping="odd"), "grouping='odd'"),
        (
            lambda: shapes.latent_shape((17, 32, 36), temporal=4, spatial=4, patch=(1, 2, 2)),
            r"width=36: space is compressed by 4 .* use a multiple of 8, e.g. 32 or 40",
        ),
        (
            lambda: shapes.latent_shape((9, 64, 64), temporal=4, spatial=8, patch=(2, 1, 1)),
            r"\(3, 8, 8\) is not a whole number of patches \(2, 1, 1\)",
        ),
        (lambda: shapes.token_grid((5, 7, 8), (1, 2, 2)), r"\(5, 7, 8\) is not a whole number of patches"),
        (lambda: shapes.attention_pairs((1, 1, 1), "fll"), "expected one of"),
    ],
)
def test_errors_teach(call, message):
    with pytest.raises(ValueError, match=message):
        call()
