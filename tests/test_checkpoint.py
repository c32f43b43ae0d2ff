# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back: bit for bit, on any mesh, and never half of it."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from stvdm import checkpoint, sharding


def _tree(scale=1.0):
    return {"a": {"kernel": scale * jnp.arange(32.0).reshape(8, 4)}, "count": jnp.int32(7)}


def test_a_state_comes_back_on_another_mesh(tmp_path):
    mesh = sharding.make_mesh(fsdp=8, data=1)
    split = jax.sharding.NamedSharding(mesh, sharding.spec("width", None))
    state = {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), split)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, position={"step": 3}, config={"seed": 1})
    other = jax.sharding.NamedSharding(sharding.make_mesh(fsdp=2, tensor=4, data=1), sharding.spec("width", "heads"))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        target = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=other)}
        found = checkpoints.restore(target)
        assert checkpoints.config() == {"seed": 1}
        assert checkpoints.position() == {"step": 3}
    assert found["w"].sharding == other
    np.testing.assert_array_equal(found["w"], state["w"])


def test_only_the_newest_are_kept_and_saving_twice_is_harmless(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, _tree(step), position={"step": step}, config={})
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        found = checkpoints.restore(_tree())
        assert checkpoints.position() == {"step": 3}
    np.testing.assert_array_equal(found["a"]["kernel"], _tree(3)["a"]["kernel"])
    assert not (tmp_path / "checkpoints" / "1").exists()


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _tree(), position={}, config={})
    whole = tmp_path / "checkpoints" / "1"
    torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"  # what a killed save leaves
    torn.mkdir()
    (torn / "state").write_bytes(b"half")
    assert whole.exists()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
    assert (torn / "state").exists(), "who only reads leaves a save alone: it may be somebody's who is at it"


def test_a_machine_that_slept_while_saving_has_saved(tmp_path, monkeypatch):
    now, slept = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + slept[0])

    class Sleepy(dict):
        def items(self):  # as it is written
            time.sleep(0.5)
            slept[0] = 3600.0
            return super().items()

    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _tree(), position={"there": Sleepy(step=1)}, config={})
        checkpoints.wait()
        assert slept[0] and checkpoints.position() == {"there": {"step": 1}}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": {"kernel": np.zeros((8, 5))}, "count": np.int32(7)}, r"a/kernel is \(8, 4\), expected \(8, 5\)"),
        ({"a": {"kernel": np.zeros((8, 4))}}, r"count is \(\), expected none"),
        (
            {"a": {"kernel": np.zeros((8, 4))}, "count": np.int32(7), "b": (np.zeros(3),)},
            r"b/0 is missing, expected \(3,\)",
        ),
    ],
)
def test_arrays_of_other_names_or_shapes_are_one_line(tmp_path, other, said):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _tree(), position={}, config={})
        with pytest.raises(ValueError, match=f"1 arrays are not those of this config, e.g. {said}; take") as error:
            checkpoints.restore(other)
        checkpoints.restore(_tree())
    assert len(str(error.value).splitlines()) == 1


def test_without_a_checkpoint_there_is_a_clear_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            checkpoints.restore(_tree())


@pytest.fixture
def two_steps(tmp_path):
    """A folder with checkpoints of steps 1 and 2, all of whose values are the step's."""
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            state = {"w": jnp.full((64, 64), float(step)), "step": jnp.int32(step)}
            checkpoints.save(step, state, position={"step": step}, config={"seed": step})
    return tmp_path


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _restored(folder):
    with checkpoint.Checkpoints(folder) as checkpoints:
        target = {"w": jnp.zeros((64, 64)), "step": jnp.int32(0)}
        state, step = checkpoints.restore(target), checkpoints.position()["step"]
        assert checkpoints.config() == {"seed": step}
    np.testing.assert_array_equal(state["w"], np.full((64, 64), step))
    return step


@pytest.mark.parametrize(
    "damage, said",
    [
        (_flip, "was changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has [\d,]+ bytes, expected|was changed"),
        (lambda path: path.unlink(), "is missing|its save was not finished"),
    ],
    ids=["a flipped bit", "a truncated file", "a missing file"],
)
def test_damage_to_any_file_is_named_and_the_step_before_is_taken(two_steps, tmp_path_factory, damage, said):
    step = two_steps / "checkpoints" / "2"
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 8
    for number, file in enumerate(files):
        copy = tmp_path_factory.mktemp(f"copy{number}") / "run"
        shutil.copytree(two_steps, copy)
        name = str(file.relative_to(step))
        damage(copy / "checkpoints" / "2" / name)
        with pytest.warns(UserWarning, match="the step before is taken") as warned:
            assert _restored(copy) == 1
        (text,) = (str(warning.message) for warning in warned)
        assert name in text or "its save was not finished" in text, (name, text)
        assert re.search(said, text), text


def test_a_whole_folder_that_is_gone_is_named_too(two_steps):
    shutil.rmtree(two_steps / "checkpoints" / "2" / "state")
    with pytest.warns(UserWarning, match=r"state/.* is missing; .*and \d+ files more"):
        assert _restored(two_steps) == 1


def test_if_none_is_whole_that_is_an_error_and_no_fresh_start(two_steps):
    for step in (1, 2):
        _flip(two_steps / "checkpoints" / str(step) / "position" / "metadata")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        checkpoint.Checkpoints(two_steps) as checkpoints,
        pytest.raises(
            ValueError, match="no whole checkpoint is left(.|\n)*checkpoints/1: position/metadata was changed"
        ),
    ):
        _ = checkpoints.latest


def test_a_damaged_step_is_replaced_when_the_run_comes_to_it_again(two_steps):
    _flip(two_steps / "checkpoints" / "2" / "position" / "metadata")
    with checkpoint.Checkpoints(two_steps) as checkpoints:
        with pytest.warns(UserWarning, match="position/metadata was changed"):
            assert checkpoints.latest == 1
        state = {"w": jnp.full((64, 64), 2.0), "step": jnp.int32(2)}
        checkpoints.save(2, state, position={"step": 2}, config={"seed": 2})
    assert _restored(two_steps) == 2


def test_a_save_killed_before_its_manifest_does_not_count(two_steps):
    manifest = two_steps / "checkpoints" / "2" / "manifest"
    (manifest / "metadata").write_text('{"processes": 2}')  # of which one died
    (manifest / "0-of-1.json").rename(manifest / "0-of-2.json")
    with pytest.warns(UserWarning, match="its save was not finished"):
        assert _restored(two_steps) == 1


def test_a_checkpoint_from_before_there_were_manifests_is_taken_with_a_warning(two_steps):
    step = two_steps / "checkpoints" / "2"
    shutil.rmtree(step / "manifest")
    contents = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    del contents["item_handlers"]["manifest"]
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(contents))
    with pytest.warns(UserWarning, match="has no manifest"):
        assert _restored(two_steps) == 2


def test_a_manifest_that_is_lost_is_damage(two_steps):
    shutil.rmtree(two_steps / "checkpoints" / "2" / "manifest")
    with pytest.warns(UserWarning, match="2 is damaged, so the step before is taken: manifest/metadata is missing"):
        assert _restored(two_steps) == 1


def test_a_part_of_the_manifest_that_cannot_be_read_is_named(two_steps):
    part = two_steps / "checkpoints" / "2" / "manifest" / "0-of-1.json"
    part.unlink()
    part.mkdir()  # reading it is an OSError, as of a disk that fails
    with pytest.warns(UserWarning, match="manifest/0-of-1.json can't be read: .*directory"):
        assert _restored(two_steps) == 1


def test_steps_beyond_the_one_gone_on_from_are_damaged_and_count_for_nothing(two_steps):
    """Were they counted among those to keep, pruning would remove the good ones."""
    folder = two_steps / "checkpoints"
    for step in (5, 9):
        shutil.copytree(folder / "2", folder / str(step))
        _flip(folder / str(step) / "config" / "metadata")
    with checkpoint.Checkpoints(two_steps, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="is damaged"):
            assert checkpoints.latest == 2
        for step in (7, 8):
            state = {"w": jnp.full((64, 64), float(step)), "step": jnp.int32(step)}
            checkpoints.save(step, state, position={"step": step}, config={"seed": step})
            checkpoints.wait()
            assert {path.name for path in folder.iterdir()} == {7: {"2", "7"}, 8: {"7", "8"}}[step]
    assert _restored(two_steps) == 8


def test_what_takes_long_says_that_it_gets_on(two_steps):
    calls = []
    with checkpoint.Checkpoints(two_steps, gets_on=lambda: calls.append(None)) as checkpoints:
        assert checkpoints.latest == 2
        num_files = len(calls)
        assert num_files > 8
        checkpoints.position()
        assert len(calls) == num_files + 2


def test_on_an_object_store_every_file_is_digested_and_half_a_step_does_not_count(two_steps, bucket):
    shutil.copytree(two_steps / "checkpoints" / "2", bucket / "2")
    (bucket / "2" / "manifest" / "0-of-1.json").unlink()
    folder = epath.Path("gs://bucket/2")
    assert checkpoint._unfinished(folder)
    checkpoint._write_manifest(folder, process_index=0, process_count=1)
    assert not checkpoint._unfinished(folder)
    assert checkpoint.damage(folder) == []
    manifest = json.loads((bucket / "2" / "manifest" / "0-of-1.json").read_text())
    assert manifest["num_files"] == sum(path.is_file() for path in (bucket / "2").rglob("*")) - 1
    _flip(bucket / "2" / "config" / "metadata")
    assert "config/metadata was changed" in checkpoint.damage(folder)[0]
    shutil.rmtree(bucket / "2" / "manifest")
    assert not checkpoint._unfinished(folder)  # then it was whole, and damage
    (bucket / "2" / "commit_success.txt").unlink()  # there Orbax writes in place, and this last
    assert checkpoint._unfinished(folder)


def test_processes_share_the_digests(two_steps, tmp_path):
    folder = epath.Path(two_steps / "checkpoints" / "2")
    (folder / "manifest" / "0-of-1.json").unlink()
    (folder / "manifest" / "metadata").write_text('{"processes": 3}')
    for index in range(3):
        assert checkpoint._unfinished(folder)
        checkpoint._write_manifest(folder, process_index=index, process_count=3)
    assert not checkpoint._unfinished(folder)
    assert checkpoint.damage(folder) == []
    _flip(folder / "config" / "metadata")
    found = [checkpoint.damage(folder, process_index=index, process_count=2) for index in range(2)]
    assert sum(map(len, found)) == 1
    (folder / "manifest" / "1-of-3.json").unlink()
    assert "manifest/1-of-3.json is missing" in checkpoint.damage(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_whole(small_disk):
    noise = jax.random.normal(jax.random.key(0), (600_000,))  # 2.4 MB, which does not compress: fits once

    def state(step):
        return {"noise": noise, "w": jnp.full((64, 64), float(step)), "step": jnp.int32(step)}

    checkpoints = checkpoint.Checkpoints(small_disk)
    checkpoints.save(1, state(1), position={"step": 1}, config={"seed": 1})
    checkpoints.save(2, state(2), position={"step": 2}, config={"seed": 2})  # fails behind the training's back
    with pytest.raises(OSError, match=r"step 2 was not saved.*No space left.*1 MiB are free.*step 1 is whole"):
        checkpoints.save(3, state(3), position={"step": 3}, config={"seed": 3})
    checkpoints.save(4, state(4), position={"step": 4}, config={"seed": 4})
    with pytest.raises(OSError, match=r"step 4 was not saved.*No space left"):
        checkpoints.close()
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]
    with checkpoint.Checkpoints(small_disk) as checkpoints:
        found = checkpoints.restore(state(0))
        assert checkpoints.position() == {"step": 1}
    np.testing.assert_array_equal(found["noise"], noise)


def test_what_a_failed_save_left_goes_although_it_is_still_written_to(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    seen = []

    def write():  # as threads of a failed save do until they see that their folder is gone
        with contextlib.suppress(FileNotFoundError):
            while len(seen) < 10_000:
                seen.append((left / "state" / str(len(seen))).write_text("more"))

    writer = threading.Thread(target=write)
    writer.start()
    while len(seen) < 5:
        time.sleep(0.01)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, _tree(), position={}, config={})
    writer.join(timeout=10.0)
    assert not left.exists() and not writer.is_alive()


def test_an_exported_model_comes_back(tmp_path):
    params = {"dit": {"head": {"kernel": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)}}}
    digest = checkpoint.save_model(tmp_path / "model", params, {"kind": "dit", "width": 5})
    found, description = checkpoint.load_model(tmp_path / "model")
    np.testing.assert_array_equal(found["dit"]["head"]["kernel"], params["dit"]["head"]["kernel"])
    assert description == {"kind": "dit", "width": 5, "sha256": digest}


def test_one_layer_of_an_exported_model_is_in_memory_at_a_time(tmp_path, peak_of):
    layers = jnp.ones((24, 96, 128))
    params = {"layers": {"kernel": layers}, "head": {"kernel": jnp.ones((96, 128))}}
    assert peak_of(lambda: checkpoint.save_model(tmp_path, params, {})) < layers.nbytes / 3
    found, _ = checkpoint.load_model(tmp_path)
    np.testing.assert_array_equal(found["layers"]["kernel"], layers)


def test_bfloat16_weights_are_read_as_float32(tmp_path):
    kernel = jnp.asarray([1.0, 2.5, -3.25], jnp.bfloat16)
    checkpoint.save_model(tmp_path, {"kernel": kernel}, {})
    found, _ = checkpoint.load_model(tmp_path)
    assert found["kernel"].dtype == np.float32
    np.testing.assert_array_equal(found["kernel"], np.asarray(kernel, np.float32))


def test_weights_are_written_as_told_and_statistics_as_they_are(tmp_path):
    third = np.full(3, 1 / 3, np.float32)
    checkpoint.save_model(tmp_path, {"dit": {"w": third}, "statistics": {"mean_z": third}}, {}, dtype="float16")
    params, _ = checkpoint.load_model(tmp_path)
    np.testing.assert_array_equal(params["dit"]["w"], third.astype(np.float16))
    np.testing.assert_array_equal(params["statistics"]["mean_z"], third)


@pytest.mark.parametrize("text", ["[]", "{", "{}"])
def test_a_damaged_description_is_named(tmp_path, text):
    checkpoint.save_model(tmp_path / "one", {"kernel": np.ones(4, np.float32)}, {})
    (tmp_path / "one" / checkpoint.DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match="model.json: expected .*copy "):
        checkpoint.load_model(tmp_path / "one")


def test_a_damaged_or_mixed_model_is_refused(tmp_path):
    checkpoint.save_model(tmp_path / "one", {"kernel": np.ones(4, np.float32)}, {})
    weights = tmp_path / "one" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged or belongs to another"):
        checkpoint.load_model(tmp_path / "one")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors: 0 bytes, .*copy it again"):
        checkpoint.load_model(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="expected a model, found no such folder"):
        checkpoint.load_model(tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="found no model.safetensors and no model.json"):
        checkpoint.load_model(tmp_path / "nothing")
    assert json.loads((tmp_path / "one" / checkpoint.DESCRIPTION).read_text())["sha256"]
