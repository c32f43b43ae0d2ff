# SPDX-License-Identifier: Apache-2.0
"""The order of data: a pure function of (sources, buckets, seed, step), whoever reads it."""

import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from stvdm import config as base
from stvdm import preprocess
from stvdm.data import loader as loading
from stvdm.data import records
from stvdm.data.folder import FolderSource
from stvdm.data.loader import KineticShapes, check_position, make_loader

BUCKETS = [(5, 16, 16, 4, 2.0), (1, 16, 24, 8, 1.0)]


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def make(source=None, **options):
    source = source or KineticShapes(num_clips=50)
    return make_loader(source, **{"buckets": BUCKETS, "seed": 3, **options})


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"video", "caption", "index"}
        assert batch["caption"] == other["caption"]
        np.testing.assert_array_equal(batch["index"], other["index"])
        np.testing.assert_array_equal(batch["video"], other["video"])


def test_batches_are_as_the_buckets_say_in_their_proportion():
    batches = take(make(), 30)
    shapes = Counter(batch["video"].shape for batch in batches)
    assert shapes == {(4, 5, 16, 16, 3): 20, (8, 1, 16, 24, 3): 10}
    for batch in batches:
        assert batch["video"].dtype == np.uint8
        assert batch["index"].dtype == np.int64
        assert len(batch["caption"]) == len(batch["video"]) == len(batch["index"])
        assert all(isinstance(caption, str) for caption in batch["caption"])


def test_an_epoch_shows_every_example_once_and_the_next_another_order():
    loader = make(KineticShapes(num_clips=24), buckets=[(5, 8, 8, 4)])
    indices = [batch["index"] for batch in take(loader, 12)]
    first, second = np.concatenate(indices[:6]), np.concatenate(indices[6:])
    assert sorted(first) == sorted(second) == list(range(24))
    assert (first != second).any()


def test_what_a_batch_holds_is_what_the_source_gives():
    source = KineticShapes(num_clips=50)
    batch = next(make(source, buckets=[(5, 16, 16, 4)]))
    for row, index in enumerate(batch["index"]):
        example = source.read(int(index), num_frames=5, height=16, width=16, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(batch["video"][row], example["video"])
        assert batch["caption"][row] == example["caption"]


@pytest.mark.parametrize("num_shards", [2, 4])
def test_however_rows_are_dealt_out_the_global_batches_are_the_same(num_shards, folder):
    for source in (KineticShapes(num_clips=50), FolderSource(folder, fps=8)):
        whole = take(make(source), 6)
        parts = [take(make(source, num_shards=num_shards, shards=(k,)), 6) for k in range(num_shards)]
        joined = [
            {
                "video": np.concatenate([part["video"] for part in step]),
                "index": np.concatenate([part["index"] for part in step]),
                "caption": [caption for part in step for caption in part["caption"]],
            }
            for step in zip(*parts, strict=True)
        ]
        assert_same(whole, joined)


def test_a_process_may_hold_parts_of_a_batch_that_are_no_neighbours():
    whole = make(buckets=[(5, 8, 8, 8)]).batch_at(3)
    part = make(buckets=[(5, 8, 8, 8)], num_shards=4, shards=(0, 2)).batch_at(3)
    rows = [0, 1, 4, 5]
    np.testing.assert_array_equal(part["video"], whole["video"][rows])
    np.testing.assert_array_equal(part["index"], whole["index"][rows])
    assert part["caption"] == [whole["caption"][row] for row in rows]


def test_any_number_of_workers_reads_the_same_batches(folder):
    source = FolderSource(folder, fps=8)
    assert_same(take(make(source), 7), take(make(source, num_workers=2), 7))


@pytest.mark.parametrize("step", [1, 5, 13])
def test_resuming_at_a_step_equals_not_having_stopped(step):
    through = make()
    whole = take(through, step + 4)
    assert through.step == through.position["step"] == step + 4
    resumed = make(start_step=step)
    assert_same(whole[step:], take(resumed, 4))
    assert resumed.position == through.position
    assert_same([whole[step]], [make().batch_at(step)])  # and any step can be replayed alone


def test_seed_changes_order_and_moments_and_clips_differ_between_epochs(folder):
    source = FolderSource(folder, fps=8)
    one, other = take(make(source), 2), take(make(source, seed=4), 2)
    assert any((a["index"] != b["index"]).any() for a, b in zip(one, other, strict=True))
    clips: dict[int, list[np.ndarray]] = {}
    for batch in take(make(source, buckets=[(5, 16, 16, 6)]), 9):
        for index, clip in zip(batch["index"], batch["video"], strict=True):
            clips.setdefault(int(index), []).append(clip)
    seen_twice = [c for c in clips.values() if len(c) > 1]
    assert sum((c[0] != c[1]).any() for c in seen_twice) > 0.8 * len(seen_twice) > 0


def test_a_file_that_breaks_later_is_replaced_by_the_next_good_one_and_counted(folder, tmp_path):
    for name in ("h264.mp4", "hevc.mp4", "vp9_odd.webm"):
        shutil.copy(folder / name, tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    source = FolderSource(tmp_path, fps=8)
    (tmp_path / "hevc.mp4").write_bytes(b"no longer a video")
    runs = []
    for options in ({}, {}, {"num_workers": 1}):
        loader = make(source, buckets=[(5, 16, 16, 3)], **options)
        with pytest.warns(UserWarning, match=r"hevc.mp4: not a video.*; the next good one is read in its place"):
            runs.append(take(loader, 4))
        assert loader.report.num_replaced == {"hevc.mp4": 4}
        assert loader.report.num_used == 3
        assert "hevc.mp4 (4 times): not a video" in str(loader.report)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    for batch in runs[0]:
        assert Counter(batch["caption"]) == {"h264.mp4": 1, "vp9_odd.webm": 2}  # the next in the list

    for name in source.names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 examples in a row could not be read"):
        make(source, buckets=[(5, 16, 16, 3)]).batch_at(0)


def test_images_and_clips_of_one_folder_go_to_their_buckets(folder):
    source = FolderSource(folder, fps=8)
    loader = make(source, buckets=[(17, 24, 32, 6), (17, 32, 24, 2), (1, 32, 32, 8)])
    assert loader.report.skipped.keys() == source.report.skipped.keys()
    batches = take(loader, 30)
    wide = {source.names[i] for b in batches if b["video"].shape[2:4] == (24, 32) for i in b["index"]}
    tall = {source.names[i] for b in batches if b["video"].shape[2:4] == (32, 24) for i in b["index"]}
    images = {source.names[i] for b in batches if b["video"].shape[1] == 1 for i in b["index"]}
    assert tall == {"rotated_90.mp4", "rotated_270.mp4", "portrait.mp4"}
    assert wide == set(source.names) - tall - {"still.png", "too_short.mp4"}
    assert images == set(source.names)

    without_images = make(source, buckets=[(17, 24, 32, 6)])
    assert without_images.report.skipped.keys() - source.report.skipped.keys() == {"still.png", "too_short.mp4"}
    assert without_images.report.skipped["too_short.mp4"] == "fits no bucket: it is 2x96x128, they are 17x24x32"


def test_flip_mirrors_half_and_only_when_asked():
    plain = take(make(buckets=[(5, 16, 16, 8)]), 6)
    flipped = take(make(buckets=[(5, 16, 16, 8)], flip=True), 6)
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        for one, other in zip(a["video"], b["video"], strict=True):
            same, mirror = (one == other).all(), (one[:, :, ::-1] == other).all()
            assert same or mirror
            mirrored += mirror and not same
    assert 12 <= mirrored <= 36


def test_latents_go_to_the_bucket_of_exactly_their_shape(tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(6, 3, 2, 2, 4)).astype(np.float16)
    shapes = [[9, 16, 16], [9, 16, 24]] * 3
    examples = [
        {"latent": z, "shape": s, "caption": f"{k}"} for k, (z, s) in enumerate(zip(latents, shapes, strict=True))
    ]
    records.write_shard(tmp_path, 0, examples)
    records.finish(tmp_path, num_shards=1)
    source = records.RecordSource(tmp_path)
    batch = next(make(source, buckets=[(9, 16, 16, 3)]))
    assert batch["latent"].dtype == np.float32
    assert sorted(batch["index"]) == [0, 2, 4]
    np.testing.assert_array_equal(batch["latent"], latents[batch["index"]].astype(np.float32))
    with pytest.raises(ValueError, match=r"bucket 5x16x16: none of the 6 examples fits it.*9x16x16 \(3\)"):
        make(source, buckets=[(5, 16, 16, 3)])
    with pytest.raises(ValueError, match="expected all videos or all latents"):
        make([source, KineticShapes()])


def test_a_share_is_held_out_of_each_bucket_and_never_trained_on(tmp_path):
    shapes = [[9, 16, 16]] * 40 + [[9, 16, 24]] * 3 + [[1, 16, 16]]
    examples = [
        {"latent": np.full((3, 2, 2, 4), k, np.float16), "shape": s, "caption": f"{k}"} for k, s in enumerate(shapes)
    ]
    records.write_shard(tmp_path, 0, examples)
    records.finish(tmp_path, num_shards=1)
    buckets = ((9, 16, 16, 4, 1.0), (9, 16, 24, 2, 1.0), (1, 16, 16, 1, 1.0))
    data = base.dit().data.copy_and_resolve_references()
    data.update(source="latents", path=str(tmp_path), validation_share=0.1, buckets=buckets)
    train, held_out = loading.configured_sources(data, seed=0)
    captions = [[source.caption(i) for i in range(len(source))] for source in (train, held_out)]
    assert captions[1] == ["9", "19", "29", "39", "42"]  # every tenth; one of the three; the only image is trained on
    assert sorted(captions[0] + captions[1], key=int) == [str(k) for k in range(44)]
    assert loading.served(held_out, buckets) == list(buckets[:2])
    with pytest.raises(ValueError, match=r"none takes one of the 5 held-out clips, the first of which is 9x16x16, so"):
        loading.served(held_out, buckets[2:])
    assert train.fingerprint != held_out.fingerprint
    for batch in take(make(train, buckets=buckets), 30):
        assert not set(batch["caption"]) & set(captions[1])
        np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0, 0], [float(c) for c in batch["caption"]])


def test_what_is_held_out_in_one_shape_is_trained_on_in_none(tmp_path):
    class Folder(KineticShapes):  # seven images, then videos, whose frames are images too
        shapes = [(1, 16, 16)] * 7 + [(5, 16, 16)] * 40

        def caption(self, index):
            return f"file {index}"

        def read(self, index, *, num_frames, **how):
            return {"video": np.zeros((num_frames, 16, 16, 3), np.uint8), "caption": self.caption(index)}

    def encode(video_BTHWC):
        return np.zeros((len(video_BTHWC), 1, 2, 2, 4))

    preprocess.preprocess(encode, Folder(num_clips=47), tmp_path, buckets=[(5, 16, 16), (1, 16, 16)])
    data = base.dit().data.copy_and_resolve_references()
    data.update(source="latents", path=str(tmp_path), buckets=((5, 16, 16, 4, 1.0), (1, 16, 16, 4, 1.0)))
    train, held_out = ([s.caption(i) for i in range(len(s))] for s in loading.configured_sources(data, seed=0))
    assert len(train) + len(held_out) == 87
    assert len(set(held_out)) == 4 and not set(train) & set(held_out)


def test_too_few_clips_to_hold_any_out_is_said(tmp_path):
    latent = {"latent": np.zeros((3, 2, 2, 4), np.float16), "shape": [9, 16, 16], "caption": "one"}
    records.write_shard(tmp_path, 0, [latent])
    records.finish(tmp_path, num_shards=1)
    data = base.dit().data.copy_and_resolve_references()
    data.update(source="latents", path=str(tmp_path), buckets=((9, 16, 16, 4, 1.0),))
    with pytest.warns(UserWarning, match="too few clips to hold any out"):
        train, held_out = loading.configured_sources(data, seed=0)
    assert len(train) == len(held_out) == 1
    with pytest.raises(ValueError, match="split='validation': data.validation_path='': expected the folder"):
        loading.configured_source(data, seed=0, split="validation")


def test_several_sources_are_one_long_list():
    one, other = KineticShapes(num_clips=10), KineticShapes(num_clips=6, seed=1)
    batches = take(make([one, other], buckets=[(5, 8, 8, 4)]), 4)
    captions = {int(i): c for b in batches for i, c in zip(b["index"], b["caption"], strict=True)}
    assert sorted(captions) == list(range(16))
    rng = np.random.default_rng(0)
    assert captions[12] == other.read(2, num_frames=5, height=8, width=8, rng=rng)["caption"]
    assert loading.fingerprint([one, other]) != loading.fingerprint([other, one])


def test_captions_are_all_of_them_or_some_from_everywhere():
    one, other = KineticShapes(num_clips=10), KineticShapes(num_clips=6, seed=1)
    loader = make([one, other])
    every = [source.caption(i) for source in (one, other) for i in range(len(source))]
    assert list(loader.captions()) == list(loader.captions(16)) == list(loader.captions(20)) == every
    assert list(loader.captions(4)) == [every[i] for i in (0, 4, 8, 12)]
    assert loader.caption_of(12) == other.caption(2)


def test_position_is_json_and_refuses_other_data():
    saved = json.loads(json.dumps({**make().position, "step": 70}))
    assert check_position(saved, make(num_workers=2, num_shards=2).position) == 70
    for changed, name in (
        (make(seed=4), "seed: saved 3, now 4"),
        (make(KineticShapes(num_clips=51)), "fingerprint"),
        (make(buckets=[(5, 16, 16, 4)]), "buckets"),
        (make(flip=True), "flip"),
    ):
        with pytest.raises(ValueError, match=name):
            check_position(saved, changed.position)


def configured(source, path="", **settings):
    data = base.dit().data.copy_and_resolve_references()
    data.update(source=source, path=str(path), **settings)
    return loading.configured_source(data, seed=0)


def test_a_config_names_one_of_the_kinds(folder):
    assert len(configured("kinetic_shapes", num_clips=7)) == 7
    assert len(configured("folder", folder)) > 12
    with pytest.raises(ValueError, match="data.source='imagenet': expected one of kinetic_shapes"):
        configured("imagenet")


def test_latents_of_another_rate_are_refused(tmp_path):
    latent = {"latent": np.zeros((3, 2, 2, 4), np.float16), "shape": [5, 16, 16], "caption": "a dot", "origin": 0}
    for name, about in (("told", {"fps": 16.0}), ("older", {})):
        records.write_shard(tmp_path / name, 0, [latent], job="x")
        records.finish(tmp_path / name, num_shards=1, about=about)
        assert len(configured("latents", tmp_path / name, fps=16.0)) == 1
    assert len(configured("latents", tmp_path / "older", fps=8.0)) == 1
    with pytest.raises(ValueError, match=r"data.fps=8.0: .*told'.*they were written with fps=16.0"):
        configured("latents", tmp_path / "told", fps=8.0)


def test_stored_kinetic_shapes_read_as_they_are_rendered(tmp_path):
    from stvdm.data import kinetic_shapes_tfds

    config = kinetic_shapes_tfds.KineticShapesConfig(num_clips={"train": 6}, num_frames=5, height=16, width=16)
    directory = kinetic_shapes_tfds.write(tmp_path, config)
    stored = configured("kinetic_shapes", directory)
    for name, other in (("fps", 16.0), ("world", (("pan", 0.0),))):
        with pytest.raises(ValueError, match=f"data.{name}=.*they were written with {name}="):
            configured("kinetic_shapes", directory, **{name: other})
    rendered = KineticShapes(num_clips=6)
    captions = {
        rendered.read(k, num_frames=2, height=8, width=8, rng=np.random.default_rng(0))["caption"] for k in range(6)
    }
    batches = take(make(stored, buckets=[(5, 16, 16, 6), (1, 16, 16, 2)]), 4)
    assert {caption for batch in batches for caption in batch["caption"]} == captions
    assert_same(batches, take(make(stored, buckets=[(5, 16, 16, 6), (1, 16, 16, 2)], num_workers=1), 4))


@pytest.mark.parametrize("source", ["kinetic_shapes", "latents"])
@pytest.mark.parametrize(
    ("world", "said"),
    [
        ((("gravitiy", 1.0),), "World: there is no field 'gravitiy'; did you mean gravity?"),
        ((("zzz", 1.0),), "World: there is no field 'zzz'; it has colours, shapes, "),
        (("pan", 0.0), "expected pairs, as "),
        ((("pan", "often"),), "World of {'pan': 'often'}: "),
        ((("pan", 2.0),), "pan=2.0: expected a probability"),
    ],
)
def test_a_world_that_is_none_is_refused_whatever_is_read(tmp_path, source, world, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        configured(source, tmp_path, world=world)
