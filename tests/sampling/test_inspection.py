# SPDX-License-Identifier: Apache-2.0
"""What is shown of a model is what happens in it: attention, the march from the noise, places of tokens, pictures."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stvdm import shapes
from stvdm.data import kinetic_shapes
from stvdm.diffusion import flow
from stvdm.models import embeddings
from stvdm.models.block import Attention
from stvdm.models.dit import DiT
from stvdm.models.patterns import Pattern
from stvdm.models.text_encoders import TextEncoder
from stvdm.sampling import inspection
from stvdm.sampling.pipeline import Models, Pipeline

RED = "a red ball moves"
GRID = (3, 2, 3)
N, S, HEADS, WIDTH = 18, 5, 2, 24
REAL_WORDS = np.array([[True] * 4 + [False], [True] * 3 + [False] * 2])


def models_with(params_of=None, **changes):
    """A transformer of GRID tokens with random weights, and what it is given."""
    sizes = dict(width=WIDTH, num_layers=2, num_heads=HEADS, mlp_width=32, time_features=8)
    dit = DiT(latent_channels=4, text_width=8, window=(1, 0, 1), **{**sizes, **changes})
    models = Models(dit, TextEncoder(vocabulary_size=7, max_tokens=S, width=8, num_layers=1, num_heads=2))
    rng = np.random.default_rng(0)
    x_Bthwz = rng.normal(size=(2, GRID[0], 2 * GRID[1], 2 * GRID[2], 4)).astype(np.float32)
    tokens = rng.integers(0, 7, (2, S))
    time_B = np.array([0.2, 0.7], np.float32)

    def init(key):
        text = models.text.init(key, tokens, REAL_WORDS)["params"]
        return nn.unbox(
            {
                "dit": dit.init(key, x_Bthwz, time_B[:, None], None, jnp.zeros((2, S, 8)), REAL_WORDS)["params"],
                "text": text,
            }
        )

    shaped = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.5, shaped)
    return models, params, (x_Bthwz, time_B, tokens, REAL_WORDS)


def attentions(models, params, given):
    """(q, k, v, out) of every self-attention, before positions, and of every attention to a text apart; and what the
    model predicts."""
    x_Bthwz, time_B, tokens, mask = given

    @jax.jit
    def run(params):
        seen = [], []

        def keep(next_call, args, kwargs, context):
            if not isinstance(context.module, Attention) or context.method_name != "__call__":
                return next_call(*args, **kwargs)

            def attend(q, k, v):
                out = args[0](q, k, v)
                seen[len(args) == 3].append((q, k, v, out))
                return out

            return next_call(attend, *args[1:], **kwargs)

        with nn.intercept_methods(keep):
            out = models.predict(params, x_Bthwz, time_B, models.read(params, tokens, mask), mask)
        return *seen, out

    return run(params)


def softmax(scores, sees):
    weights = np.where(sees, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "attention, text_path, scan_layers",
    [
        (("full",), "cross", False),
        (("frame", "time"), "cross", True),
        (("window",), "joint", True),
        (("block_causal",), "cross", True),
        (("block_causal", "full"), "joint", False),
        (("full",), "dual", True),
    ],
)
def test_weights_are_those_of_the_attention_in_the_model(attention, text_path, scan_layers):
    """Rows sum to 1, what may not be seen has 0, weights times values are what the model's attention gave, and they are
    softmax(q k / sqrt(d)) of its own queries and keys."""
    models, params, given = models_with(attention=attention, text_path=text_path, scan_layers=scan_layers)
    written, own = inspection.written_out(models, params)
    found = inspection.attention_weights(written, own, *given, np.arange(N))
    joint = text_path != "cross"
    assert found.video_LBQAN.shape == (2, 2, N, HEADS, N) and found.words_LBQAS.shape == (2, 2, N, HEADS, S)
    video, words = np.asarray(found.video_LBQAN), np.asarray(found.words_LBQAS)
    whole = video.sum(-1) + words.sum(-1) if joint else np.stack([video.sum(-1), words.sum(-1)])
    np.testing.assert_allclose(whole, 1, atol=1e-5)
    assert (words[:, ~REAL_WORDS[:, None, None].repeat(N, 1).repeat(HEADS, 2)] == 0).all()

    selfs, apart, _ = jax.tree.map(np.asarray, attentions(written, own, given))
    turns = embeddings.rotary_turns(embeddings.grid_places(GRID), WIDTH // HEADS)
    number = np.arange(N)
    for layer, (q, k, v, out) in enumerate(selfs):
        pattern = Pattern(attention[layer % len(attention)], GRID, (1, 0, 1))
        sees_QN = np.asarray(pattern.sees(number[:, None], number))
        assert (video[layer][:, ~sees_QN.any(1)] == 0).all()
        assert (video[layer].swapaxes(1, 2)[..., ~sees_QN] == 0).all()
        assert (video[layer].swapaxes(1, 2)[..., sees_QN] > 0).all()

        row = np.concatenate([video[layer], words[layer]], axis=-1) if joint else video[layer]
        np.testing.assert_allclose(np.einsum("bqam,bmad->bqad", row, v), out[:, :N], atol=1e-5)

        q_video, k_video = (np.asarray(embeddings.rotate(jnp.asarray(y[:, :N]), turns)) for y in (q, k))
        keys = np.concatenate([k_video, k[:, N:]], axis=1)
        scores = np.einsum("bqad,bmad->bqam", q_video, keys) / np.sqrt(WIDTH // HEADS)
        seen_BQAM = np.broadcast_to(sees_QN[None, :, None], (2, N, HEADS, N))
        if joint:
            real = np.broadcast_to(REAL_WORDS[:, None, None], (2, N, HEADS, S))
            seen_BQAM = np.concatenate([seen_BQAM, real], axis=-1)
        np.testing.assert_allclose(row, softmax(scores, seen_BQAM), atol=1e-5)
    for layer, (_, _, v, out) in enumerate(apart):
        np.testing.assert_allclose(np.einsum("bqas,bsad->bqad", words[layer], v), out, atol=1e-5)


@pytest.mark.parametrize(
    "time_path, text_path", [("in_context", "cross"), ("in_context", "dual"), ("cross_attention", "cross")]
)
def test_a_time_that_is_a_token_has_the_rest(time_path, text_path):
    models, params, given = models_with(time_path=time_path, text_path=text_path)
    found = inspection.attention_weights(*inspection.written_out(models, params), *given, np.arange(N))
    assert found.video_LBQAN.shape == (2, 2, N, HEADS, N) and found.words_LBQAS.shape == (2, 2, N, HEADS, S)
    assert (np.asarray(found.words_LBQAS)[:, ~REAL_WORDS[:, None, None].repeat(N, 1).repeat(HEADS, 2)] == 0).all()
    video, words = np.asarray(found.video_LBQAN).sum(-1), np.asarray(found.words_LBQAS).sum(-1)
    sums = {"video": video, "words": words} if text_path == "cross" else {"both": video + words}
    has_time = {"in_context": "video", "cross_attention": "words"}[time_path] if text_path == "cross" else "both"
    for name, whole in sums.items():
        if name == has_time:
            assert (whole > 0).all() and (whole < 1).all()
        else:
            np.testing.assert_allclose(whole, 1, atol=1e-5)


def test_layers_written_out_are_the_same_model():
    models, params, given = models_with(attention=("frame", "time"), num_layers=4, scan_layers=True, remat="everything")
    written, own = inspection.written_out(models, params)
    assert {name for name in own["dit"] if name.startswith("layers")} == {"layers_0", "layers_1"}
    x_Bthwz, time_B, tokens, mask = given

    @functools.partial(jax.jit, static_argnums=0)
    def predict(models, params):
        return models.predict(params, x_Bthwz, time_B, models.read(params, tokens, mask), mask)

    np.testing.assert_allclose(predict(written, own), predict(models, params), rtol=1e-4, atol=1e-4)


def test_a_gaze_is_from_the_patch_that_holds_the_pixel(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    result = pipeline.generate([RED])
    gaze = inspection.gaze_of(pipeline, result.latents[0], RED, at=(3, 9, 2), time=0.5, seed=4)
    assert gaze.token == (2, 1, 0)  # frames 3 and 4; rows 8 to 15
    assert gaze.video_LAthw.shape == (2, 2, 3, 2, 2) and gaze.words_LAS.shape == (2, 2, 5)
    assert gaze.words == ("(start)", "a", "red", "ball", "moves")
    np.testing.assert_allclose(gaze.video_LAthw.sum(axis=(2, 3, 4)), 1, atol=1e-5)
    np.testing.assert_allclose(gaze.words_LAS.sum(axis=-1), 1, atol=1e-5)
    same_patch = inspection.gaze_of(pipeline, result.latents[0], RED, at=(4, 15, 7), time=0.5, seed=4)
    np.testing.assert_array_equal(same_patch.video_LAthw, gaze.video_LAthw)
    for changed in (dict(at=(3, 9, 9)), dict(time=0.9), dict(seed=5)):
        other = inspection.gaze_of(
            pipeline, result.latents[0], RED, **{**dict(at=(3, 9, 2), time=0.5, seed=4), **changed}
        )
        assert np.abs(other.video_LAthw - gaze.video_LAthw).max() > 1e-4

    without_noise = inspection.gaze_of(pipeline, result.latents[0], RED, at=(3, 9, 2), time=0, seed=4)
    with_other = inspection.gaze_of(pipeline, result.latents[0], RED, at=(3, 9, 2), time=0, seed=5)
    np.testing.assert_array_equal(without_noise.video_LAthw, with_other.video_LAthw)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(at=(5, 0, 0)), r"at=\(5, 0, 0\): expected \(frame, y, x\) of a pixel of a clip of \(5, 16, 16\)"),
        (dict(at=(0, -1, 0)), "counted from 0"),
        (dict(time=1.5), r"time=1.5: expected a noise level in \[0, 1\]"),
        (dict(prompt="a purple ball"), "never saw the word"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(changes, message, tiny_model):
    pipeline = Pipeline.load(tiny_model)
    arguments = {**dict(prompt=RED, at=(0, 0, 0), time=0.5), **changes}
    with pytest.raises(ValueError, match=message):
        inspection.gaze_of(pipeline, np.zeros((3, 4, 4, 4), np.float32), arguments.pop("prompt"), **arguments)


def test_a_network_that_is_no_transformer_is_refused():
    from stvdm.models.unet import UNet

    models, params, _ = models_with()
    with pytest.raises(ValueError, match="this is a UNet, whose attention stays within"):
        inspection.written_out(models._replace(dit=UNet(latent_channels=4, text_width=8, width=8, num_heads=2)), params)


def test_shares_on_marked_tokens_count_other_frames_only(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    mask_THW = np.zeros((5, 16, 16), bool)
    mask_THW[0, 3, 3] = mask_THW[3, 0, 15] = mask_THW[4, 15, 15] = True
    tokens = inspection.tokens_showing(pipeline, mask_THW)
    expected = np.zeros((3, 2, 2), bool)
    expected[0, 0, 0] = expected[2, 0, 1] = expected[2, 1, 1] = True
    np.testing.assert_array_equal(tokens, expected)

    video_LAthw = np.zeros((1, 3, 3, 2, 2), np.float32)
    video_LAthw[0, 0] = 1 / 12  # nowhere in particular
    video_LAthw[0, 1, 2, 0, 1] = 0.2  # one of the marked of frame 2,
    video_LAthw[0, 1, 1, 0, 1] = 0.6  # and one that is not marked
    video_LAthw[0, 1, 0, 0, 0] = 0.2  # its own frame
    video_LAthw[0, 2, 0] = 0.25  # nothing but its own frame
    gaze = inspection.Gaze(video_LAthw, np.zeros((1, 3, 1)), ("(start)",), token=(0, 1, 1))
    share, chance = inspection.share_on(gaze, tokens)
    assert chance == pytest.approx(2 / 8)
    np.testing.assert_allclose(share, [[0.25, 0.25, np.nan]])


@functools.cache
def bundled():
    return Pipeline.load()


def test_a_head_of_the_bundled_model_follows_a_thing():
    """As the first notebook says: head 1 of layer 5 looks for the same thing, and head 0 of layer 2 for any."""
    pipeline = bundled()
    slides = ("left", "right", "up", "down")
    plan = dict(pipeline.settings["data"]["world"]) | dict(
        num_things=(0.0, 1.0), motions=slides, motion_weights=(1.0,) * 4
    )
    scenes = [
        kinetic_shapes.sample_scene(0, index, split="test", world=kinetic_shapes.World(**plan)) for index in range(6)
    ]
    found = inspection.following(pipeline, scenes, time=0.3)
    assert found.same_LA.shape == found.others_LA.shape == found.elsewhere_LA.shape == (6, 4)
    assert found.chance < 0.3
    assert found.same_LA[5, 1] > 0.6 and found.others_LA[5, 1] < 0.1 and found.elsewhere_LA[5, 1] > 0.5
    assert found.same_LA[2, 0] + found.others_LA[2, 0] > 0.75 and found.others_LA[2, 0] > 0.2


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_march_ends_in_the_clip_and_goes_by_what_it_expects(sampler, guidance, tiny_model):
    pipeline = Pipeline.load(tiny_model)
    result = pipeline.generate([RED, RED], seeds=[1, 7], steps=5, sampler=sampler, guidance=guidance)
    steps = inspection.march(pipeline, result, 1)
    assert steps.times.shape == (6,) and steps.states.shape == (6, 3, 4, 4, 4) and steps.data.shape == (5, 3, 4, 4, 4)
    np.testing.assert_allclose(steps.states[-1], result.latents[1], atol=1e-4)
    np.testing.assert_array_equal(steps.states[0], jax.random.normal(jax.random.key(7), (3, 4, 4, 4)))
    if sampler == "unipc":  # the step to t = 0 lands on what is expected
        np.testing.assert_allclose(steps.states[-1], steps.data[-1], atol=1e-3)
    else:  # x_next = (t_next / t) x + (1 - t_next / t) x0, on straight paths
        ratio = flow.expand(jnp.asarray(steps.times[1:] / steps.times[:-1]), steps.data)
        expected = ratio * steps.states[:-1] + (1 - ratio) * steps.data
        np.testing.assert_allclose(steps.states[1:], expected, atol=1e-4)


def test_latents_as_colours_keep_distances_and_say_what_they_show():
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    latent = (rng.normal(size=(5, 8, 8, 6)) * np.array([4, 2, 1, 0.1, 0.1, 0.1])) @ turned + 3.0
    pictures = inspection.latent_pictures(latent)
    assert pictures.rgb.shape == (5, 8, 8, 3) and pictures.rgb.dtype == np.uint8
    np.testing.assert_allclose(pictures.share, np.array([16, 4, 1]) / 21.03, atol=0.05)
    inner = ((pictures.rgb > 0) & (pictures.rgb < 255)).all(axis=-1)
    points, colours = latent[inner][:60], pictures.rgb[inner][:60].astype(float)
    far = np.linalg.norm(points[:, None] - points, axis=-1)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert np.corrcoef(far.ravel(), apart.ravel())[0, 1] > 0.99
    assert (inspection.latent_pictures(latent).rgb == pictures.rgb).all()

    chosen = inspection.latent_pictures(latent, channels=(4, 0, 2)).rgb[..., 0].astype(float)
    assert np.corrcoef(chosen.ravel(), np.clip(latent[..., 4], *np.percentile(latent[..., 4], (1, 99))).ravel())[
        0, 1
    ] == pytest.approx(1, abs=0.02)
    for wrong in (dict(channels=(0, 1)), dict(channels=(0, 1, 6))):
        with pytest.raises(ValueError, match="of a latent with 6: expected three, each from 0 to 5"):
            inspection.latent_pictures(latent, **wrong)
    with pytest.raises(ValueError, match="of a latent with 2"):
        inspection.latent_pictures(latent[..., :2])


def test_weights_lie_over_the_pixels_of_their_tokens(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    video = np.full((5, 16, 16, 3), 100, np.uint8)
    weights = np.zeros((3, 2, 2))
    weights[1, 0, 1], weights[2, 1, 1] = 0.8, 0.4
    shown = inspection.overlay(pipeline, video, weights, min_side=32)
    assert shown.shape == (5, 32, 32, 3) and shown.dtype == np.uint8
    assert (shown[1:3, :16, 16:] == (255, 140, 0)).all()
    half = 0.5 * np.array([60, 60, 60]) + 0.5 * np.array([255, 140, 0])
    assert np.abs(shown[3:5, 16:, 16:].astype(float) - half).max() <= 0.5
    assert (shown[0] == 60).all() and (shown[1:, :, :16] == 60).all()

    framed = inspection.overlay(pipeline, video, weights, at=(0, 3, 12), min_side=32)
    green = (framed == (0, 255, 0)).all(axis=-1)
    assert green[0, 0, 16:].all() and green[0, 15, 31] and not green[0, 4, 20] and not green[1:].any()


def test_borders_are_drawn_between_tokens(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    drawn = inspection.token_borders(pipeline, np.zeros((5, 16, 16, 3), np.uint8), min_side=32)
    white = (drawn == 255).all(axis=-1)
    assert white[:, 16].all() and white[:, :, 16].all() and white[:, 0].all()
    assert not white[:, 1:16, 1:16].any()
    picked = inspection.token_borders(pipeline, np.zeros((5, 16, 16, 3), np.uint8), at=(1, 8, 0), min_side=32)
    assert (picked[1:3, 16:18, :16] == (0, 255, 0)).all() and not (picked[3, :, :, 0] != picked[3, :, :, 1]).any()


def test_places_of_the_tokens_of_a_pipeline_are_those_of_shapes(tiny_model):
    pipeline = Pipeline.load(tiny_model)
    geometry = dict(patch=(1, 2, 2), temporal=2, spatial=4, grouping="causal")
    assert shapes.pixels_of_token((2, 1, 0), **geometry) == (slice(3, 5), slice(8, 16), slice(0, 8))
    mask = np.zeros((5, 16, 16), bool)
    mask[shapes.pixels_of_token((2, 1, 0), **geometry)] = True
    assert np.argwhere(inspection.tokens_showing(pipeline, mask)).tolist() == [[2, 1, 0]]
