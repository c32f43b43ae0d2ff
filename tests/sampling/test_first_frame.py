# SPDX-License-Identifier: Apache-2.0
"""What networks are given of an image, and refuse; that it is what Wan's are given is shown in test_denoising.py."""

import numpy as np
import pytest

from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.dit import DiT
from stvdm.models.unet import UNet
from stvdm.sampling import first_frame

IMAGE = np.zeros((20, 30, 3), np.uint8)
TINY = dict(latent_channels=4, width=16, num_layers=1, num_heads=2, mlp_width=16, text_width=8)


def given(dit, image=IMAGE, look=None):
    def encode(video):
        assert video.shape[2:] == (16, 16, 3)
        return np.broadcast_to(video.mean(), (1, 1 + (video.shape[1] - 1) // 2, 2, 2, 4))

    return first_frame.given(image, (5, 16, 16), dit, encode=encode, temporal=2, look=look, batch_size=3)


def test_a_network_is_given_what_it_takes():
    plain, beside = given(DiT(**TINY)), given(DiT(**TINY, extra_channels=6))
    assert plain.known_B1hwz.shape == (3, 1, 2, 2, 4)
    assert plain.extra_Bthwz is plain.image_BSE is beside.known_B1hwz is None
    np.testing.assert_array_equal(beside.extra_Bthwz[..., :2].mean((0, 2, 3, 4)), [1, 0, 0])
    np.testing.assert_allclose(beside.extra_Bthwz[..., 2:], -1 / 5, atol=1e-6)  # one black frame, four grey
    tokens = given(DiT(**TINY, extra_channels=6, image_width=7), look=lambda images: np.ones((len(images), 5, 7)))
    assert tokens.image_BSE.shape == (3, 5, 7)


@pytest.mark.parametrize(
    "dit, image, message",
    [
        (DiT(**TINY), IMAGE / 255, r"type float64: expected bytes \(H, W, 3\)"),
        (DiT(**TINY), IMAGE[..., 0], r"image of shape \(20, 30\)"),
        (DiT(**TINY, extra_channels=5), IMAGE, "extra_channels=5: expected 6, a mask for each of the 2 frames"),
        (DiT(**TINY, extra_channels=6, image_width=7), IMAGE, "image.tower='': this network reads images by a tower"),
        (DiT(**TINY, time_path="in_context"), IMAGE, "told one time for all of a clip"),
        (DiT(**{**TINY, "patch": (2, 2, 2)}), IMAGE, "patches of one latent frame"),
        (UNet(latent_channels=4, text_width=8, width=16, num_heads=2), IMAGE, "told one time for all of a clip"),
    ],
)
def test_errors_teach(dit, image, message):
    with pytest.raises(ValueError, match=message):
        given(dit, image)


def test_an_autoencoder_that_shows_the_first_frame_alone_is_wanted():
    coder = Autoencoder(latent_channels=4, width=4, multipliers=(1, 2), spatial_down=(True,), temporal_down=(True,))
    first_frame.check(DiT(**TINY), coder)
    first_frame.check(DiT(**TINY, extra_channels=6), coder)
    with pytest.raises(ValueError, match="extra_channels=5: expected 6"):
        first_frame.check(DiT(**TINY, extra_channels=5), coder)
    with pytest.raises(ValueError, match="grouping='uniform' of the autoencoder: its first latent frame"):
        first_frame.check(DiT(**TINY), coder.clone(grouping="uniform"))


def test_networks_for_images_want_one():
    first_frame.check_needless(DiT(**TINY))
    with pytest.raises(ValueError, match="begin with an image: give one"):
        first_frame.check_needless(DiT(**TINY, extra_channels=6))
