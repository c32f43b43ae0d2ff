# SPDX-License-Identifier: Apache-2.0
"""Sharded safetensors: what is written is read, by us and by others; one tensor in memory at a time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stvdm import checkpoint, sharding, tensor_files
from stvdm.interop import mapping, weights
from stvdm.interop.mapping import AS_IS, KERNEL, Rule

L, I, O = 24, 96, 128  # layers, and two widths: a layer's kernel is 48 KiB, all of them 1152 KiB
SHAPES = {
    "layers": {"block_0": {"mlp": {"kernel": np.zeros((L, I, O)), "bias": np.zeros((L, O))}}},
    "head": {"kernel": np.zeros((O, 6))},
}
RULES = (
    Rule(r"layers_(\d+)/block_0/mlp/kernel", r"blocks.\1.mlp.weight", KERNEL),
    Rule(r"layers_(\d+)/block_0/mlp/bias", r"blocks.\1.mlp.bias", AS_IS),
    Rule(r"head/kernel", "head.weight", KERNEL),
)


@pytest.fixture(scope="module")
def pairs():
    return mapping.pairs_of(SHAPES, RULES, stacked="layers")


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), SHAPES)


@pytest.fixture
def folder(tmp_path, pairs, params):
    """Their files, five of them and an index."""
    tensors = weights.theirs(pairs, weights.of_tree(params))
    tensor_files.write(tmp_path / "theirs", tensors, stem="weights", shard_bytes=300_000)
    return tmp_path / "theirs"


def filled(pairs, source, **options):
    return weights.fill(SHAPES, weights.of_theirs(pairs, source.read), stacked="layers", **options)


def own_names(pairs, source):
    part = weights.of_theirs(pairs, source.read)
    return weights.ours(SHAPES, part, prefix="dit/", stacked="layers")


def trees_are_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_layers_are_tensors_of_their_own(pairs):
    assert len(pairs) == 2 * L + 1
    kernel = pairs[-1]
    assert (kernel.theirs, kernel.shape) == (f"blocks.{L - 1}.mlp.weight", (O, I))
    assert (kernel.ours, kernel.layer) == ("layers/block_0/mlp/kernel", L - 1)


def test_what_is_written_is_what_the_formats_own_reader_reads(folder, params):
    names = [f"weights-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "weights.safetensors.index.json"]
    index = json.loads((folder / "weights.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (L * I * O + L * O + O * 6)
    for name in names:
        assert (folder / name).stat().st_size < 300_000 + 3_000
        with safe_open(folder / name, "np") as file:
            assert file.metadata() == {"format": "pt"}
        assert {key for key, where in index["weight_map"].items() if where == name} == load_file(folder / name).keys()
    found = {key: array for name in names for key, array in load_file(folder / name).items()}
    np.testing.assert_array_equal(found["blocks.7.mlp.weight"], params["layers"]["block_0"]["mlp"]["kernel"][7].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_comes_back(tmp_path, pairs, params, dtype):
    digests = tensor_files.write(tmp_path, weights.theirs(pairs, weights.of_tree(params)), dtype=dtype)
    assert list(digests) == ["model.safetensors"]
    source = weights.Weights(tmp_path)
    mapping.agree(pairs, source.shapes)
    back = filled(pairs, source)
    trees_are_equal(back, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype(np.float32), params))


def test_weights_go_straight_to_their_places_on_a_mesh(folder, pairs, params):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def placed(*names):
        return NamedSharding(mesh, sharding.spec(*names))

    shardings = {
        "layers": {"block_0": {"mlp": {"kernel": placed("layers", "width", "mlp"), "bias": placed("layers", "mlp")}}},
        "head": {"kernel": NamedSharding(mesh, PartitionSpec())},
    }
    source = weights.Weights(folder)
    made = filled(pairs, source, shardings=shardings, dtype="bfloat16")
    trees_are_equal(made, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == shardings
    assert made["layers"]["block_0"]["mlp"]["kernel"].addressable_shards[0].data.shape == (L, I // 2, O // 2)
    out = {tensor.name: tensor for tensor in weights.theirs(pairs, weights.of_tree(made))}
    kernel = params["layers"]["block_0"]["mlp"]["kernel"]
    (whole,) = out["blocks.3.mlp.weight"].parts()
    np.testing.assert_array_equal(whole, kernel[3].T.astype(jnp.bfloat16))


def test_one_tensor_is_in_memory_at_a_time(folder, tmp_path, pairs, peak_of):
    largest, model = 4 * I * O, 4 * L * I * O
    source = weights.Weights(folder)
    on_mesh = sharding.replicated(sharding.make_mesh())
    shardings = jax.tree.map(lambda _: on_mesh, SHAPES)
    few = 8 * largest  # as read, turned, its copy for the device or the file, and those that JAX lets go of later
    assert few < model * 0.4
    assert peak_of(lambda: filled(pairs, source, shardings=shardings)) < few
    assert peak_of(lambda: tensor_files.write(tmp_path, own_names(pairs, source))) < few
    own = weights.Weights(tmp_path / "model.safetensors")
    part = weights.of_file(own, "dit/")
    assert peak_of(lambda: weights.fill(SHAPES, part, stacked="layers", shardings=shardings)) < few
    tensors = weights.theirs(pairs, part)
    assert peak_of(lambda: tensor_files.write(tmp_path / "back", tensors)) < few
    assert peak_of(lambda: filled(pairs, source)) > model  # the measure sees what is held


def test_from_file_to_file_and_back(folder, tmp_path, pairs, params):
    source = weights.Weights(folder)
    digests = tensor_files.write(tmp_path / "ours", own_names(pairs, source))
    (tmp_path / "ours" / "model.json").write_text(json.dumps({"sha256": digests["model.safetensors"]}))
    loaded, _ = checkpoint.load_model(tmp_path / "ours")
    trees_are_equal(loaded["dit"], params)
    own = weights.Weights(tmp_path / "ours" / "model.safetensors")
    tensor_files.write(
        tmp_path / "back", weights.theirs(pairs, weights.of_file(own, "dit/")), stem="weights", shard_bytes=300_000
    )
    for path in folder.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_files_of_others_are_read(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(4, dtype=np.int64), "c": np.zeros((0, 5), np.float16)}
    save_file(arrays, tmp_path / "one.safetensors")
    save_file({"d": np.float32([[7]])}, tmp_path / "two.safetensors")
    source = weights.Weights(tmp_path)
    assert source.shapes == {"a": (2, 3), "b": (4,), "c": (0, 5), "d": (1, 1)}
    for name, array in arrays.items():
        np.testing.assert_array_equal(source.read(name), array)
    np.testing.assert_array_equal(source.read("a", 1), arrays["a"][1])


def test_damaged_folders_are_named(folder, tmp_path):
    index = folder / "weights.safetensors.index.json"
    second = folder / "weights-00002-of-00005.safetensors"
    whole, told = second.read_bytes(), index.read_text()
    second.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"00002-of-00005.safetensors: [\d,]+ bytes, expected [\d,]+; copy it again"):
        weights.Weights(folder)
    second.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="00002-of-00005.safetensors: its header can't be read"):
        weights.Weights(folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="of 5 files are missing weights-00002-of-00005.safetensors"):
        weights.Weights(folder)
    second.write_bytes(whole)
    index.write_text(told.replace("blocks.3.mlp.bias", "blocks.99.mlp.bias"))
    with pytest.raises(ValueError, match=r"of 49 tensors 2 are not where it says, e.g. blocks.3.mlp.bias"):
        weights.Weights(folder)
    index.unlink()
    (folder / "again.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="stands in again.safetensors too"):
        weights.Weights(folder)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="this is a pickle"):
        weights.Weights(tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match="expected a .safetensors file"):
        weights.Weights(tmp_path / "nowhere")
