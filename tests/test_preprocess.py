# SPDX-License-Identifier: Apache-2.0
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stvdm import preprocess as preprocessing
from stvdm.data.loader import KineticShapes, make_loader, read_clip
from stvdm.data.records import RecordSource
from stvdm.data.video import BadVideo

BUCKETS = [(5, 16, 16), (1, 16, 24)]


class Encoder:
    """Means over blocks of pixels, every second frame, as a latent; counts its calls and may die at one of them."""

    def __init__(self, die_at: int | None = None):
        self.calls, self.die_at, self.shapes = 0, die_at, set()

    def __call__(self, video_BTHWC: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.shapes.add(video_BTHWC.shape)
        B, T, H, W, C = video_BTHWC.shape
        frames = video_BTHWC[:, ::2].astype(np.float32) / 127.5 - 1
        return frames.reshape(B, -(-T // 2), H // 8, 8, W // 8, 8, C).mean((3, 5))


def run(directory, encoder, source=None, **options):
    options = {"buckets": BUCKETS, "batch_size": 3, "examples_per_shard": 5, "dtype": "float32", "seed": 1, **options}
    return preprocessing.preprocess(encoder, source or KineticShapes(num_clips=7), directory, **options)


def test_latents_are_those_of_the_clips(tmp_path):
    encoder = Encoder()
    metadata = run(tmp_path, encoder, about={"checkpoint": "abc"})
    assert metadata["count"] == 14
    assert metadata["about"]["checkpoint"] == "abc"
    assert metadata["about"]["fps"] == 8.0
    assert encoder.shapes == {(3, 5, 16, 16, 3), (3, 1, 16, 24, 3)}  # two compilations, also for the odd ends
    source, videos = RecordSource(tmp_path), KineticShapes(num_clips=7)
    for k in range(14):
        bucket = preprocessing.bucketing.Bucket(*BUCKETS[k // 7])
        clip = read_clip(videos, k % 7, bucket, np.random.default_rng([1, *bucket.shape, k % 7, 0]))
        stored = source.read(k)
        np.testing.assert_array_equal(stored["latent"], Encoder()(clip["video"][None])[0])
        assert stored["caption"] == clip["caption"]
        assert tuple(source.shapes[k]) == bucket.shape
    batch = next(make_loader(source, buckets=[(5, 16, 16, 4)], seed=0))
    assert batch["latent"].shape == (4, 3, 2, 2, 3)


@pytest.mark.parametrize("die_at", [1, 3, 6])
def test_a_run_cut_short_goes_on_to_the_same_bytes(tmp_path, die_at):
    whole = Encoder()
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Encoder(die_at))
    with pytest.raises(ValueError, match=r"expected a directory with metadata\.json"):
        RecordSource(tmp_path / "cut")
    rest = Encoder()
    assert run(tmp_path / "cut", rest) == expected
    assert rest.calls + die_at - 1 <= whole.calls + 1  # what was finished is not done again
    again = Encoder()
    assert run(tmp_path / "cut", again) == expected
    assert again.calls == 0


def test_other_settings_do_not_mix_in(tmp_path):
    run(tmp_path, Encoder())
    for changed in ({"seed": 2}, {"dtype": "float16"}, {"about": {"checkpoint": "x"}}, {"buckets": BUCKETS[:1]}):
        with pytest.raises(ValueError, match="written from other data or settings"):
            run(tmp_path, Encoder(), **changed)


def test_float16_is_near_and_overflow_is_told(tmp_path):
    run(tmp_path / "32", Encoder())
    run(tmp_path / "16", Encoder(), dtype="float16")
    exact, near = RecordSource(tmp_path / "32"), RecordSource(tmp_path / "16")
    for k in range(14):
        np.testing.assert_allclose(near.read(k)["latent"], exact.read(k)["latent"], atol=5e-4)
        assert near.read(k)["latent"].dtype == np.float32
    with pytest.raises(ValueError, match=r"not finite as float16.*use dtype='float32'"):
        run(tmp_path / "large", lambda video: Encoder()(video) * 1e6, dtype="float16")


def test_clips_that_cannot_be_read_are_left_out_and_named(tmp_path):
    class Flaky(KineticShapes):
        def read(self, index, **shape):
            if index == 4:
                raise BadVideo("a damaged frame in it", "four.mp4")
            return super().read(index, **shape)

    metadata = run(tmp_path, Encoder(), Flaky(num_clips=7))
    assert metadata["count"] == 12
    assert metadata["skipped"] == {"four.mp4": "a damaged frame in it"}


def test_a_disk_that_goes_ends_the_run_which_then_goes_on(tmp_path):
    class Mounted(KineticShapes):
        is_there = False

        def read(self, index, **shape):
            if index >= 20 and not self.is_there:
                raise BadVideo("No such file or directory", f"{index}.mp4")
            return super().read(index, **shape)

    source, options = Mounted(num_clips=100), {"buckets": [(1, 8, 8)], "examples_per_shard": 90}
    with pytest.raises(ValueError, match="64 clips in a row could not be read, the last as 83.mp4: No such file"):
        run(tmp_path, Encoder(), source, **options)
    source.is_there = True
    assert run(tmp_path, Encoder(), source, **options)["count"] == 100


def test_several_clips_of_each_example_differ(tmp_path):
    run(tmp_path, Encoder(), buckets=[(1, 16, 16)], clips_per_example=3)
    source = RecordSource(tmp_path)
    assert len(source) == 21
    assert source.read(0)["caption"] == source.read(1)["caption"] == source.read(2)["caption"]
    assert (source.read(0)["latent"] != source.read(1)["latent"]).any()
    with pytest.raises(ValueError, match="these are latents already"):
        run(tmp_path / "b", Encoder(), source)
    with pytest.raises(ValueError, match="dtype='int8': expected"):
        run(tmp_path / "b", Encoder(), dtype="int8")


def read(captions):
    """As a tower: a caption of n letters is n real tokens, each the letter's number."""
    text_BSE, mask_BS = np.full((len(captions), 200, 2), -1.0), np.zeros((len(captions), 200), bool)
    for text_SE, mask_S, caption in zip(text_BSE, mask_BS, captions, strict=True):
        text_SE[: len(caption)] = np.frombuffer(caption.encode(), np.uint8)[:, None]
        mask_S[: len(caption)] = True
    return text_BSE, mask_BS


def test_text_lies_beside_latents_without_its_padding(tmp_path):
    metadata = run(tmp_path, Encoder(), read=read)
    assert metadata["schema"]["text"] == {"dtype": "float32", "ndim": 2}
    source = RecordSource(tmp_path)
    for k in range(14):
        example = source.read(k)
        assert bytes(example["text"][:, 1].astype(np.uint8)).decode() == example["caption"]
    batch = next(make_loader(source, buckets=[(5, 16, 16, 4)], seed=0, num_workers=1))
    assert [len(text) for text in batch["text"]] == [len(caption) for caption in batch["caption"]]
    with pytest.raises(ValueError, match=r"text of .*: not finite as float16 .* or look at the tower"):
        run(tmp_path / "b", Encoder(), read=lambda c: (read(c)[0] * 1e6, read(c)[1]), dtype="float16")


def test_what_networks_are_given_of_first_frames_lies_beside_latents(tmp_path):
    """The same clips are encoded, begun and looked at, also where a batch is filled up."""
    encode = Encoder()

    def begin(videos):
        return encode(np.concatenate([videos[:, :1], np.full_like(videos[:, 1:], 127)], axis=1))

    def look(images):
        return np.stack([image.mean((1, 2))[:, None] for image in images])

    preprocessing.preprocess(
        encode,
        KineticShapes(num_clips=5),
        tmp_path,
        buckets=BUCKETS[:1],
        begin=begin,
        look=look,
        batch_size=4,
        dtype="float32",
    )
    source = RecordSource(tmp_path)
    loader = make_loader(source, buckets=[(5, 16, 16, 5)], seed=0)
    batch = next(loader)
    loader.close()
    assert batch["image_latent"].shape == batch["latent"].shape == (5, 3, 2, 2, 3)
    np.testing.assert_array_equal(batch["image_latent"][:, 0], batch["latent"][:, 0])  # the encoder takes frames alone
    np.testing.assert_allclose(batch["image_latent"][:, 1:], 127 / 127.5 - 1, atol=1e-6)
    assert batch["image_tokens"].shape == (5, 16, 1)
    means = (batch["image_tokens"].mean((1, 2)), (batch["latent"][:, 0].mean((1, 2, 3)) + 1) * 127.5)
    np.testing.assert_allclose(*means, rtol=1e-5)
    assert set(source.metadata["schema"]) == {"latent", "image_latent", "image_tokens", "shape", "caption"}


def test_several_hosts_write_what_one_writes(tmp_path):
    whole = run(tmp_path / "whole", Encoder(), read=read)
    encoders = [Encoder(), Encoder()]
    assert run(tmp_path / "parts", encoders[0], read=read, host=(0, 2)) == {}
    assert run(tmp_path / "parts", encoders[1], read=read, host=(1, 2)) == whole
    assert run(tmp_path / "parts", Encoder(die_at=1), read=read, host=(0, 2)) == whole  # nothing is left to do
    assert 0 < encoders[1].calls < encoders[0].calls
    with pytest.raises(ValueError, match=r"host=\(2, 2\): expected \(i, n\) with 0 <= i < n"):
        run(tmp_path / "parts", Encoder(), host=(2, 2))


def test_hosts_that_wait_for_the_others_all_return_what_was_written(tmp_path):
    """Also when all come to the end at once, and each of them writes the metadata."""
    whole = run(tmp_path / "whole", Encoder())
    waits = []

    def one_of_three(i):
        def wait():
            waits.append(i)
            time.sleep(0.001)

        return run(tmp_path / "parts", Encoder(), host=(i, 3), wait=wait)

    with ThreadPoolExecutor(3) as hosts:
        assert list(hosts.map(one_of_three, range(3))) == [whole] * 3
    with ThreadPoolExecutor(8) as hosts:
        assert list(hosts.map(one_of_three, [0, 1, 2] * 8)) == [whole] * 24
    assert len(RecordSource(tmp_path / "parts")) == 14
    assert not list((tmp_path / "parts").glob("*.unfinished"))
