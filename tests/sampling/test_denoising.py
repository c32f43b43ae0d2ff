# SPDX-License-Identifier: Apache-2.0
"""Whole runs of Wan's pipelines against diffusers on random weights; two networks that take turns."""

import functools
import json

import flax.linen as nn
import foreign
import foreign_wan_autoencoder
import foreign_wan_sampling
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm.diffusion import flow, guidance, samplers, schedules
from stvdm.interop import towers, wan, wan_autoencoder, weights
from stvdm.models import autoencoder3d
from stvdm.models.dit import DiT
from stvdm.sampling import denoising, first_frame
from stvdm.sampling.denoising import HIGH, LOW, Denoising, Models

GOLDEN = foreign_wan_sampling.golden()["runs"]
SETTINGS = foreign_wan_sampling.SETTINGS
TOLERANCE = 1e-5  # of the size of the values, float32
HOW = Denoising(flow.Objective(), "unipc", SETTINGS["guidance"], (0.0, 1.0), 0.0, 0.875, SETTINGS["guidance_low"])
STOPS = schedules.stops(SETTINGS["steps"], shift=SETTINGS["shift"], spacing="unipc")


@functools.cache
def tiny(kind):
    """(Models, params) of a kind, from diffusers' tensors."""
    shapes = GOLDEN[kind]["shapes"]
    dit = DiT(**wan.fields_of(foreign_wan_sampling.KINDS[kind]["config"], shapes))
    pairs = wan.pairs(dit, "diffusers")

    def filled(tensors):
        part = weights.of_theirs(pairs, tensors.__getitem__)
        return weights.fill(nn.unbox(wan.shapes_of(dit)), part, stacked=wan.STACKED)

    params = {"dit": filled(foreign.weights(shapes))}
    if foreign_wan_sampling.KINDS[kind]["boundary"]:
        params = {HIGH: params["dit"], LOW: filled(foreign_wan_sampling.second(shapes))}
    return Models(dit, None), params


@pytest.fixture(scope="module")
def looker(image_tower):
    return towers.looker(image_tower)


def given_of(kind, looker):
    """What the network of a kind is given of its image."""
    image = foreign_wan_sampling.image(kind)
    if image is None:
        return denoising.NOTHING
    version = foreign_wan_sampling.KINDS[kind]["coder"]
    sizes = foreign_wan_autoencoder.SIZES[version]
    coder = wan_autoencoder.model_of(sizes)
    shapes = json.loads(foreign_wan_autoencoder.FILE.read_text())[version]["shapes"]
    params = wan_autoencoder.imported(coder, foreign.weights(shapes))
    statistics = wan_autoencoder.statistics_of(sizes, coder.latent_channels)

    def encode(video):
        chunks = autoencoder3d.stream_encode(coder, params, video)
        return autoencoder3d.normalise(jnp.concatenate([mean for mean, _ in chunks], axis=1), statistics)

    return first_frame.given(
        image,
        (foreign_wan_sampling.FRAMES, *foreign_wan_sampling.side(kind)),
        tiny(kind)[0].dit,
        encode=encode,
        temporal=coder.temporal,
        look=looker,
        batch_size=2,
    )


KINDS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in ("t2v", "i2v-a14b") else [])  # the others have all parts
    for kind in foreign_wan_sampling.KINDS
]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_pipelines_of_diffusers(kind, looker):
    models, params = tiny(kind)
    given = given_of(kind, looker)
    prompt, negative = foreign_wan_sampling.texts(kind)
    noise = jnp.asarray(foreign_wan_sampling.noise(kind))
    how = HOW._replace(boundary=foreign_wan_sampling.KINDS[kind]["boundary"] or 0.0)
    latent = denoising.denoise(models, params, noise, STOPS, (prompt, None), (negative, None), how=how, given=given)
    found = {"latent": latent}
    if given.extra_Bthwz is not None:
        found["condition"] = given.extra_Bthwz
    if given.known_B1hwz is not None:
        found["condition"] = given.known_B1hwz
        np.testing.assert_array_equal(latent[:, :1], given.known_B1hwz)
    if given.image_BSE is not None:
        found["tokens"] = given.image_BSE[:1]
    expected = GOLDEN[kind]["outputs"]
    errors = {name: foreign.error(array, expected[name]) for name, array in found.items()}
    print(kind, {name: f"{value:.1e}" for name, value in errors.items()})
    assert errors.keys() == expected.keys()
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    "boundary", [pytest.param(0.3, marks=pytest.mark.slow), 0.875]
)  # of times 1, 0.9, 0.75 and 0.5
def test_two_networks_are_what_picking_by_hand_gives(boundary):
    models, params = tiny("t2v-a14b")
    prompt, negative = foreign_wan_sampling.texts("t2v-a14b")
    noise = jnp.asarray(foreign_wan_sampling.noise("t2v-a14b"))
    sampler, x, done = samplers.unipc(), noise, []
    state = sampler.init(noise)

    @functools.partial(jax.jit, static_argnames="scale")
    def step(params, x, state, t, t_next, told, *, scale):
        def velocity(text):
            return lambda x, t: models.predict({"dit": params}, x, jnp.full(2, told), text, None)

        guided = guidance.classifier_free(velocity(prompt), velocity(negative), scale=scale)
        return sampler.step(guided, state, x, t, t_next)

    for t, t_next, told in zip(STOPS.times[:-1], STOPS.times[1:], STOPS.told[:-1], strict=True):
        name, scale = (HIGH, SETTINGS["guidance"]) if t >= boundary else (LOW, SETTINGS["guidance_low"])
        x, state = step(params[name], x, state, t, t_next, told, scale=scale)
        done.append(name)
    how = HOW._replace(boundary=boundary)
    steps = []
    made = denoising.denoise(
        models, params, noise, STOPS, (prompt, None), (negative, None), how=how, callback=steps.append
    )
    jax.effects_barrier()
    np.testing.assert_allclose(made, x, atol=1e-5 * float(jnp.abs(x).max()))
    assert done == ([HIGH] * 2 + [LOW] * 2 if boundary == 0.875 else [HIGH] * 4)
    assert sorted(steps) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "sampler", ["unipc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpm++", "heun"))]
)
def test_two_equal_networks_are_one(sampler):
    models, params = tiny("t2v-a14b")
    prompt, negative = foreign_wan_sampling.texts("t2v-a14b")
    noise = jnp.asarray(foreign_wan_sampling.noise("t2v-a14b"))
    how = HOW._replace(sampler=sampler, guidance_low=HOW.guidance)
    run = functools.partial(
        denoising.denoise, models, noise_Bthwz=noise, stops=STOPS, prompt=(prompt, None), null=(negative, None), how=how
    )
    one = run(params={"dit": params[HIGH]})
    both = run(params={HIGH: params[HIGH], LOW: params[HIGH]})
    np.testing.assert_allclose(both, one, atol=1e-5 * float(jnp.abs(one).max()))


def test_what_a_network_says_of_a_known_frame_has_no_say_in_the_rest():
    """Also not by the contrast that guidance is rescaled to: no loss ever saw it."""

    class Says:
        def __init__(self, of_the_known):
            self.of_the_known = of_the_known

        def read(self, params, tokens, mask):
            return tokens

        def predict(self, params, x, time_B, text, mask, given):
            return (jnp.sin(3 * x) + text).at[:, :1].set(self.of_the_known)

    x, known = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2)), jnp.full((2, 1, 4, 4, 2), 0.3)
    given = first_frame.Given(known_B1hwz=known)
    at = {
        value: denoising.guided_velocity(
            Says(value),
            {},
            (jnp.asarray(0.7), None),
            (jnp.asarray(0.2), None),
            how=HOW._replace(guidance_rescale=0.7),
            stops=STOPS,
            given=given,
        )(x, STOPS.times[1])
        for value in (0.0, 9.0)
    }
    assert not at[9.0][:, 0].any() and at[9.0][:, 1:].any()
    np.testing.assert_array_equal(at[9.0], at[0.0])


def test_two_networks_need_a_boundary():
    _, params = tiny("t2v-a14b")
    with pytest.raises(ValueError, match=r"sample.boundary=0.0: this model's two networks take turns"):
        denoising.turns(params, STOPS, HOW._replace(boundary=0.0))


def test_the_golden_file_is_what_diffusers_says_today():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import make_wan_sampling

    for kind in foreign_wan_sampling.KINDS:
        assert foreign.apart(make_wan_sampling.run(kind), GOLDEN[kind]) < 1e-5
