# SPDX-License-Identifier: Apache-2.0
"""Foreign names into ours: every tensor is used once, every parameter filled once, and nothing lost in silence."""

import shlex
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm.interop import mapping

SHAPES = {
    "first": {"kernel": np.zeros((3, 3, 2, 5)), "bias": np.zeros(5)},
    "norm": {"scale": np.zeros(5), "bias": np.zeros(5), "mean": np.zeros(5)},
    "words": np.zeros((7, 5)),
}
RULES = (
    (r"net\.conv\.(\w+)", r"first/\1"),
    (r"net\.bn\.(\w+)", r"norm/\1"),
    (r"embed\.weight", "words"),
    (r"head\..*", ""),
)


@pytest.fixture
def source():
    random = np.random.default_rng(0)
    shapes = {
        "net.conv.weight": (5, 2, 3, 3),
        "net.conv.bias": (5,),
        "net.bn.weight": (5,),
        "net.bn.bias": (5,),
        "net.bn.running_mean": (5,),
        "embed.weight": (7, 5),
        "head.weight": (9, 5),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_each_tensor_finds_its_place_and_layout(source):
    made = mapping.into(SHAPES, source, RULES)
    assert made["first"]["kernel"][2, 1, 0, 4] == source["net.conv.weight"][4, 0, 2, 1]
    np.testing.assert_array_equal(made["norm"]["scale"], source["net.bn.weight"])
    np.testing.assert_array_equal(made["norm"]["mean"], source["net.bn.running_mean"])
    np.testing.assert_array_equal(made["words"], source["embed.weight"])  # a table is not a kernel


def test_all_that_is_wrong_is_said_at_once(source):
    source["surprise"] = np.zeros(3)
    source["net.conv.bias"] = np.zeros(6)
    source["net.bn.gain"] = np.zeros(2)
    del source["embed.weight"]
    with pytest.raises(ValueError, match="not this model's") as error:
        mapping.into(SHAPES, source, RULES)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "- net.conv.bias: (6,) for first/bias, expected (5,)",
        "- surprise (3,): no rule knows it",
        "- net.bn.gain (2,): the model has no norm/gain",
        "- words: nothing fills it",
    ]


def test_a_place_is_filled_once(source):
    source["net.bn.mean"] = source["net.bn.running_mean"]
    with pytest.raises(ValueError, match=r"net.bn.mean: norm/mean has net.bn.running_mean already"):
        mapping.into(SHAPES, source, RULES)


def test_files_are_read_in_every_float(tmp_path):
    values = np.linspace(-2, 2, 6).reshape(2, 3)
    save_file({"a": values.astype(np.float16), "n": np.arange(4)}, tmp_path / "one.safetensors")
    save_file({"b": values.astype(jnp.bfloat16)}, tmp_path / "two.safetensors")
    read = mapping.read(tmp_path)
    assert read.keys() == {"a", "b"}  # whole numbers are no weights
    np.testing.assert_allclose(read["a"].astype(float), values, atol=1e-3)
    np.testing.assert_allclose(read["b"].astype(float), values, atol=1e-2)
    assert mapping.read(tmp_path / "one.safetensors").keys() == {"a"}


@pytest.mark.parametrize("end", [0, 3, 40, -4])
def test_a_damaged_file_is_named(tmp_path, end):
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / "one.safetensors")
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(whole[:end])
    with pytest.raises(ValueError, match="one.safetensors: .*copy it again"):
        mapping.read(tmp_path)


@pytest.mark.parametrize("text", ['{"dim": 1', "[1, 2]", "[]", ""])
def test_a_damaged_config_is_named(tmp_path, text):
    assert mapping.settings(tmp_path) == {}
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: expected a JSON object.*copy it again"):
        mapping.settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"num_attention_heads": 0}', "num_attention_heads=0"),
        ('{"vision_config": {"hidden_size": null}}', "hidden_size=None"),
        ('{"num_layers": "12"}', "num_layers='12'"),
    ],
)
def test_sizes_of_a_config_that_are_none_are_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: {said}: expected a whole number of at least 1"):
        mapping.settings(tmp_path)


def test_pickles_stay_shut(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a .safetensors file, or a folder of them"):
        mapping.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04would run")
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"this is a pickle, which can run any program(.|\n)*weights_only=True"):
            mapping.read(place)


def test_the_command_that_converts_a_pickle_does(tmp_path):
    torch = pytest.importorskip("torch")
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"module": {"a": shared.T, "b": shared}, "epoch": 3}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="Convert it once") as error:
        mapping.read(tmp_path)
    command = shlex.split(str(error.value).splitlines()[1].strip())
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, timeout=120)
    (tmp_path / "old.pth").unlink()
    np.testing.assert_array_equal(mapping.read(tmp_path)["a"], mapping.read(tmp_path)["b"].T)


def test_a_folder_is_taken_before_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert mapping.folder_of(tmp_path) == mapping.folder_of("openai/some-model")
    assert asked == [("openai/some-model", ("*.safetensors", "*.json", "*.txt", "*.model"))]
    with pytest.raises(FileNotFoundError, match="no/such/folder: expected a folder of safetensors"):
        mapping.folder_of("no/such/folder")

    def nobody(name, allow_patterns):
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=nobody))
    with pytest.raises(FileNotFoundError, match="runs/typo: there is no such folder, and .* no route to the hub"):
        mapping.folder_of("runs/typo")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        mapping.folder_of("openai/some-model")
