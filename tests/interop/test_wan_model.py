# SPDX-License-Identifier: Apache-2.0
"""A whole Wan comes in, is sampled as diffusers samples it, and goes out as it was; so do parts of one."""

import importlib.util
import json
import re

import flax.linen as nn
import foreign
import foreign_wan_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from stvdm import checkpoint
from stvdm import config as base
from stvdm.diffusion import flow, guidance, samplers
from stvdm.interop import wan, wan_autoencoder, wan_model, weights
from stvdm.models import autoencoder3d
from stvdm.models.dit import DiT
from stvdm.sampling import pipeline

TOLERANCE = 1e-5  # of the size of the values, float32
FORMATS = ("diffusers", "original")
OF_WEIGHTS = ".safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return foreign_wan_model.write(tmp_path_factory.mktemp("published") / "wan")


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    wan_model.bring(published, folder)
    return folder


def transformer():
    return DiT(**wan.fields_of(foreign_wan_model.TRANSFORMER, foreign_wan_model.transformer_shapes()))


def opened(folder):
    """The pipeline of a folder, whose tower is in float32."""
    pytest.importorskip("tokenizers")
    params, description = checkpoint.load_model(folder)
    description["config"]["text"]["tower_dtype"] = "float32"
    reader = pipeline.reader_of(description["config"])
    return pipeline.Pipeline.of(params, description, reader=reader.on())


def sampled(folder, sigmas, timesteps):
    """What the reference gives: latents after each step, frames in [0, 1]."""
    made = opened(folder)
    times, told = jnp.asarray(sigmas), jnp.asarray([*timesteps, 0]) / 1000

    @jax.jit
    def run(params, noise, prompt, null):
        def velocity(text_BSE, mask_BS):
            return lambda x, t: made.models.predict(
                params, x, jnp.full(len(x), told[jnp.argmin(jnp.abs(times - t))]), text_BSE, mask_BS
            )

        guided = guidance.classifier_free(velocity(*prompt), velocity(*null), scale=foreign_wan_model.GUIDANCE)
        march = samplers.sample(guided, noise, times, sampler=samplers.unipc(flow.RECTIFIED), return_path=True)
        latent = autoencoder3d.denormalise(march[-1], params["statistics"])
        frames = made.autoencoder.apply({"params": params["autoencoder"]}, latent, method="decode")
        return march[1:], jnp.clip(frames / 2 + 0.5, 0, 1)

    prompt, null = (made.words(captions) for captions in (foreign_wan_model.PROMPTS, ["", ""]))
    latents, frames = run(made.params, foreign_wan_model.noise(), prompt, null)
    return {**{f"latent_{i + 1}": latent for i, latent in enumerate(latents)}, "frames": frames}


def in_norm(array, expected):
    """The error of the values that are shown of the reference, in parts of their size."""
    there = np.asarray(list(expected["values"].values()))
    gap = np.ravel(array)[[int(place) for place in expected["values"]]] - there
    return np.linalg.norm(gap) / np.linalg.norm(there)


def test_a_whole_sampling_is_that_of_diffusers(ours):
    """In norm: guidance multiplies what differs by rounding, and a single value may be thrice as far off."""
    golden = foreign_wan_model.golden()
    found = sampled(ours, golden["sigmas"], golden["timesteps"])
    assert found.keys() == golden["outputs"].keys()
    worst = {name: foreign.error(array, golden["outputs"][name]) for name, array in found.items()}
    errors = {name: in_norm(array, golden["outputs"][name]) for name, array in found.items()}
    print({name: f"{error:.1e}, at worst {worst[name]:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors
    assert max(worst.values()) < 3 * TOLERANCE, worst


def test_the_pipeline_samples_it_so_by_itself(ours, monkeypatch):
    """By nothing but its config, from the same noise."""
    made, golden = opened(ours), foreign_wan_model.golden()["outputs"]
    monkeypatch.setattr(pipeline, "noise_of", lambda seed, shape: jnp.asarray(foreign_wan_model.noise()[seed]))
    settings = dict(foreign_wan_model.SIZE, steps=foreign_wan_model.STEPS, guidance=foreign_wan_model.GUIDANCE)
    with pytest.warns(UserWarning, match="clips of .*9, 32, 48"):
        result = made.generate(foreign_wan_model.PROMPTS, seeds=[0, 1], batch_size=2, **settings)
    assert in_norm(result.latents, golden[f"latent_{foreign_wan_model.STEPS}"]) < TOLERANCE
    assert in_norm(result.videos / 255, golden["frames"]) < 0.01  # bytes


def test_the_golden_file_is_what_diffusers_says_today(published):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    import make_wan_model

    golden = foreign_wan_model.golden()
    assert (
        foreign.apart(make_wan_model.made(published), {name: golden[name] for name in golden if name != "versions"})
        < 1e-5
    )


def test_diffusers_samples_what_goes_out_as_what_came_in(published, ours, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    import make_wan_model

    wan_model.give(ours, tmp_path, "diffusers")
    whole = diffusers.WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert whole.scheduler.config.flow_shift == foreign_wan_model.SHIFT
    expected = make_wan_model.sampled(make_wan_model.opened(published))
    whole = make_wan_model.opened(tmp_path, towers=published)
    for name, array in make_wan_model.sampled(whole).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(("kind", "two"), [("t2v", False), ("i2v", False), ("i2v-a14b", True)])
def test_what_its_card_says_runs(tmp_path, kind, two):
    """With a smaller clip and two steps, and the towers where they lie."""
    for package in ("torch", "diffusers", "transformers", "accelerate", "ftfy"):
        pytest.importorskip(package)
    given = foreign_wan_model.write(tmp_path / "given", two=two, kind=kind)
    wan_model.bring(given, tmp_path / "ours")
    wan_model.give(tmp_path / "ours", tmp_path / "out", "diffusers")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "image.png")
    (given / "image_processor").mkdir()
    size = foreign.CLIP["vision_config"]["image_size"]
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    (given / "image_processor" / "preprocessor_config.json").write_text(json.dumps(sides))
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    (given / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for name in ("text_encoder", "tokenizer", "image_encoder", "image_processor"):
        code = code.replace(f'"{name}"', repr(str(given / name)))
    code = code.replace('"."', repr(str(tmp_path / "out")))
    code = re.sub(r"num_frames=.*steps=\d+", "num_frames=5, height=32, width=48, num_inference_steps=2", code)
    found = {"PROMPT": "a red ball", "IMAGE": str(tmp_path / "image.png")}
    exec(code, found)
    assert found["frames"].shape == (5, 32, 48, 3) and np.isfinite(found["frames"]).all()
    assert found["pipe"].config.boundary_ratio == (0.875 if two else None)
    assert ("guidance_scale_2=3.5" in code) == two


def test_the_config_says_how_it_was_published(published, ours):
    _, description = checkpoint.load_model(ours)
    settings = description["config"]
    assert description["kind"] == settings["kind"] == "dit"
    assert settings["text"] == settings["text"] | {
        "tower": str(published / "text_encoder"),
        "padding": "zeros",
        "max_tokens": 512,
        "width": 24,
    }
    assert settings["sample"] == settings["sample"] | {
        "sampler": "unipc",
        "spacing": "unipc",
        "steps": 50,
        "guidance": 5.0,
        "shift": 3.0,
        "boundary": 0.0,
    }
    assert (settings["flow"]["shift"], settings["data"]["fps"]) == (3.0, 16.0)
    assert settings["data"]["buckets"] == [[81, 480, 832, 1, 1.0]]
    assert set(settings) == set(base.dit().to_dict())
    made = opened(ours)
    assert made.default_shape == (81, 480, 832)
    assert wan.own_fields(made.models.dit) == wan.own_fields(transformer())


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, ("unipc", 5.0)),
        (foreign_wan_model.SCHEDULER | {"flow_shift": 8.0}, ("unipc", 8.0)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 12.0}, ("euler", 12.0)),
    ],
)
def test_schedulers_are_followed(scheduler, expected):
    dit, coder = DiT(**wan.MODELS["t2v-1.3b"]), wan_autoencoder.WAN_2_1
    parts = dict(towers={"text": "tower", "image": None}, index={}, dtype="bfloat16")
    config = wan_model.settings_of([dit], coder, scheduler=scheduler, **parts)
    assert (config.sample.sampler, config.sample.shift) == (config.sample.spacing, config.flow.shift) == expected
    assert config.model.dtype == "bfloat16"
    with pytest.warns(UserWarning, match="solver_order.: 3.* is not what samples here follow"):
        wan_model.settings_of([dit], coder, scheduler=foreign_wan_model.SCHEDULER | {"solver_order": 3}, **parts)
    assert wan_model.scheduler_of(config.to_dict()) == wan_model.scheduler_of(config.to_dict()) | scheduler


@pytest.mark.parametrize(
    ("size", "coder", "expected"),
    [
        (
            "t2v-14b",
            wan_autoencoder.WAN_2_1,
            dict(boundary=0.875, guidance=4.0, guidance_low=3.0, steps=40, shift=12.0),
        ),
        ("i2v-a14b", wan_autoencoder.WAN_2_1, dict(boundary=0.9, guidance=3.5, guidance_low=3.5, steps=40, shift=5.0)),
    ],
)
def test_two_transformers_are_sampled_as_their_authors_do(size, coder, expected):
    dit = DiT(**wan.MODELS[size])
    config = wan_model.settings_of(
        [dit, dit], coder, scheduler={}, index={}, towers={"text": "tower", "image": None}, dtype="float32"
    )
    assert {name: config.sample[name] for name in expected} == expected
    assert config.model.extra_channels == dit.extra_channels


@pytest.mark.parametrize(("sampler", "said"), [("euler", "shift"), ("unipc", "flow_shift")])
def test_a_shift_by_token_count_goes_out_as_the_number_it_is(ours, tmp_path, sampler, said):
    """Of the clips that it was trained on: 0 would be no noise at any time."""
    params, description = checkpoint.load_model(ours)
    config = description["config"]
    config["sample"] |= {"shift": 0.0, "sampler": sampler}
    config["data"]["buckets"] = [[9, 32, 48, 1, 1.0]]  # 3 x 2 x 3 tokens
    config["flow"]["base_tokens"] = 2
    checkpoint.save_model(tmp_path / "ours", params, description)
    wan_model.give(tmp_path / "ours", tmp_path / "out", "diffusers")
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler[said] == 3.0  # the root of 18 / 2


@pytest.mark.parametrize("sampler", ["heun", "dpm++"])
def test_a_sampler_that_has_no_scheduler_there_stays_behind_with_a_warning(ours, tmp_path, sampler):
    params, description = checkpoint.load_model(ours)
    description["config"]["sample"]["sampler"] = sampler
    checkpoint.save_model(tmp_path / "ours", params, description)
    with pytest.warns(UserWarning, match=f"sampler='{re.escape(sampler)}' stays behind: .* UniPC"):
        wan_model.give(tmp_path / "ours", tmp_path / "out", "diffusers")


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_times_that_no_scheduler_there_takes_stay_behind_with_a_warning(ours, tmp_path, sampler):
    params, description = checkpoint.load_model(ours)
    description["config"]["sample"].update(sampler=sampler, spacing="even")
    checkpoint.save_model(tmp_path / "ours", params, description)
    with pytest.warns(UserWarning, match=f"sample.spacing='even' stays behind: .*made with '{sampler}' too"):
        wan_model.give(tmp_path / "ours", tmp_path / "out", "diffusers")


def test_a_model_for_larger_latents_has_its_own_clips():
    parts = dict(scheduler={}, index={}, towers={"text": "tower", "image": None}, dtype="float32")
    config = wan_model.settings_of([DiT(**wan.MODELS["ti2v-5b"])], wan_autoencoder.WAN_2_2, **parts)
    assert (tuple(config.data.buckets[0][:3]), config.data.fps) == ((121, 704, 1280), 24.0)


@pytest.mark.parametrize("name", ["1.3b", "14b", "i2v-14b", "ti2v-5b", "t2v-a14b", "i2v-a14b"])
def test_where_no_file_says_it_times_are_shifted_as_in_the_config_to_tune_it(name):
    spec = importlib.util.spec_from_file_location("wan_finetune", "configs/wan_finetune.py")
    told = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(told)
    size = {"1.3b": "t2v-1.3b", "14b": "t2v-14b", "t2v-a14b": "t2v-14b"}.get(name, name)
    coder = wan_autoencoder.WAN_2_2 if name == "ti2v-5b" else wan_autoencoder.WAN_2_1
    parts = dict(scheduler={}, index={}, towers={"text": "tower", "image": None}, dtype="float32")
    dits = [DiT(**wan.MODELS[size])] * (2 if "a14b" in name else 1)
    config = wan_model.settings_of(dits, coder, **parts)
    assert config.sample.shift == config.flow.shift == told.MODELS[name]["shift"]
    assert tuple(config.data.buckets[0][:3]) == told.MODELS[name]["clip"]


def tensors_of(folder):
    return {str(path.relative_to(folder)): load_file(path) for path in folder.rglob(f"*{OF_WEIGHTS}")}


def randomly(dit, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), nn.unbox(wan.shapes_of(dit)))


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_every_tensor_comes_back_as_it_was(tmp_path, two):
    given = foreign_wan_model.write(tmp_path / "given", two=two)
    wan_model.bring(given, tmp_path / "ours")
    params, description = checkpoint.load_model(tmp_path / "ours")
    dits = {"dit_high_noise", "dit_low_noise"} if two else {"dit"}
    assert params.keys() == {*dits, "autoencoder", "statistics"}
    np.testing.assert_array_equal(params["statistics"]["mean_z"], np.float32([0.1, -0.2, 0.3, -0.4, 0.5]))
    assert description["config"]["sample"]["boundary"] == (0.875 if two else 0.0)
    names = ("transformer", "transformer_2", "vae") if two else ("transformer", "vae")
    said = wan_model.give(tmp_path / "ours", tmp_path / "back", "diffusers", shard_bytes=60_000)
    assert said == [str(tmp_path / "back" / name) for name in names]
    for name in names:
        before, after = (weights.Weights(tmp_path / side / name) for side in ("given", "back"))
        assert before.shapes == after.shapes
        for tensor in before.shapes:
            np.testing.assert_array_equal(before.read(tensor), after.read(tensor))
        config = json.loads((tmp_path / "back" / name / "config.json").read_text())
        assert config.items() >= json.loads((given / name / "config.json").read_text()).items()
    scheduler = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler.items() >= foreign_wan_model.SCHEDULER.items()
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"]) == ("WanPipeline", 0.875 if two else None)
    card = (tmp_path / "back" / "README.md").read_text()
    assert description["sha256"] in card and "WanPipeline.from_pretrained(" in card

    wan_model.give(tmp_path / "ours", tmp_path / "theirs", "original", shard_bytes=60_000)
    assert (tmp_path / "theirs" / "vae" / "Wan2.1_VAE.safetensors").exists()
    again = wan_model.bring(tmp_path / "theirs", tmp_path / "again", tower=given / "text_encoder")
    assert again["sha256"] == description["sha256"]


def test_products_and_weights_are_in_halves_where_that_is_asked(published, tmp_path):
    wan_model.bring(published, tmp_path, dtype="bfloat16")
    found = weights.Weights(tmp_path / "model.safetensors").places
    assert {name.split("/")[0]: str(place.dtype) for name, place in found.items()} == {
        "dit": "bfloat16",
        "autoencoder": "float32",
        "statistics": "float32",
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_transformer_alone_comes_in_and_goes_out(published, tmp_path, form):
    dit = transformer()
    wan.save(tmp_path / "given", dit, weights.of_tree(randomly(dit, 1)), form, shard_bytes=60_000)
    (tmp_path / "given" / "Wan2.1_VAE.pth").write_bytes(b"a pickle")
    with pytest.warns(UserWarning, match="no autoencoder comes with it"):
        said = wan_model.bring(tmp_path / "given", tmp_path / "ours")
    assert said["kind"] == "transformers"
    (tmp_path / "given" / "Wan2.1_VAE.pth").unlink()
    wan_model.give(tmp_path / "ours", tmp_path / "back", form, shard_bytes=60_000)
    back = tmp_path / "back" / ("transformer" if form == "diffusers" else ".")
    for path in (tmp_path / "given").iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    wan_model.bring(
        tmp_path / "given", tmp_path / "whole", autoencoder=published / "vae", tower=published / "text_encoder"
    )
    assert wan.own_fields(opened(tmp_path / "whole").models.dit) == wan.own_fields(dit)


@pytest.mark.parametrize("form", FORMATS)
def test_an_autoencoder_alone_comes_in_and_goes_out(published, ours, tmp_path, form):
    coder = wan_autoencoder.load(published)
    wan_autoencoder.save(tmp_path / "given", coder.model, weights.of_tree(coder.params), coder.statistics, form)
    said = wan_model.bring(tmp_path / "given", tmp_path / "ours")
    assert said["kind"] == "autoencoder"
    params, _ = checkpoint.load_model(tmp_path / "ours")
    whole, _ = checkpoint.load_model(ours)
    jax.tree.map(np.testing.assert_array_equal, params, {name: whole[name] for name in params})
    assert pipeline.autoencoder_of(json.loads(json.dumps(said["autoencoder"]))) == coder.model
    wan_model.give(tmp_path / "ours", tmp_path / "back", form)
    for path in (tmp_path / "given").iterdir():
        assert (tmp_path / "back" / "vae" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("before", "now"), [("diffusers", "original"), ("original", "diffusers")])
def test_over_another_format_nothing_is_written(ours, tmp_path, before, now):
    """The older would be beside the newer, and be what is imported."""
    wan_model.give(ours, tmp_path, before)
    wan_model.give(ours, tmp_path, before)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="holds diffusion_pytorch_model.safetensors, .* name another folder"):
        wan_model.give(ours, tmp_path, now)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == there


def test_what_was_trained_here_goes_out(tmp_path, tiny_model):
    with (
        pytest.warns(UserWarning, match="the autoencoder is left out: .*convolution='separable'"),
        pytest.warns(UserWarning, match="the text encoder that was trained along is left out"),
    ):
        (folder,) = wan_model.give(tiny_model, tmp_path / "given", "diffusers")
    assert folder == str(tmp_path / "given" / "transformer")
    assert not (tmp_path / "given" / "model_index.json").exists()
    dit, params = wan.load(folder)
    ours, description = checkpoint.load_model(tiny_model)
    jax.tree.map(np.testing.assert_array_equal, params, ours["dit"])
    assert (dit.text_width, dit.num_heads, dit.patch) == (8, 2, (1, 2, 2))
    for flow_, said in (({"prediction": "x0"}, "expects 'rectified' and 'velocity'"), ({"path": "cosine"}, "expects")):
        config = description["config"]
        other = description | {"config": config | {"flow": config["flow"] | flow_}}
        checkpoint.save_model(tmp_path / "other", ours, other)
        with pytest.raises(ValueError, match=said):
            wan_model.give(tmp_path / "other", tmp_path / "out", "original")
    checkpoint.save_model(tmp_path / "other", ours, description | {"kind": "lora"})
    with pytest.raises(ValueError, match="kind 'lora', expected 'dit', .*Merge adapters .* `stvdm lora merge`"):
        wan_model.held(tmp_path / "other")


def test_all_that_is_wrong_is_said_in_one_error_and_nothing_is_written(tmp_path):
    given = foreign_wan_model.write(tmp_path / "given")
    for part, name in (("transformer", "proj_out.weight"), ("vae", "quant_conv.bias")):
        path = given / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["strange"] = tensors.pop(name)
        save_file(tensors, path)
    without = foreign_wan_model.write(tmp_path / "without")
    (without / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="proj_out.weight .*missing") as raised:
        wan_model.bring(given, tmp_path / "ours")
    said = str(raised.value)
    assert "quant_conv.bias (10,): missing" in said and said.count("left over") == 2
    with pytest.raises(ValueError, match="found no text_encoder/; name the folder of the UMT5 .* by `--tower`"):
        wan_model.bring(without, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_parts_of_two_models_are_refused(published, tmp_path):
    other = json.loads((published / "transformer" / "config.json").read_text()) | {"in_channels": 7, "out_channels": 7}
    dit = DiT(**wan.fields_of(other, foreign_wan_model.transformer_shapes()))
    wan.save(tmp_path / "given", dit, weights.of_tree(randomly(dit, 1)), "diffusers")
    with pytest.raises(ValueError, match="dit has latents of 7 channels, expected 5, which the autoencoder has"):
        wan_model.bring(tmp_path / "given", tmp_path / "ours", autoencoder=published / "vae", tower="some/tower")


def test_folders_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="typo: expected a folder of safetensors, or the OWNER/NAME"):
        wan_model.bring(tmp_path, tmp_path / "ours", tower="typo")
    with pytest.raises(FileNotFoundError, match="expected the folder of a Wan model or of its transformer"):
        wan_model.bring(tmp_path, tmp_path / "ours")
    with pytest.raises(
        FileNotFoundError, match="expected a model, found no model.safetensors .* give what `stvdm import` wrote"
    ):
        wan_model.give(tmp_path, tmp_path / "two", "diffusers")
