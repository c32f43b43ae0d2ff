# SPDX-License-Identifier: Apache-2.0
import pytest
from ml_collections import ConfigDict

from stvdm.data.buckets import Bucket, assign, parse, validate


def test_parse_reads_every_way_to_write_one():
    expected = Bucket(17, 64, 96, 8, 0.5)
    fields = {"num_frames": 17, "height": 64, "width": 96, "batch_size": 8, "weight": 0.5}
    assert parse([expected, fields, ConfigDict(fields), (17, 64, 96, 8, 0.5)]) == (expected,) * 4
    assert parse([(1, 64, 64)]) == (Bucket(1, 64, 64, None, 1.0),)
    with pytest.raises(ValueError, match=r"expected num_frames, height, width"):
        parse([(17, 64)])
    with pytest.raises(ValueError, match=r"bucket=\{'frames': 17\}"):
        parse([{"frames": 17}])


def test_validate_tells_all_at_once():
    with pytest.raises(ValueError) as caught:
        validate(parse([(0, 64, 64), (17, 64, 64, 6), (9, 64, 64, 8, 0.0), (5, 8, 8), (5, 8, 8)]), num_shards=4)
    said = str(caught.value)
    for part in (
        "bucket 0x64x64: expected positive whole numbers",
        "batch_size=6: expected a positive multiple of the 4 parts it is split into (mesh data x fsdp), so use e.g. 8",
        "weight=0.0: expected above 0",
        "bucket 5x8x8: batch_size=None and no global_batch",
        "bucket 5x8x8: listed more than once",
    ):
        assert part in said
    validate(parse([(17, 64, 64, 8), (1, 64, 64)]), global_batch=12, num_shards=4)
    with pytest.raises(ValueError, match="expected at least one"):
        validate([], global_batch=1)


def test_assign_by_length_and_aspect():
    wide, tall, square, image = Bucket(17, 48, 80), Bucket(17, 80, 48), Bucket(17, 64, 64), Bucket(1, 64, 64)
    long, large = Bucket(33, 64, 64), Bucket(17, 128, 128)
    buckets = (wide, tall, square, image, long, large)

    def chosen(*shape):
        return {buckets[k] for k in assign(shape, buckets)}

    assert chosen(20, 1080, 1920) == {wide, image}
    assert chosen(20, 1920, 1080) == {tall, image}
    assert chosen(17, 500, 510) == {square, large, image}  # both sizes of its aspect
    assert chosen(40, 500, 510) == {square, large, image, long}
    assert chosen(16, 500, 510) == {image}  # too short for a clip, still a picture
    assert chosen(1, 1080, 1920) == {image}
    # Aspects are compared as ratios: 4:3 lies between 1:1 and 5:3, nearer to 5:3 in the logarithm.
    assert chosen(20, 300, 400) == {wide, image}
