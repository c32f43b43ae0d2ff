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

In training the image is the clip's own first frame, and `followed_by_grey`, `beside` and `is_known` make of it what
`given` makes of an image. Guidance leads away from the caption alone: with an empty caption the image is given too, in
sampling as in training.

Sources: wan/image2video.py and wan/textimage2video.py of github.com/Wan-Video/Wan2.2; diffusers'
WanImageToVideoPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stvdm.data import transforms
from stvdm.interop import towers
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.block import MODULATED
from stvdm.models.dit import DiT


class Given(NamedTuple):
    """What a network is given of an image; None is what it is not."""

    extra_Bthwz: jax.Array | None = None  # mask and latent, which stand behind the noisy latent's channels
    image_BSE: jax.Array | None = None  # tokens
    known_B1hwz: jax.Array | None = None  # the first latent frame
    is_known_B: jax.Array | None = None  # of which clips it is known; None: of all


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
    latent = encode(followed_by_grey(frame_1THWC, T))
    _check_channels(dit, temporal, latent.shape[-1])
    tokens = None
    if dit.image_width:
        if look is None:
            raise ValueError(
                "image.tower='': this network reads images by a tower; name its folder, e.g. the model's image_encoder."
            )
        tokens = _repeat(look([image_HWC]), batch_size)
    return Given(extra_Bthwz=_repeat(beside(latent, temporal), batch_size), image_BSE=tokens)


def parts_of(model: Mapping[str, Any]) -> dict[str, int]:
    """What a network with these settings, a config's ``model``, is given beside the noisy latent, and how wide that is.

    "image_latent" in as many extra channels, its mask among them; "image_tokens".
    """
    model = dict(model)  # a U-Net's has neither
    sizes = {"image_latent": model.get("extra_channels", 0), "image_tokens": model.get("image_width", 0)}
    return {name: size for name, size in sizes.items() if size}


def followed_by_grey(video_BTHWC: jax.Array, num_frames: int) -> jax.Array:
    """The first frame of videos in [-1, 1] and then grey ones, that many in all."""
    B, _, H, W, C = video_BTHWC.shape
    grey = jnp.zeros((B, num_frames - 1, H, W, C), video_BTHWC.dtype)
    return jnp.concatenate([video_BTHWC[:, :1], grey], axis=1)


def beside(latent_Bthwz: jax.Array, temporal: int) -> jax.Array:
    """extra_Bthwz: the mask of `temporal` channels, and the normalised latent of what `followed_by_grey` makes."""
    mask = jnp.zeros((*latent_Bthwz.shape[:-1], temporal), latent_Bthwz.dtype).at[:, 0].set(1.0)
    return jnp.concatenate([mask, latent_Bthwz], axis=-1)


def is_known(given: Given, num_latent_frames: int) -> jax.Array:
    """Where latents are known, given a first frame that is; to broadcast against latent_Bthwz."""
    is_first = jnp.arange(num_latent_frames)[:, None, None, None] == 0
    return is_first if given.is_known_B is None else is_first & given.is_known_B[:, None, None, None, None]


def check(dit: Any, coder: Autoencoder) -> None:
    """Refuses to train a network to begin with an image, on latents in which that has no place of its own.

    Raises:
      ValueError: if it has other channels than the image's latent and mask, it is told one time for all of a clip, or
        the first latent frame is not the first frame alone.
    """
    if coder.grouping != "causal":
        raise ValueError(
            f"grouping={coder.grouping!r} of the autoencoder: its first latent frame is not the clip's first frame "
            "alone, which a network that begins with an image is given; expected 'causal'."
        )
    if getattr(dit, "extra_channels", 0):
        _check_channels(dit, coder.temporal, coder.latent_channels)
    else:
        _check_levels(dit)


def check_needless(dit: Any) -> None:
    """Raises ValueError for a network that makes no clip without an image."""
    if getattr(dit, "extra_channels", 0) or getattr(dit, "image_width", 0):
        raise ValueError("this model makes clips that begin with an image: give one (`image=`, `--image FILE`).")


def _check_channels(dit: Any, temporal: int, latent_channels: int) -> None:
    if dit.extra_channels != temporal + latent_channels:
        raise ValueError(
            f"extra_channels={dit.extra_channels}: expected {temporal + latent_channels}, a mask for each of the "
            f"{temporal} frames of a latent frame and {latent_channels} channels of the image's latent."
        )


def _check_levels(dit: Any) -> None:
    if not isinstance(dit, DiT) or dit.time_path not in MODULATED or dit.patch[0] != 1:
        raise ValueError(
            "image: this network cannot hold a first frame: it is told one time for all of a clip. Expected a "
            "transformer with time_path='adaln_zero' or 'adaln' and patches of one latent frame."
        )


def _repeat(array: jax.Array, batch_size: int) -> jax.Array:
    return jnp.broadcast_to(array, (batch_size, *array.shape[1:]))
