# SPDX-License-Identifier: Apache-2.0
"""From prompts to videos, on a tiny model with random weights: determinism, guidance, streaming, refusals."""

import dataclasses
import hashlib
import json

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm import checkpoint
from stvdm import config as base
from stvdm.diffusion import schedules
from stvdm.models import autoencoder3d
from stvdm.sampling import pipeline
from stvdm.sampling.pipeline import Pipeline

RED = "a red ball moves"
BLUE = "a blue square grows"


def test_a_seed_gives_the_same_bytes_whatever_is_asked_for_beside_it(tiny_model):
    loaded = Pipeline.load(tiny_model)
    alone = loaded.generate([RED], seed=7)
    among = loaded.generate([BLUE, RED], seed=6, num=2)
    assert among.prompts == [BLUE, BLUE, RED, RED]
    assert among.seeds == [6, 7, 6, 7]
    assert alone.latents[0].tobytes() == among.latents[3].tobytes()
    assert (alone.videos[0] == among.videos[3]).all()
    assert among.latents[2].tobytes() != among.latents[3].tobytes()  # another seed
    assert among.latents[1].tobytes() != among.latents[3].tobytes()  # another prompt


def test_batches_give_what_single_videos_give(tiny_model):
    loaded = Pipeline.load(tiny_model)
    prompts = [RED, BLUE, RED]
    single = loaded.generate(prompts, seeds=[1, 2, 3])
    made = []
    batched = loaded.generate(prompts, seeds=[1, 2, 3], batch_size=2, made=made.append)  # the last is filled up
    np.testing.assert_allclose(single.latents, batched.latents, atol=1e-4)
    assert batched.videos.shape == single.videos.shape == (3, 5, 16, 16, 3)
    assert batched.videos.dtype == np.uint8
    assert [(part.prompts, part.seeds) for part in made] == [([RED, BLUE], [1, 2]), ([RED], [3])]
    np.testing.assert_array_equal(np.concatenate([part.videos for part in made]), batched.videos)
    np.testing.assert_array_equal(np.concatenate([part.latents for part in made]), batched.latents)


@pytest.mark.parametrize("sampler", list(pipeline.SAMPLERS))
def test_each_sampler_reaches_the_same_end_with_many_steps(sampler, tiny_model):
    loaded = Pipeline.load(tiny_model)
    fine = loaded.generate([RED], steps=64, sampler="heun", guidance=1).latents
    other = loaded.generate([RED], steps=64, sampler=sampler, guidance=1).latents
    coarse = loaded.generate([RED], steps=2, sampler="euler", guidance=1).latents
    assert np.abs(other - fine).max() < 0.1 * np.abs(coarse - fine).max()


def test_guidance_moves_along_the_difference_to_the_empty_prompt(tiny_model):
    loaded = Pipeline.load(tiny_model)
    one_step = dict(steps=1, sampler="euler")
    with_prompt = loaded.generate([RED], guidance=1, **one_step).latents
    guided = loaded.generate([RED], guidance=3, **one_step).latents
    more = loaded.generate([RED], guidance=5, **one_step).latents
    assert np.abs(guided - with_prompt).max() > 1e-3
    # In one Euler step the result is linear in the scale.
    np.testing.assert_allclose(more - guided, guided - with_prompt, atol=1e-4)


def test_a_negative_prompt_is_what_guidance_leads_away_from(tiny_model):
    loaded = Pipeline.load(tiny_model)
    one_step = dict(steps=1, sampler="euler")
    wanted, unwanted = (loaded.generate([text], guidance=1, **one_step).latents for text in (RED, BLUE))
    away = loaded.generate([RED], negative=BLUE, guidance=3, **one_step)
    np.testing.assert_allclose(away.latents, unwanted + 3 * (wanted - unwanted), atol=1e-4)
    assert away.settings["negative"] == BLUE
    plain = loaded.generate([RED], guidance=3, **one_step)
    assert plain.settings["negative"] == ""
    assert np.abs(away.latents - plain.latents).max() > 1e-3


def test_words_of_a_negative_prompt_that_it_never_saw_are_refused(tiny_model):
    loaded = Pipeline.load(tiny_model)
    with pytest.raises(ValueError, match=r"^negative prompt 'a blurred ball': the model never saw the words 'blurred'"):
        loaded.generate([RED], negative="a blurred ball")
    with pytest.warns(UserWarning, match="negative='a blue square': guidance=1 leads away from nothing"):
        loaded.generate([RED], negative="a blue square", guidance=1)


def test_the_times_are_those_of_the_setting(tiny_model):
    loaded = Pipeline.load(tiny_model)
    chosen = {**loaded.settings["sample"], "steps": 6, "shift": 3.0, "spacing": "unipc"}
    wanted = schedules.stops(6, shift=3.0, spacing="unipc")
    np.testing.assert_array_equal(loaded.stops(chosen, (3, 4, 4)), wanted)
    other = dataclasses.replace(loaded, settings={**loaded.settings, "sample": chosen})
    assert other.generate([RED]).settings["spacing"] == "unipc"
    assert other.generate([RED]).latents.tobytes() != loaded.generate([RED], steps=6).latents.tobytes()


def test_models_of_before_these_were_settings_are_sampled_as_ever(tiny_model):
    loaded = Pipeline.load(tiny_model)
    new = ("negative", "boundary", "guidance_low", "spacing")
    old = {name: value for name, value in loaded.settings["sample"].items() if name not in new}
    before = dataclasses.replace(loaded, settings={**loaded.settings, "sample": old})
    assert before.generate([RED]).latents.tobytes() == loaded.generate([RED]).latents.tobytes()


def test_two_networks_take_turns(tiny_model):
    loaded = Pipeline.load(tiny_model)
    first = loaded.params["dit"]
    second = jax.tree.map(lambda leaf: leaf * 0.9, first)
    rest = {name: part for name, part in loaded.params.items() if name != "dit"}
    sample = {**loaded.settings["sample"], "boundary": 0.6, "guidance_low": 1.5}  # of times 1, 0.75, 0.5, 0.25

    def made(first, second, **settings):
        params = {**rest, "dit_high_noise": first, "dit_low_noise": second}
        both = dataclasses.replace(loaded, params=params, settings={**loaded.settings, "sample": sample})
        return both.generate([RED], **settings).latents

    np.testing.assert_allclose(made(first, first, guidance_low=2.0), loaded.generate([RED]).latents, atol=1e-5)
    assert np.abs(made(first, second) - made(first, first)).max() > 1e-3
    assert np.abs(made(first, first) - made(first, first, guidance_low=2.0)).max() > 1e-3
    with pytest.raises(ValueError, match=r"sample.boundary=0.0: this model's two networks take turns"):
        dataclasses.replace(loaded, params={**rest, "dit_high_noise": first, "dit_low_noise": second}).generate([RED])


def test_a_first_frame_is_kept(tiny_model):
    """Nothing of the image but its middle fits the clip; its latent is the clip's first, bit by bit."""
    loaded = Pipeline.load(tiny_model)
    image = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    result = loaded.generate([RED, BLUE], image=image, seed=3)
    known = np.asarray(loaded.encode(image[None, None, :, 12:28]))
    for latent in result.latents:
        np.testing.assert_allclose(latent[:1], known[0], atol=1e-5)
    assert result.latents[0, 0].tobytes() == result.latents[1, 0].tobytes()
    assert np.abs(result.latents[0, 1:] - loaded.generate([RED], seed=3).latents[0, 1:]).max() > 1e-3
    assert result.settings["image_sha256"] == hashlib.sha256(image.tobytes()).hexdigest()


def test_the_tower_that_looks_at_images_is_named_in_the_config(tmp_path):
    shapes = foreign.golden()["clip"]["shapes"]
    tensors = foreign.weights({name: shape for name, shape in shapes.items() if name.startswith("vision_model")})
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.CLIP["vision_config"]))
    config = base.dit().to_dict()
    assert pipeline.looker_of(config) is pipeline.looker_of(config, tmp_path) is None  # no network that reads images
    config["model"]["image_width"], config["image"] = 32, {"tower": str(tmp_path), "tower_dtype": "bfloat16"}
    looker = pipeline.looker_of(config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(looker.params)} == {"bfloat16"}
    assert pipeline.looker_of({**config, "image": {}}, tmp_path).model == looker.model
    config["model"]["image_width"] = 1280
    with pytest.raises(ValueError, match=r"model.image_width=1280: the tower '.*' gives 32; name another tower"):
        pipeline.looker_of(config)
    with pytest.raises(FileNotFoundError, match="expected a folder of safetensors"):
        pipeline.looker_of(config, tmp_path / "elsewhere")


def test_of_two_networks_adapters_say_which_they_are_for(tiny_model, tmp_path):
    params, description = checkpoint.load_model(tiny_model)
    two = {"dit_high_noise": params["dit"], "dit_low_noise": params.pop("dit")}
    checkpoint.save_model(tmp_path, params | two, description)
    assert Pipeline.load(tmp_path).networks.keys() == {*two, "text"}
    ones = {"down": np.ones((2, 16, 1), np.float32), "up": np.ones((2, 1, 32), np.float32)}
    adapters = {"dit": {"layers": {"block_0": {"mlp_in": ones}}}}
    checkpoint.save_model(tmp_path / "plain", adapters, {"kind": "lora"})
    with pytest.raises(ValueError, match="for the network 'dit', and this model has dit_high_noise, dit_low_noise"):
        Pipeline.load(tmp_path, adapters=[(tmp_path / "plain", 1.0)])
    checkpoint.save_model(tmp_path / "low", adapters, {"kind": "lora", "network": "dit_low_noise"})
    both = Pipeline.load(tmp_path, adapters=[(tmp_path / "low", 0.5)]).params
    assert "up" in both["dit_low_noise"]["layers"]["block_0"]["mlp_in"]
    assert "up" not in both["dit_high_noise"]["layers"]["block_0"]["mlp_in"]


def test_a_model_with_adapters_is_told_apart_from_its_base(tiny_model, tmp_path):
    """By what stands in results, where the digest says whether two are of one model."""
    for name, size in (("one", 1.0), ("other", 2.0)):
        ones = {"down": np.full((2, 16, 1), size, np.float32), "up": np.ones((2, 1, 32), np.float32)}
        adapters = {"dit": {"layers": {"block_0": {"mlp_in": ones}}}}
        checkpoint.save_model(tmp_path / name, adapters, {"kind": "lora", "base": str(tiny_model)})

    def digest(*adapters, path=tiny_model):
        return Pipeline.load(path, adapters=[(tmp_path / name, weight) for name, weight in adapters]).digest

    one, other = ("one", 1.0), ("other", 1.0)
    found = [digest(), digest(one), digest(other), digest(("one", 0.5)), digest(one, other)]
    assert len(set(found)) == len(found) and {len(each) for each in found} == {64}
    assert digest(one, other) == digest(other, one)
    assert digest(path=tmp_path / "one") == digest(one)


def test_adapters_whose_base_is_elsewhere_say_so(tmp_path):
    """Its folder is as it was typed in training: perhaps relative, perhaps on another machine."""
    ones = {"down": np.ones((16, 1), np.float32), "up": np.ones((1, 32), np.float32)}
    checkpoint.save_model(tmp_path, {"dit": {"mlp_in": ones}}, {"kind": "lora", "base": "runs/there"})
    with pytest.raises(FileNotFoundError, match="trained beside the model in 'runs/there', which is not there; give"):
        Pipeline.load(tmp_path)


def test_decoding_streams_and_equals_whole_decoding(tiny_model):
    loaded = Pipeline.load(tiny_model)
    result = loaded.generate([RED], seed=1)
    latent = autoencoder3d.denormalise(jnp.asarray(result.latents), loaded.params["statistics"])
    whole = loaded.autoencoder.apply({"params": loaded.params["autoencoder"]}, latent, method="decode")
    difference = np.abs(pipeline.to_uint8(whole).astype(int) - result.videos)
    assert difference.max() <= 1  # a rounding at most


def test_encoding_is_normalised_and_decoding_undoes_it(tiny_model):
    loaded = Pipeline.load(tiny_model)
    video = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)
    mean, _ = loaded.autoencoder.apply({"params": loaded.params["autoencoder"]}, video / 127.5 - 1, method="encode")
    expected = (mean - loaded.params["statistics"]["mean_z"]) / loaded.params["statistics"]["std_z"]
    np.testing.assert_allclose(loaded.encode(video), expected, atol=1e-4)


def test_progress_counts_all_steps_of_all_videos(tiny_model):
    loaded = Pipeline.load(tiny_model)
    seen = []
    loaded.generate([RED, BLUE], steps=3, progress=lambda done, total: seen.append((done, total)))
    jax.effects_barrier()
    assert {total for _, total in seen} == {6}
    assert sorted(done for done, _ in seen) == [1, 2, 3, 4, 5, 6]


def test_other_sizes_are_made_with_a_warning_and_impossible_ones_refused(tiny_model):
    loaded = Pipeline.load(tiny_model)
    with pytest.warns(UserWarning, match="was trained on"):
        result = loaded.generate([RED], num_frames=9, height=16, width=32)
    assert result.videos.shape == (1, 9, 16, 32, 3)
    for arguments, message in (
        (dict(num_frames=6), r"num_frames=6: .* use 2k\+1, e\.g\. 5 or 7"),
        (dict(height=18), "height=18"),
        (dict(steps=0), "steps=0"),
        (dict(sampler="ddim"), "sampler='ddim': expected one of euler"),
        (dict(num=0), "num=0"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.generate([RED], **arguments)


def test_words_it_never_saw_are_refused_with_those_it_knows(tiny_model):
    loaded = Pipeline.load(tiny_model)
    with pytest.raises(ValueError, match=r"never saw the words 'purple', 'giraffe'; it knows 7: a, ball, blue"):
        loaded.generate(["a purple giraffe moves"])
    for prompts in ([], [""], ["  "]):
        with pytest.raises(ValueError, match="expected at least one"):
            loaded.generate(prompts)
    with pytest.raises(ValueError, match="and the model reads 12; shorten it"):
        loaded.generate([" ".join(["ball"] * 12)])


def test_an_autoencoder_alone_is_refused(tiny_model, tmp_path):
    params, description = checkpoint.load_model(tiny_model)
    checkpoint.save_model(tmp_path, {"autoencoder": params["autoencoder"]}, {**description, "kind": "autoencoder"})
    with pytest.raises(ValueError, match="kind 'autoencoder', which makes no videos by itself"):
        Pipeline.load(tmp_path)


def test_the_shift_follows_tokens(tiny_model):
    loaded = Pipeline.load(tiny_model)
    settings, coder = loaded.settings, loaded.autoencoder
    assert pipeline.shift_of((3, 4, 4), coder, settings) == 1  # of the largest bucket, which is the base
    assert pipeline.shift_of((3, 8, 8), coder, settings) == pytest.approx(2)  # four times the tokens
    buckets = ((1, 16, 16, 8, 1.0), *settings["data"]["buckets"])
    assert pipeline.shift_of((3, 4, 4), coder, {**settings, "data": {"buckets": buckets}}) == 1
    settings = {**settings, "flow": {**settings["flow"], "base_tokens": 48}}
    assert pipeline.shift_of((3, 4, 4), coder, settings) == pytest.approx(0.5)  # 3 x 2 x 2 tokens


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(guidance=float("nan")), "guidance=nan: expected a number of at least 0"),
        (dict(guidance=-1.0), "guidance=-1.0: expected"),
        (dict(seed=2**32), "seed=4294967296: expected a whole number from 0 to 4294967295"),
        (dict(seed=-1), "seed=-1: expected"),
        (dict(prompts="a ball"), r"prompts='a ball': expected a list of sentences, so write \['a ball'\]"),
        (dict(seeds=[1, 2]), "2 seeds for 1 prompts, num=1: expected one for each, and num=1"),
        (dict(seeds=[1], num=2), "1 seeds for 1 prompts, num=2: expected"),
        (dict(batch_size=0), "batch_size=0: expected at least 1"),
        (dict(num_frames=0), "num_frames=0: .* e.g. 1"),
        (dict(height=0), "height=0: .* use a multiple of 8"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        Pipeline.load(tiny_model).generate(**{"prompts": [RED], **settings})


def test_guidance_of_a_second_network_is_said_to_do_nothing_where_there_is_one(tiny_model):
    with pytest.warns(UserWarning, match="guidance_low=3.0 has no effect: this model has one network"):
        Pipeline.load(tiny_model).generate([RED], guidance_low=3.0)


def test_the_settings_say_all_that_is_needed_to_make_it_again(tiny_model):
    loaded = Pipeline.load(tiny_model)
    first = loaded.generate([RED], seed=5, steps=3, guidance=2.0, sampler="dpm++")
    wanted = {name: first.settings[name] for name in ("steps", "guidance", "sampler", "num_frames", "height", "width")}
    again = loaded.generate(first.prompts, seed=first.seeds[0], **wanted)
    assert again.latents.tobytes() == first.latents.tobytes()
    assert first.settings["model_sha256"] == loaded.digest
    assert dataclasses.asdict(first)["seeds"] == [5]


def test_the_bundled_model_draws_the_colour_it_is_asked_for():
    """The model that comes with the package is whole, small, and listens; how well is in its model card."""
    from stvdm.evaluation.tracking import track

    weights = pipeline.bundled() / checkpoint.WEIGHTS
    assert weights.stat().length < 25e6
    loaded = Pipeline.load()
    colours = ("red", "green", "blue", "yellow")
    result = loaded.generate([f"a {colour} ball moves to the right" for colour in colours], batch_size=4)
    found = [{thing.colour for thing in track(video)} for video in result.videos]
    assert sum(colour in seen for colour, seen in zip(colours, found, strict=True)) >= 3
