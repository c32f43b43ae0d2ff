# SPDX-License-Identifier: Apache-2.0
"""The image that a clip begins with, as a network is given it. There are three ways, and the network says which.

| network                              | what it is given                                                 | Wan        |
|--------------------------------------|------------------------------------------------------------------|------------|
| has channels for it (extra_channels) | behind the noisy latent's channels a mask, and the latent of the | 2.1 I2V,   |
|                                      | image followed by grey frames. The mask says of each frame of a  | 2.2 I2V-   |
|                                      | latent frame, in a channel each, whether it is known             | A14B       |
| reads it as well (image_width)       | besides, tokens of the image, of a tower                         | 2.1 I2V    |
| neither                              | the latent of the image in place of its own first frame, at time | 2.2 TI2V-  |
|                                      | 0: known, and kept                                               | 5B         |

    given = first_frame.given(image_HWC, (81, 480, 832), dit, encode=encode, temporal=4, look=look, batch_size=1)

Sources: wan/image2video.py and wan/textimage2video.py of github.com/Wan-Video/Wan2.2; diffusers'
WanImageToVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stvdm.data import transforms
from stvdm.interop import towers
from stvdm.models.block import MODULATED
from stvdm.models.dit import DiT


class Given(NamedTuple):
    """What a network is given of an image; None is what it is not."""

    extra_Bthwz: jax.Array | None = None  # mask and latent, which stand behind the noisy latent's channels
    image_BSE: jax.Array | None = None  # tokens
    known_B1hwz: jax.Array | None = None  # the first latent frame


def given(
    image_HWC: np.ndarray,
    shape: tuple[int, int, int],
    dit: Any,
    *,
    encode: Callable[[jax.Array], jax.Array],
    temporal: int,
    look: towers.Looker | None,
    batch_size: int,
) -> Given:
    """What a network takes of an image, for clips that begin with it.

    Args:
      image_HWC: bytes of any size; what does not fit the clip's sides is cut off.
      shape: (T, H, W) of the clips.
      dit: the network.
      encode: the normalised latent of videos in [-1, 1].
      temporal: frames behind one latent frame.
      look: the tower that makes tokens of images (bytes, of any size), if the network reads them.

    Raises:
      ValueError: for what is no image, or a network that can do nothing with one.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
        raise ValueError(f"image of shape {image_HWC.shape}, type {image_HWC.dtype}: expected bytes (H, W, 3).")
    T, H, W = shape
    frame = transforms.resize_and_crop(image_HWC[None], H, W)[None]
    frame_1THWC = jnp.asarray(frame, jnp.float32) / 127.5 - 1
    if not getattr(dit, "extra_channels", 0):
        _check_levels(dit)
        return Given(known_B1hwz=_repeat(encode(frame_1THWC), batch_size))
    grey_1THWC = jnp.zeros((1, T - 1, H, W, 3))
    latent = encode(jnp.concatenate([frame_1THWC, grey_1THWC], axis=1))
    if dit.extra_channels != temporal + latent.shape[-1]:
        raise ValueError(
            f"extra_channels={dit.extra_channels}: expected {temporal + latent.shape[-1]}, a mask for each of the "
            f"{temporal} frames of a latent frame and {latent.shape[-1]} channels of the image's latent."
        )
    mask = jnp.zeros((*latent.shape[:-1], temporal)).at[:, 0].set(1.0)
    tokens = None
    if dit.image_width:
        if look is None:
            raise ValueError(
                "image.tower='': this network reads images by a tower; name its folder, e.g. the model's image_encoder."
            )
        tokens = _repeat(look([image_HWC]), batch_size)
    return Given(extra_Bthwz=_repeat(jnp.concatenate([mask, latent], axis=-1), batch_size), image_BSE=tokens)


def check_needless(dit: Any) -> None:
    """Raises ValueError for a network that makes no clip without an image."""
    if getattr(dit, "extra_channels", 0) or getattr(dit, "image_width", 0):
        raise ValueError("this model makes clips that begin with an image: give one (`image=`, `--image FILE`).")


def _check_levels(dit: Any) -> None:
    if not isinstance(dit, DiT) or dit.time_path not in MODULATED or dit.patch[0] != 1:
        raise ValueError(
            "image: this network cannot hold a first frame: it is told one time for all of a clip. Expected a "
            "transformer with time_path='adaln_zero' or 'adaln' and patches of one latent frame."
        )


def _repeat(array: jax.Array, batch_size: int) -> jax.Array:
    return jnp.broadcast_to(array, (batch_size, *array.shape[1:]))
