# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back: bit for bit, on any mesh, and never half of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
        found, position = checkpoints.restore(target)
        assert checkpoints.config() == {"seed": 1}
    assert position == {"step": 3}
    assert found["w"].sharding == other
    np.testing.assert_array_equal(found["w"], state["w"])


def test_only_the_newest_are_kept_and_saving_twice_is_harmless(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, _tree(step), position={"step": step}, config={})
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        found, position = checkpoints.restore(_tree())
    np.testing.assert_array_equal(found["a"]["kernel"], _tree(3)["a"]["kernel"])
    assert position["step"] == 3
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


def test_without_a_checkpoint_there_is_a_clear_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(FileNotFoundError, match="no checkpoint here"):
            checkpoints.restore(_tree())


def test_an_exported_model_comes_back(tmp_path):
    params = {"dit": {"head": {"kernel": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)}}}
    digest = checkpoint.save_model(tmp_path / "model", params, {"kind": "dit", "width": 5})
    found, description = checkpoint.load_model(tmp_path / "model")
    np.testing.assert_array_equal(found["dit"]["head"]["kernel"], params["dit"]["head"]["kernel"])
    assert description == {"kind": "dit", "width": 5, "sha256": digest}


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


def test_a_damaged_or_mixed_model_is_refused(tmp_path):
    checkpoint.save_model(tmp_path / "one", {"kernel": np.ones(4, np.float32)}, {})
    weights = tmp_path / "one" / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged or belongs to another"):
        checkpoint.load_model(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="found no model.safetensors and no model.json"):
        checkpoint.load_model(tmp_path / "nothing")
    assert json.loads((tmp_path / "one" / checkpoint.DESCRIPTION).read_text())["sha256"]
