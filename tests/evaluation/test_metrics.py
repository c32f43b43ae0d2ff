# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.evaluation import metrics


def random_clips(seed=0, shape=(2, 3, 20, 17, 3)):
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, shape).astype(np.float32)


def test_psnr_of_a_known_error():
    video = random_clips()
    decoded = video + np.array([0.1, 0.01], np.float32).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(metrics.psnr(decoded, video, data_range=2.0), [26.0206, 46.0206], atol=1e-2)
    assert np.isinf(metrics.psnr(video, video, data_range=2.0)).all()
    as_bytes = np.uint8((video + 1) * 127.5)
    shifted = np.uint8(np.clip(as_bytes, 1, None) - 1)
    assert (metrics.psnr(as_bytes, shifted, data_range=255.0) >= 48.13).all()  # 20 log10(255); bytes do not wrap


def reference_ssim(x, y, data_range):
    """Wang et al. written out window by window, in float64."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (z[i : i + 11, j : j + 11].astype(np.float64) for z in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_ssim_is_wangs(noise):
    video = np.cumsum(random_clips(), axis=2) * 0.3
    decoded = video + noise * random_clips(1)
    expected = [
        np.mean([reference_ssim(a[t, ..., c], b[t, ..., c], 2.0) for t in range(3) for c in range(3)])
        for a, b in zip(decoded, video, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(decoded, video, data_range=2.0), expected, atol=2e-5)
    np.testing.assert_allclose(metrics.ssim(video, video, data_range=2.0), 1, atol=1e-6)


def test_ssim_sees_blur_more_than_a_shift_of_brightness():
    video = 0.5 + 0.2 * random_clips(shape=(1, 1, 32, 32, 1))
    blurred = (video + np.roll(video, 1, 2) + np.roll(video, 1, 3)) / 3
    brighter = video + np.sqrt(np.mean((blurred - video) ** 2))  # the same error in PSNR
    blur, light = (metrics.ssim(x, video, data_range=1.0)[0] for x in (blurred, brighter))
    assert blur < light - 0.1


def moving(noise=0.0):
    """A bar that moves one pixel a frame, with independent noise on each frame."""
    frames = np.stack([np.roll(np.eye(1, 24)[0] * 2 - 1, t) for t in range(20)])
    clip = np.broadcast_to(frames[None, :, None, :, None], (1, 20, 24, 24, 1)).astype(np.float32)
    return clip + noise * np.random.default_rng(0).normal(size=clip.shape).astype(np.float32)


def test_flicker_is_vbenchs_and_takes_motion_for_flicker():
    still = np.zeros((1, 4, 2, 2, 3), np.float32)
    blinking = still + np.array([0, 255, 0, 255], np.float32).reshape(1, 4, 1, 1, 1)
    np.testing.assert_allclose(metrics.flicker(np.concatenate([still, blinking])), [0, 255])
    np.testing.assert_allclose(metrics.flicker(moving()), 2 * 2 / 24, rtol=1e-5)


def test_excess_flicker_is_zero_for_motion_and_twice_the_variance_for_noise():
    clip = moving()
    np.testing.assert_allclose(metrics.excess_flicker(clip, clip), 0)
    np.testing.assert_allclose(metrics.excess_flicker(moving(noise=0.2), clip), 2 * 0.2**2, rtol=0.1)
    still = np.broadcast_to(clip.mean(axis=1, keepdims=True), clip.shape)
    assert metrics.excess_flicker(still, clip) < -0.1  # motion lost


def test_change_error_is_pleased_by_the_reference_alone():
    clip = moving()
    change = metrics.flicker(clip)  # 2 * 2 / 24, of a bar that goes on by a pixel
    still = np.broadcast_to(clip.mean(axis=1, keepdims=True), clip.shape)
    np.testing.assert_allclose(metrics.change_error(clip, clip), 0)
    np.testing.assert_allclose(metrics.change_error(clip + 0.5, clip), 0, atol=1e-6)  # what it cannot see
    np.testing.assert_allclose(metrics.change_error(still, clip), change, rtol=1e-5)  # frozen
    np.testing.assert_allclose(metrics.change_error(0.5 * clip, clip), change / 2, rtol=1e-5)  # faint
    np.testing.assert_allclose(metrics.change_error(clip[:, :, :, ::-1], clip), 2 * change, rtol=1e-5)  # elsewhere
    noisy = 2 * 0.2 / np.sqrt(np.pi)  # mean |difference| of two draws of deviation 0.2
    np.testing.assert_allclose(metrics.change_error(moving(noise=0.2), clip), noisy, rtol=0.02)
    two = np.concatenate([clip, still])
    np.testing.assert_allclose(metrics.change_error(two, np.concatenate([clip, clip])), [0, change[0]], rtol=1e-5)


def test_latent_flicker_is_the_noise_that_an_encoder_lets_through():
    video = np.full((2, 16, 12, 12, 3), 128, np.uint8)
    each_frame = metrics.latent_flicker(lambda clip: jnp.asarray(clip, jnp.float32), video, levels=4.0)
    np.testing.assert_allclose(each_frame, 4.0, rtol=0.03)  # the noise itself (and a little rounding)
    four_at_once = metrics.latent_flicker(lambda clip: clip.reshape(2, 4, 4, 12, 12, 3).mean(2), video, levels=4.0)
    np.testing.assert_allclose(four_at_once, 2.0, rtol=0.05)


def test_they_can_be_jitted_and_refuse_what_they_cannot_measure():
    score = jax.jit(lambda a, b: metrics.psnr(a, b, data_range=2.0) + metrics.ssim(a, b, data_range=2.0))
    assert jnp.isfinite(score(random_clips(), random_clips(1))).all()
    with pytest.raises(ValueError, match="window of 11x11"):
        metrics.ssim(np.zeros((1, 2, 8, 16, 3)), np.zeros((1, 2, 8, 16, 3)), data_range=2.0)
    with pytest.raises(ValueError, match="num_frames=1: .* at least 2"):
        metrics.flicker(np.zeros((1, 1, 8, 8, 3)))
