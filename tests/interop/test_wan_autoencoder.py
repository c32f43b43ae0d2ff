# SPDX-License-Identifier: Apache-2.0
"""Wan's autoencoders against diffusers on random weights: stages, gradients, streams; names, sizes, round trips."""

import functools
import json

import foreign
import foreign_wan_autoencoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm.interop import wan_autoencoder
from stvdm.models import autoencoder3d
from stvdm.models.autoencoder3d import Autoencoder

GOLDEN = json.loads(foreign_wan_autoencoder.FILE.read_text())
TOLERANCE = 1e-5  # of the size of the values, float32
VERSIONS = tuple(foreign_wan_autoencoder.SIZES)
CASES = [
    pytest.param(version, frames, marks=[] if frames == 9 else pytest.mark.slow)
    for version in VERSIONS
    for frames in foreign_wan_autoencoder.FRAMES
]


@functools.cache
def tiny(version):
    model = wan_autoencoder.model_of(foreign_wan_autoencoder.SIZES[version])
    return model, wan_autoencoder.imported(model, foreign.weights(GOLDEN[version]["shapes"]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def watched(model, params, given, weights, method):
    """(outputs, what each stage gave, the gradient of the weighted sum of outputs by what was given)."""

    def weighted(given):
        outputs, seen = model.apply(
            {"params": params},
            given,
            method=method,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(
                module, (autoencoder3d.DownStage, autoencoder3d.UpStage, autoencoder3d.Middle)
            ),
        )
        outputs = jnp.concatenate(outputs, axis=-1) if method == "encode" else outputs
        return jnp.sum(outputs * weights), (outputs, seen["intermediates"])

    gradient, (outputs, seen) = jax.grad(weighted, has_aux=True)(given)
    return outputs, seen, gradient


def everything(version, frames):
    """All that the reference is asked for, made here."""
    model, params = tiny(version)
    given = foreign_wan_autoencoder.inputs(version, frames)
    found = {}
    for method, name, half in (("encode", "video", "encoder"), ("decode", "latent", "decoder")):
        outputs, seen, gradient = watched(model, params, given[name], given[f"weights_{method}"], method)
        found |= {f"{half}/{stage}": value["__call__"][0] for stage, value in seen[half].items()}
        found |= {"moments" if method == "encode" else "decoded": outputs, f"gradient_{method}": gradient}
    return found | {"clipped": jnp.clip(found["decoded"], -1, 1)}


@pytest.mark.parametrize(("version", "frames"), CASES)
def test_it_gives_what_diffusers_gives(version, frames):
    expected, found = GOLDEN[version]["outputs"][str(frames)], everything(version, frames)
    assert found.keys() == expected.keys() and len(found) == 15
    errors = {name: foreign.error(array, expected[name]) for name, array in found.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize(("version", "frames"), [case.values for case in CASES])
def test_it_gives_every_value_that_diffusers_gives(version, frames):
    """In norm. The worst single value is allowed thrice as much: PyTorch in float32 is as far from itself in float64.

    At 2.1 and 9 frames that is 1.3e-5 of the root mean square, of the gradient by the latent; here 1.4e-5.
    """
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import make_wan_autoencoder

    expected, found = make_wan_autoencoder.reference(version, frames), everything(version, frames)
    assert found.keys() == expected.keys()
    size = {name: np.sqrt(np.square(array, dtype=np.float64).mean()) for name, array in expected.items()}
    gaps = {name: np.abs(np.float64(found[name]) - array) / size[name] for name, array in expected.items()}
    errors = {name: np.sqrt(np.square(gap).mean()) for name, gap in gaps.items()}
    print({name: f"{error:.1e}, at worst {gaps[name].max():.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors
    assert max(gap.max() for gap in gaps.values()) < 3 * TOLERANCE
    shown = {name: foreign.shown(array, most=8) for name, array in expected.items()}
    assert foreign.apart(shown, GOLDEN[version]["outputs"][str(frames)]) < TOLERANCE  # the file is what it says today


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_streams_equal_the_whole(version):
    model, params = tiny(version)
    given, whole = foreign_wan_autoencoder.inputs(version, 9), everything(version, 9)
    chunks = autoencoder3d.stream_decode(model, params, given["latent"], chunk_latents=(1, 2))
    np.testing.assert_allclose(jnp.concatenate(list(chunks), axis=1), whole["decoded"], atol=1e-5, rtol=1e-5)
    moments = autoencoder3d.stream_encode(model, params, given["video"], chunk_latents=(1, 2))
    streamed = jnp.concatenate([jnp.concatenate(chunk, axis=-1) for chunk in moments], axis=1)
    np.testing.assert_allclose(streamed, whole["moments"], atol=1e-5, rtol=1e-5)


# ---- names and sizes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_full_size_has_their_names_and_shapes(version, layout):
    model = wan_autoencoder.model_of(foreign_wan_autoencoder.FULL[version])
    assert model == {"2.1": wan_autoencoder.WAN_2_1, "2.2": wan_autoencoder.WAN_2_2}[version]
    there = {pair.theirs: list(pair.shape) for pair in wan_autoencoder.pairs(model, layout)}
    assert GOLDEN[version]["full"][layout] == {
        "sha256": foreign_wan_autoencoder.digest(there),
        "tensors": len(there),
        "parameters": foreign_wan_autoencoder.total(there),
    }
    assert foreign_wan_autoencoder.total(there) == {"2.1": 126_892_531, "2.2": 704_688_668}[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_configs_go_there_and_back(version):
    sizes = foreign_wan_autoencoder.SIZES[version]
    model = wan_autoencoder.model_of(sizes)
    statistics = wan_autoencoder.statistics_of(sizes, sizes["z_dim"])
    config = wan_autoencoder.config_of(model, statistics)
    assert {name: config[name] for name in sizes} == sizes  # to the last decimal of the statistics
    assert wan_autoencoder.model_of(config) == model
    assert model.spatial == {"2.1": 8, "2.2": 16}[version] and model.temporal == 4
    published = wan_autoencoder.statistics_of({}, {"2.1": 16, "2.2": 48}[version])
    assert all(len(set(values.tolist())) > 10 for values in published.values())
    latent = jnp.ones((1, 1, 2, 3, sizes["z_dim"]))
    normal = autoencoder3d.normalise(latent, statistics)  # the DiT's latents are diffusers': (z - mean) / std
    np.testing.assert_allclose(
        normal, (latent - np.array(sizes["latents_mean"])) / np.array(sizes["latents_std"]), rtol=1e-5
    )


# ---- in and out


@pytest.mark.parametrize("version", VERSIONS)
def test_export_is_the_inverse_of_import(version, tmp_path):
    model, params = tiny(version)
    source = foreign.weights(GOLDEN[version]["shapes"])
    sizes = foreign_wan_autoencoder.SIZES[version]
    statistics = wan_autoencoder.statistics_of(sizes, sizes["z_dim"])
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(wan_autoencoder.config_of(model, statistics)))
    for layout in ("diffusers", "original"):
        there = wan_autoencoder.exported(model, params, layout)
        if layout == "diffusers":
            assert there.keys() == source.keys()
            for name, array in source.items():
                np.testing.assert_array_equal(there[name], array, err_msg=name)
        save_file(there, tmp_path / "vae" / "weights.safetensors")
        loaded = wan_autoencoder.load(tmp_path)
        assert loaded.model == model
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        np.testing.assert_array_equal(loaded.statistics["std_z"], np.float32(sizes["latents_std"]))


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_loads_what_is_exported_and_decodes_the_same(version, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model, params = tiny(version)
    sizes = foreign_wan_autoencoder.SIZES[version]
    config = wan_autoencoder.config_of(model, wan_autoencoder.statistics_of(sizes, sizes["z_dim"]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = wan_autoencoder.exported(model, params, "diffusers")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path)
    assert list(theirs.config.latents_mean) == sizes["latents_mean"]
    latent = foreign_wan_autoencoder.inputs(version, 9)["latent"]
    with torch.no_grad():
        decoded = theirs.decode(torch.from_numpy(latent).permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(everything(version, 9)["clipped"], decoded.numpy(), atol=TOLERANCE)


def test_errors_teach(tmp_path):
    model, _ = tiny("2.1")
    source = foreign.weights(GOLDEN["2.1"]["shapes"])
    wrong = {**source, "surprise": np.zeros(3), "encoder.conv_in.weight": np.zeros((4, 12, 3, 3, 3))}
    del wrong["decoder.norm_out.gamma"]
    with pytest.raises(ValueError, match="not this model's") as error:
        wan_autoencoder.imported(model, wrong)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "- decoder.norm_out.gamma (4, 1, 1, 1): missing",
        "- encoder.conv_in.weight (4, 12, 3, 3, 3): expected (4, 3, 3, 3, 3)",
        "- surprise (3,): left over",
    ]
    with pytest.raises(ValueError, match=r"attn_scales=\[1.0\]: expected \[\], which all published"):
        wan_autoencoder.model_of({"attn_scales": [1.0]})
    with pytest.raises(ValueError, match=r"in_channels=3: expected 12"):
        wan_autoencoder.model_of({"patch_size": 2, "in_channels": 3})
    with pytest.raises(ValueError, match="latents_mean has 0 entries, expected one for each of 5 channels"):
        wan_autoencoder.statistics_of({}, 5)
    with pytest.raises(ValueError, match=r"has not Wan's shape.*convolution='separable', expected 'full'"):
        wan_autoencoder.config_of(Autoencoder(convolution="separable"), {})
    save_file({"conv2.bias": np.zeros(5, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no config.json .* expected conv2.bias of 16 or 48 values, got 5"):
        wan_autoencoder.load(tmp_path)
