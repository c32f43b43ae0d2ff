# SPDX-License-Identifier: Apache-2.0
"""LPIPS against an independent PyTorch network on random weights, in both layouts; its published sizes."""

import foreign
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm.interop import judges, mapping
from stvdm.models import lpips

GOLDEN = foreign.golden()["lpips"]
TOLERANCE = 1e-5  # of the size of the values, float32
X, Y = (foreign.inputs(name, (3, 41, 37, 3)) * 0.5 for name in ("x", "y"))


def tiny(trunk):
    model = lpips.LPIPS(foreign.LPIPS_TRUNKS[trunk], lpips.POOLS[trunk])
    params = mapping.into(judges.lpips_shapes(model), foreign.weights(GOLDEN[trunk]["shapes"]), judges.LPIPS_RULES)
    return model, params


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_distances_are_those_of_the_reference(trunk):
    model, params = tiny(trunk)
    distance = jax.jit(model.apply)({"params": params}, X, Y)
    assert foreign.error(distance, GOLDEN[trunk]["outputs"]["distance"]) < TOLERANCE


def test_equal_images_are_at_no_distance_and_order_does_not_matter():
    model, params = tiny("alex")
    params = jax.tree.map(abs, params)  # as fitted heads are
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply({"params": params}, X, X), 0)
    np.testing.assert_allclose(apply({"params": params}, X, Y), apply({"params": params}, Y, X), rtol=1e-5)
    near, far = (apply({"params": params}, X, X + scale * Y) for scale in (0.1, 0.5))
    assert (far > near).all() and (near > 0).all()


@pytest.mark.parametrize(("trunk", "convolutions", "heads"), [("alex", 2_469_696, 1_152), ("vgg", 14_714_688, 1_472)])
def test_published_sizes_and_both_layouts(trunk, convolutions, heads, tmp_path):
    """torchvision's trunk beside the package's heads, and the package's whole module."""
    model = lpips.LPIPS({"alex": lpips.ALEX, "vgg": lpips.VGG16}[trunk], lpips.POOLS[trunk])
    shapes = judges.lpips_shapes(model)
    assert foreign.num_parameters(shapes) == convolutions + heads
    random = np.random.default_rng(0)
    slices = {n: i for i, n in enumerate(sorted(int(name[5:]) for name in shapes if name.startswith("conv_")))}
    beside, whole = {}, {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, module in shapes.items():
        for part, leaf in module.items():
            shape = leaf.shape if part == "bias" else (leaf.shape[3], leaf.shape[2], *leaf.shape[:2])
            value = random.normal(size=shape).astype(np.float16)
            kind, number = name.split("_")
            last = "bias" if part == "bias" else "weight"
            if kind == "conv":
                beside[f"features.{number}.{last}"] = whole[
                    f"net.slice{1 + slices[int(number)] % 5}.{number}.{last}"
                ] = value
            else:
                for source in (beside, whole):
                    source[f"lin{number}.model.1.{last}"] = value
                whole[f"lins.{number}.model.1.{last}"] = value
    beside["classifier.6.bias"] = np.zeros(1000, np.float32)
    for folder, source in (("beside", beside), ("whole", whole)):
        (tmp_path / folder).mkdir()
        save_file(source, tmp_path / folder / "model.safetensors")
    one, other = judges.lpips(tmp_path / "beside"), judges.lpips(tmp_path / "whole")
    assert one.model == other.model == model
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_errors_teach():
    model, params = tiny("alex")
    with pytest.raises(ValueError, match=r"expected pairs of \(height, width, 3\)"):
        model.apply({"params": params}, X, Y[:, :20])
    with pytest.raises(ValueError, match="too small for this network; use 32x32 or more"):
        model.apply({"params": params}, X[:, :8, :8], Y[:, :8, :8])


def test_the_golden_file_is_what_the_reference_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    assert max(foreign.apart(make_towers.lpips(trunk), GOLDEN[trunk]) for trunk in GOLDEN) < 1e-5
