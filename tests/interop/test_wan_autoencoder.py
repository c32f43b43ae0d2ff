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

from stvdm.interop import wan_autoencoder
from stvdm.models import autoencoder3d

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
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import make_wan_autoencoder

    expected, found = make_wan_autoencoder.reference(version, frames), everything(version, frames)
    assert found.keys() == expected.keys()
    size = {name: np.sqrt(np.square(array, dtype=np.float64).mean()) for name, array in expected.items()}
    errors = {name: np.abs(found[name] - expected[name]).max() / size[name] for name in expected}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors
    shown = {name: foreign.shown(array, most=8) for name, array in expected.items()}
    assert foreign.apart(shown, GOLDEN[version]["outputs"][str(frames)]) < TOLERANCE  # the file is what it says today
