# SPDX-License-Identifier: Apache-2.0
"""I3D against an independent PyTorch network on random weights; its preparation; its published size."""

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.interop import judges, mapping
from stvdm.models import i3d

GOLDEN = foreign.golden()["i3d"]
TOLERANCE = 1e-5  # of the size of the values, float32


@pytest.fixture(scope="module")
def tiny():
    model = i3d.I3D(**foreign.I3D)
    return model, mapping.into(judges.i3d_shapes(model), foreign.weights(GOLDEN["shapes"]), judges.I3D_RULES)


def test_logits_are_those_of_the_reference(tiny):
    model, params = tiny
    logits = jax.jit(model.apply)({"params": params}, foreign.inputs("videos", (2, 13, 50, 67, 3)))
    assert foreign.error(logits, GOLDEN["outputs"]["logits"]) < TOLERANCE


def test_its_published_size():
    shapes = judges.i3d_shapes(i3d.I3D())
    flat = jax.tree_util.tree_leaves_with_path(shapes)
    trained = sum(leaf.size for path, leaf in flat if path[-1].key not in ("mean", "var"))
    assert trained == 12_697_264  # of the PyTorch port with 400 classes


def test_weights_are_read_and_the_number_of_classes_with_them(tmp_path):
    from safetensors.numpy import save_file

    shapes = judges.i3d_shapes(i3d.I3D(num_classes=3))
    source = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *blocks, module, last = [key.key for key in path]
        blocks += [{"conv": "conv3d", "bn": "bn", "logits": "logits.conv3d"}[module]]
        words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
        shape = tuple(leaf.shape)
        shape = (shape[-1], shape[-2], *shape[:-2]) if last == "kernel" else shape
        source[".".join([*blocks, words[last]])] = np.zeros(shape, np.float16)
    assert "Mixed_4f.b2b.conv3d.weight" in source and "Conv3d_1a_7x7.bn.running_var" in source
    save_file(source, tmp_path / "i3d.safetensors")
    assert judges.i3d(tmp_path).model == i3d.I3D(num_classes=3)


def test_clips_are_stretched_as_the_reference_does():
    clip = np.stack([foreign.picture(20, 31)] * 2)[None]
    made = (i3d.prepare(clip, size=24) + 1) / 2  # the same frames that VideoMAE's reference stretches, to [0, 1]
    assert foreign.error(made, foreign.golden()["videomae"]["prepared"]) < 1e-5
    assert i3d.prepare(clip).shape == (1, 2, 224, 224, 3)
    np.testing.assert_allclose(i3d.prepare(np.full((1, 1, 8, 8, 3), 255, np.uint8)), 1, rtol=1e-6)


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match=r"use 224x224 pixels and 9 frames or more"):
        jax.eval_shape(i3d.I3D().init, jax.random.key(0), jnp.zeros((1, 8, 224, 224, 3)))


def test_the_golden_file_is_what_the_reference_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import make_towers

    assert foreign.apart(make_towers.i3d(), GOLDEN) < 1e-5
