# SPDX-License-Identifier: Apache-2.0
"""Distances between clips, and how much a clip flickers: pure functions, one number for each clip of a batch.

PSNR and SSIM compare a clip with the one it was made from; flicker looks at one clip, excess flicker and the error of
change at two that should move alike.
Each docstring says what its number cannot see.

    scores = {"psnr": psnr(decoded, video, data_range=2.0), "ssim": ssim(decoded, video, data_range=2.0)}
    flickers = excess_flicker(decoded, video)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def psnr(decoded_BTHWC: jax.Array, video_BTHWC: jax.Array, *, data_range: float) -> jax.Array:
    """Peak signal-to-noise ratio of each clip, in dB: 10 log10(data_range² / mean squared error); (B,).

    The squared error is averaged over all values of a clip before the logarithm. ``data_range`` is the span of the
    values: 2 for [-1, 1], 255 for bytes. Equal clips give infinity.

    Cannot see: where the error is. A sharp clip that is shifted by a pixel scores below a blurred one, and a small
    object that is lost altogether costs nearly nothing in a large frame.
    """
    error = jnp.asarray(decoded_BTHWC, jnp.float32) - jnp.asarray(video_BTHWC, jnp.float32)
    return 10.0 * jnp.log10(data_range**2 / jnp.mean(jnp.square(error), axis=(1, 2, 3, 4)))


def ssim(decoded_BTHWC: jax.Array, video_BTHWC: jax.Array, *, data_range: float) -> jax.Array:
    """Structural similarity of each clip, at most 1, averaged over frames and channels; (B,).

    Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861): means, variances and covariance under a Gaussian window
    of 11 x 11 and deviation 1.5, constants (0.01 L)² and (0.03 L)², where the window lies inside the frame.

    Cannot see: time (a clip with its frames shuffled alike scores 1), nor colour as such: channels count separately.

    Raises:
      ValueError: for frames smaller than the window.
    """
    B, T, H, W, C = video_BTHWC.shape
    if min(H, W) < _WINDOW:
        raise ValueError(f"frames of {H}x{W}: SSIM slides a window of {_WINDOW}x{_WINDOW}, so use larger ones.")

    def planes(clip: jax.Array) -> jax.Array:
        return jnp.asarray(clip, jnp.float32).transpose(0, 1, 4, 2, 3).reshape(B * T * C, H, W)

    x, y = planes(decoded_BTHWC), planes(video_BTHWC)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x, variance_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean((luminance * structure).reshape(B, -1), axis=1)


def flicker(video_BTHWC: jax.Array) -> jax.Array:
    """Mean absolute difference between neighbouring frames, in units of the values; (B,).

    VBench's temporal flickering (https://arxiv.org/abs/2311.17982, section 3.2) is (255 - this) / 255 for bytes in
    0 to 255, taken there on static scenes only. Cannot see: why pixels change. Motion counts as flicker, and a frozen
    clip scores best.

    Raises:
      ValueError: for a clip of one frame.
    """
    return jnp.mean(jnp.abs(_differences(video_BTHWC)), axis=(1, 2, 3, 4))


def excess_flicker(decoded_BTHWC: jax.Array, video_BTHWC: jax.Array) -> jax.Array:
    """Energy of the frame-to-frame change of a clip that its reference does not have; (B,), squared units.

        mean |d decoded|² - mean |d video|²,       d = difference of neighbouring frames

    True motion is in both and cancels: 0 for a faithful clip, 2 v for independent noise of variance v on each frame,
    below 0 where motion was blurred away. Cannot see: flicker that takes the place of motion of the same energy, and
    of what is above 0 and below it a mean over clips cancels; look at `change_error` beside it.
    """
    decoded, video = (
        jnp.mean(jnp.square(_differences(clip)), axis=(1, 2, 3, 4)) for clip in (decoded_BTHWC, video_BTHWC)
    )
    return decoded - video


def change_error(decoded_BTHWC: jax.Array, video_BTHWC: jax.Array) -> jax.Array:
    """Mean absolute error of the frame-to-frame change of a clip, in units of the values; (B,), at least 0.

        mean |d decoded - d video|,       d = difference of neighbouring frames

    0 where every change is that of the reference. A change too many counts like one that is lacking, so that blur and
    freezing make a faithful clip worse: a frozen one scores the `flicker` of its reference, which is what to hold a
    score against, since noise on a ground that stands still may cost more than lost motion of something small. Cannot
    see: an error that all frames have alike (a shift of colour, a blurred backdrop that stands still); look at PSNR
    beside it.

    Raises:
      ValueError: for a clip of one frame.
    """
    return jnp.mean(jnp.abs(_differences(decoded_BTHWC) - _differences(video_BTHWC)), axis=(1, 2, 3, 4))


def latent_flicker(
    encode: Callable[[np.ndarray], jax.Array], video_BTHWC: np.ndarray, *, levels: float = 4.0, seed: int = 0
) -> np.ndarray:
    """How far noise on the pixels moves the latent of each clip: root mean square, in units of the latent; (B,).

        rms(encode(video + noise) - encode(video + other noise)) / √2,       noise of deviation ``levels`` of 255

    Noise is new in every frame, as a camera's is, so what it moves is what flickers. Of normalised latents the unit is
    their deviation, which makes encoders comparable. Cannot see: flicker that motion causes, of a shape that crosses
    the grid of the latent; nor what a decoder makes of it.

    Args:
      encode: uint8 video_BTHWC -> latent_Bthwz.
      video_BTHWC: uint8.
    """
    rng = np.random.default_rng(seed)

    def noisy() -> np.ndarray:
        noise = rng.normal(0.0, levels, video_BTHWC.shape)
        return np.clip(np.round(video_BTHWC + noise), 0, 255).astype(np.uint8)

    one, other = (np.asarray(encode(noisy()), np.float64) for _ in range(2))
    return np.sqrt(np.square(one - other).mean(axis=(1, 2, 3, 4)) / 2)


_WINDOW = 11


def _smooth(planes: jax.Array) -> jax.Array:
    """Gaussian window of deviation 1.5 where it lies inside; (n, H, W) -> (n, H - 10, W - 10), as two products."""
    H, W = planes.shape[1:]
    exact = lax.Precision.HIGHEST  # variances are small differences of large numbers
    return jnp.einsum("yh,nhw,xw->nyx", _window_matrix(H), planes, _window_matrix(W), precision=exact)


def _window_matrix(size: int) -> np.ndarray:
    """(size - 10, size): the window, one step further in each row."""
    weights = np.exp(-0.5 * np.square((np.arange(_WINDOW) - _WINDOW // 2) / 1.5))
    rows = size - _WINDOW + 1
    matrix = np.zeros((rows, size), np.float32)
    for i in range(rows):
        matrix[i, i : i + _WINDOW] = weights / weights.sum()
    return matrix


def _differences(video_BTHWC: jax.Array) -> jax.Array:
    if video_BTHWC.shape[1] < 2:
        raise ValueError(f"num_frames={video_BTHWC.shape[1]}: flicker is change over time, so use at least 2 frames.")
    return jnp.diff(jnp.asarray(video_BTHWC, jnp.float32), axis=1)
