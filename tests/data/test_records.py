# SPDX-License-Identifier: Apache-2.0
import json
import pickle

import numpy as np
import pytest

from stvdm.data import records
from stvdm.data.records import RecordSource
from stvdm.data.video import BadVideo


def examples(first: int, count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (10, 5, 6, 8, 3), np.uint8)
    return [{"video": clips[k], "caption": f"clip {k} – Größe", "index": k} for k in range(first, first + count)]


def test_encoding_is_the_identity():
    example = {
        "latent": np.random.default_rng(0).normal(size=(3, 2, 4, 8)).astype(np.float16),
        "empty": np.zeros((0, 3), np.int64),
        "caption": "ein Bär läuft",
        "shape": [9, 16, 32],
        "index": np.int64(7),
    }
    back = records.decode(records.encode(example))
    assert back["latent"].dtype == np.float16
    for key, value in example.items():
        np.testing.assert_array_equal(back[key], value)


def test_shards_are_read_in_order_and_from_a_pickle(tmp_path):
    records.write_shard(tmp_path, 1, examples(4, 3))
    records.write_shard(tmp_path, 0, examples(0, 4))
    metadata = records.finish(tmp_path, num_shards=2, about={"made by": "hand"})
    assert metadata["count"] == 7
    source = pickle.loads(pickle.dumps(RecordSource(tmp_path)))
    assert (len(source), source.kind, source.metadata["about"]) == (7, "video", {"made by": "hand"})
    np.testing.assert_array_equal(source.shapes, [[5, 6, 8]] * 7)
    for k, example in enumerate(examples(0, 7)):
        back = source.read(k)
        np.testing.assert_array_equal(back["video"], example["video"])
        assert (back["caption"], back["index"]) == (example["caption"], k)
        assert source.caption(k) == example["caption"]


def test_fingerprint_follows_the_content(tmp_path):
    prints = []
    for name, first in (("a", 0), ("b", 0), ("c", 1)):
        records.write_shard(tmp_path / name, 0, examples(first, 2))
        prints.append(records.finish(tmp_path / name, num_shards=1)["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_a_shard_cut_short_does_not_count_and_is_written_again(tmp_path):
    def cut_short():
        yield from examples(0, 2)
        raise KeyboardInterrupt

    records.write_shard(tmp_path, 0, examples(0, 2), job="mine")
    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path, 1, cut_short(), job="mine")
    assert records.finished_shards(tmp_path, job="mine") == {0}
    with pytest.raises(ValueError, match=r"shards \[1\] of 2 are missing"):
        records.finish(tmp_path, num_shards=2)
    with pytest.raises(ValueError, match=r"expected a directory with metadata\.json"):
        RecordSource(tmp_path)
    with pytest.raises(ValueError, match="written from other data or settings"):
        records.finished_shards(tmp_path, job="another")
    records.write_shard(tmp_path, 1, examples(2, 2), job="mine")
    records.finish(tmp_path, num_shards=2)
    assert [RecordSource(tmp_path).read(k)["index"] for k in range(4)] == [0, 1, 2, 3]
    assert not list(tmp_path.glob("*.unfinished"))


def test_damage_is_noticed(tmp_path):
    records.write_shard(tmp_path, 0, examples(0, 3))
    records.finish(tmp_path, num_shards=1)
    path = tmp_path / "00000.array_record"
    data = bytearray(path.read_bytes())
    position = data.find(examples(1, 1)[0]["caption"].encode())
    data[100 if position < 0 else position] ^= 0xFF
    path.write_bytes(data)
    source = RecordSource(tmp_path)
    with pytest.raises(BadVideo, match="damaged record"):
        [source.read(k) for k in range(3)]
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({**metadata, "version": 99}))
    with pytest.raises(ValueError, match="version 99, expected 2"):
        RecordSource(tmp_path)


def test_nothing_written_is_an_error(tmp_path):
    records.write_shard(tmp_path, 0, [])
    with pytest.raises(ValueError, match="no example in it"):
        records.finish(tmp_path, num_shards=1)
