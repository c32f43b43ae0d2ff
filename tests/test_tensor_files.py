# SPDX-License-Identifier: Apache-2.0
"""Safetensors, part by part: what is written is what the format's own reader reads, in one file or in several."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from stvdm import tensor_files
from stvdm.tensor_files import Tensor

ARRAYS = {
    "kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "bias": np.float32([0.5, -1.25, 3]),
    "scalar": np.float32(7),
}


def in_parts(name, array):
    return Tensor(name, array.shape, lambda: iter(array) if array.ndim > 1 else [array])


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_parts_are_read_as_wholes(tmp_path, shard_bytes):
    tensors = [in_parts(*item) for item in ARRAYS.items()]
    digests = tensor_files.write(tmp_path, tensors, stem="some", shard_bytes=shard_bytes)
    names = ["some.safetensors"] if shard_bytes > 100 else [f"some-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert list(digests) == names
    found = {name: array for file in names for name, array in load_file(tmp_path / file).items()}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    if shard_bytes == 100:
        index = json.loads((tmp_path / f"some{tensor_files.INDEX}").read_text())
        assert index["weight_map"] == {"bias": names[0], "kernel": names[1], "scalar": names[1]}
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_written_before_is_not_found_any_more(tmp_path):
    """A loader that finds an index reads the files that it names, whatever lies beside them."""
    others = {"dit_low-00001-of-00002.safetensors", "other.safetensors", "config.json"}
    for name in others:
        (tmp_path / name).write_text("{}")
    one = Tensor("a", (3,), lambda: [np.zeros(3)])
    for shard_bytes, expected in (
        (12, {"dit-00001-of-00002.safetensors", "dit-00002-of-00002.safetensors", "dit.safetensors.index.json"}),
        (99, {"dit.safetensors"}),
        (12, {"dit-00001-of-00002.safetensors", "dit-00002-of-00002.safetensors", "dit.safetensors.index.json"}),
    ):
        tensor_files.write(tmp_path, [one, one._replace(name="b")], stem="dit", shard_bytes=shard_bytes)
        assert {path.name for path in tmp_path.iterdir()} == expected | others


def test_places_are_where_the_bytes_lie(tmp_path):
    kind = np.dtype(jnp.bfloat16)
    tensors = [in_parts("kernel", ARRAYS["kernel"]), in_parts("bias", ARRAYS["bias"])._replace(dtype=kind)]
    tensor_files.write(tmp_path, tensors)
    file = epath.Path(tmp_path / "model.safetensors")
    places, data = tensor_files.places_in(file), tensor_files.bytes_of(file)
    assert {name: (place.dtype, place.shape) for name, place in places.items()} == {
        "kernel": (np.float32, (2, 3, 4)),
        "bias": (kind, (3,)),
    }
    start = places["bias"].start
    np.testing.assert_array_equal(data[start : start + 6].view(kind), ARRAYS["bias"].astype(kind))


def test_a_header_that_can_not_be_read_is_named(tmp_path):
    file = epath.Path(tmp_path / "a.safetensors")
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="a.safetensors: its header can't be read"):
        tensor_files.places_in(file)
    leaf = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}  # whose last value would be another tensor's
    told = json.dumps({"a": leaf, "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + bytes(12))
    with pytest.raises(ValueError, match=r"a.safetensors: its header can't be read .*a: 8 bytes for float32 \(3,\)"):
        tensor_files.places_in(file)


def test_what_can_not_be_written_is_refused(tmp_path):
    one = Tensor("a", (2,), lambda: [np.zeros(2)])
    with pytest.raises(ValueError, match=r"\['a'\]: expected each name once"):
        tensor_files.write(tmp_path, [one, one])
    with pytest.raises(ValueError, match="dtype=complex64: safetensors knows float64"):
        tensor_files.write(tmp_path, [one], dtype="complex64")
    with pytest.raises(AssertionError, match="parts of a tensor"):
        tensor_files.write(tmp_path, [Tensor("a", (3,), lambda: [np.zeros(2)])])
    assert not (tmp_path / "model.safetensors").exists()
