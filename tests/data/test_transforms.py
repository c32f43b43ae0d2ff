# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from stvdm.data import transforms


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (17, 31), (96, 96)])
@pytest.mark.parametrize("target", [(32, 32), (24, 48), (48, 24), (100, 70)])
def test_aspect_is_kept(size, target):
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([(rows + 0.5) * 255 / height, (columns + 0.5) * 255 / width, rows * 0], -1).astype(np.uint8)[None]
    out = transforms.resize_and_crop(ramp, *target)[0].astype(float)
    assert out.shape == (*target, 3)
    scale = max(target[0] / height, target[1] / width)
    # A gradient of 255 over the height becomes one of 255 over scale * height, and the same for the width.
    inner = out[6:-6, 6:-6]
    assert np.diff(inner[:, :, 0], axis=0).mean() == pytest.approx(255 / (height * scale), rel=0.08)
    assert np.diff(inner[:, :, 1], axis=1).mean() == pytest.approx(255 / (width * scale), rel=0.08)
    centre = out[target[0] // 2 - 1 : target[0] // 2 + 1, target[1] // 2 - 1 : target[1] // 2 + 1, :2].mean((0, 1))
    np.testing.assert_allclose(centre, 127, atol=6)


def test_crop_position_and_refusal():
    video = np.arange(6 * 8).reshape(1, 6, 8, 1)
    np.testing.assert_array_equal(transforms.crop(video, 2, 3, position=(0, 0)), video[:, :2, :3])
    np.testing.assert_array_equal(transforms.crop(video, 2, 3, position=(1, 1)), video[:, -2:, -3:])
    with pytest.raises(ValueError, match=r"crop=\(7, 3\): larger than the video \(6, 8\)"):
        transforms.crop(video, 7, 3)


def test_clips_are_consecutive_and_start_anywhere():
    video = np.arange(20).reshape(20, 1, 1, 1)
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(200):
        clip = transforms.choose_clip(video, 17, rng=rng).ravel()
        np.testing.assert_array_equal(np.diff(clip), 1)
        starts.add(int(clip[0]))
    assert starts == {0, 1, 2, 3}
    assert transforms.choose_clip(video, 17)[0] == 0
    with pytest.raises(ValueError, match="num_frames=21: the video has 20"):
        transforms.choose_clip(video, 21)
    np.testing.assert_array_equal(transforms.flip(np.arange(3).reshape(1, 1, 3, 1)).ravel(), [2, 1, 0])
