# SPDX-License-Identifier: Apache-2.0
"""`stvdm import`, and all that can be done with what it writes, by the commands alone."""

import importlib.util
import json
import shlex

import foreign_wan_model
import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file

from stvdm import checkpoint, cli, sharding
from stvdm.interop import wan
from stvdm.train.telemetry import read_metrics

CONFIG = "configs/wan_finetune.py"
SMALL = """
    --config.model.width=48 --config.model.num_layers=3 --config.model.num_heads=3 --config.model.mlp_width=80
    --config.model.time_features=32 --config.text.width=24 --config.text.max_tokens=40
    --config.data.buckets=((9,32,48,2,1.0),) --config.data.num_workers=0 --config.mesh.fsdp=1
    --config.total_steps=2 --config.eval_every=0 --config.log_every=1
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    return foreign_wan_model.write(tmp_path_factory.mktemp("published") / "wan")


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "wan"
    assert cli.main(["import", f"--from={published}", f"--to={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def latents(published, ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    make = f"preprocess --config={CONFIG}:1.3b-v6e-full --checkpoint={ours} --out={folder} --batch=2"
    clips = "--config.data.source=kinetic_shapes --config.data.path= --config.data.num_clips=4"
    tower = f"--config.text.tower={published}/text_encoder"
    assert cli.main(shlex.split(f"{make} {clips} {tower} {SMALL}")) == 0
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Trainers see a machine with one device, however many the tests force."""
    whole = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **axes: whole(**{"devices": jax.devices()[:1], **axes}))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "lora"])
def test_what_comes_in_is_trained_on_sampled_and_goes_out(published, ours, latents, tmp_path, one_device, how):
    """The commands of the config's docstring, in small; and diffusers, where it is, loads what comes of them."""
    run, tower = tmp_path / "run", f"--config.text.tower={published}/text_encoder"
    places = f"--config.start_from={ours} --config.autoencoder={ours} --config.data.path={latents} {tower}"
    train = f"train dit --config={CONFIG}:1.3b-v6e-{how} --workdir={run} {places} {SMALL}"
    assert cli.main(shlex.split(train)) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    before, after = checkpoint.load_model(ours)[0], run
    if how == "lora":
        after = tmp_path / "merged"
        assert cli.main(["lora", "merge", f"--base={ours}", f"--lora={run}", f"--to={after}"]) == 0
    make = f"generate 'a red ball' --checkpoint={run} --steps=2 --frames=5 --height=32 --width=48"
    assert cli.main(shlex.split(f"{make} --output={tmp_path}/clips")) == 0
    assert (tmp_path / "clips" / "a-red-ball-0.mp4").exists()
    assert cli.main(["export", f"--from={after}", f"--to={tmp_path}/out", "--format=diffusers"]) == 0
    dit, trained = wan.load(tmp_path / "out" / "transformer")
    params, description = checkpoint.load_model(after / "model" if how == "full" else after)
    jax.tree.map(np.testing.assert_array_equal, trained, params["dit"])
    jax.tree.map(np.testing.assert_array_equal, params["autoencoder"], before["autoencoder"])
    apart = [float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (trained, before["dit"])), strict=True)]
    assert 0 < max(apart) < 0.1
    assert description["sha256"] in (tmp_path / "out" / "README.md").read_text()
    if importlib.util.find_spec("diffusers") is None:
        return
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    for name, tensor in pipe.transformer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), next(_tensors(dit, trained, name)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i2v", "i2v-a14b", "ti2v"])
def test_models_that_begin_with_an_image_are_trained_by_the_commands_alone(kind, tmp_path, one_device):
    two = kind == "i2v-a14b"
    given = foreign_wan_model.write(tmp_path / "given", two=two, kind=kind)
    ours, latents, spatial = tmp_path / "ours", tmp_path / "latents", 16 if kind == "ti2v" else 8
    assert cli.main(["import", f"--from={given}", f"--to={ours}"]) == 0
    model = checkpoint.load_model(ours)[1]["config"]["model"]
    variant = {"i2v": "i2v-14b-v5p", "i2v-a14b": "i2v-a14b-low-v5p", "ti2v": "ti2v-5b-v5p"}[kind]
    sizes = ("width", "num_layers", "num_heads", "mlp_width", "time_features", "extra_channels", "image_width")
    small = [f"--config.model.{name}={model[name]}" for name in sizes]
    small += ["--config.text.width=24", "--config.text.max_tokens=40", f"--config.text.tower={given}/text_encoder"]
    small += ["--config.data.num_workers=0", "--config.mesh.fsdp=1", "--config.mesh.context=1"]
    small += [f"--config.data.buckets=((9,{4 * spatial},{6 * spatial},2,1.0),)", "--config.optimizer.warmup_steps=0"]
    if kind == "i2v":
        small.append(f"--config.image.tower={given}/image_encoder")
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(image)
    clips = ["--config.data.source=kinetic_shapes", "--config.data.path=", "--config.data.num_clips=6"]
    make = ["preprocess", f"--config={CONFIG}:{variant}-full", f"--checkpoint={ours}", f"--out={latents}", "--batch=2"]
    assert cli.main([*make, *small, *clips]) == 0
    for how in ("full", "lora"):
        places = [f"--config.start_from={ours}", f"--config.autoencoder={ours}", f"--config.data.path={latents}"]
        steps = ["--config.total_steps=2", "--config.log_every=1", "--config.eval_every=2", "--config.sample.steps=2"]
        steps.append("--config.sample.previews=('a red ball',)")
        train = ["train", "dit", f"--config={CONFIG}:{variant}-{how}", f"--workdir={tmp_path}/{how}"]
        assert cli.main([*train, *small, *places, *steps]) == 0
        assert [row["step"] for row in read_metrics(tmp_path / how) if "loss" in row] == [1, 2]
        assert (tmp_path / how / "previews").exists() == (not two)
        sample = f"generate 'a red ball' --checkpoint={tmp_path / how} --steps=2 --image={image} --frames=9"
        size = f"--height={4 * spatial} --width={6 * spatial} --output={tmp_path}/clips_{how}"
        assert cli.main(shlex.split(f"{sample} {size}")) == 0
        assert (tmp_path / f"clips_{how}" / "a-red-ball-0.mp4").exists()
    assert cli.main(["export", f"--from={tmp_path}/full", f"--to={tmp_path}/out", "--format=diffusers"]) == 0
    trained = wan.load(tmp_path / "out" / ("transformer_2" if two else "transformer"))[1]
    jax.tree.map(np.testing.assert_array_equal, trained, checkpoint.load_model(tmp_path / "full" / "model")[0]["dit"])
    if two:
        other, before = (wan.load(folder / "transformer")[1] for folder in (tmp_path / "out", given))
        jax.tree.map(np.testing.assert_array_equal, other, before)


@pytest.mark.slow
def test_weights_that_are_no_average_go_out_too(published, ours, latents, tmp_path, one_device):
    """After one step the average is a tenth of what was, and nine tenths of what is."""
    tower = f"--config.text.tower={published}/text_encoder --config.optimizer.warmup_steps=0"
    places = f"--config.start_from={ours} --config.autoencoder={ours} --config.data.path={latents} {tower}"
    train = f"train dit --config={CONFIG}:1.3b-v6e-full --workdir={tmp_path}/run {places} {SMALL}"
    assert cli.main(shlex.split(f"{train} --config.total_steps=1 --config.optimizer.learning_rate=1e-3")) == 0
    for name, more in (("average", []), ("raw", ["--raw"]), ("programs", ["--raw", "--format=stablehlo"])):
        assert cli.main(["export", f"--from={tmp_path}/run", f"--to={tmp_path}/{name}", *more]) == 0
    before = checkpoint.load_model(ours)[0]["dit"]
    average, raw = (wan.load(tmp_path / name / "transformer")[1] for name in ("average", "raw"))
    jax.tree.map(lambda a, x, y: np.testing.assert_allclose(a, 0.1 * x + 0.9 * y, atol=1e-6), average, before, raw)
    assert any(np.abs(x - y).max() > 5e-4 for x, y in zip(*map(jax.tree.leaves, (raw, before)), strict=True))
    of_programs = load_file(tmp_path / "programs" / "dit.safetensors")
    for name, leaf in traverse_util.flatten_dict({"dit": raw}, sep="/").items():
        np.testing.assert_array_equal(of_programs[name], leaf)


def _tensors(dit, params, name):
    from stvdm.interop import weights

    pairs = [pair for pair in wan.pairs(dit, "diffusers") if pair.theirs == name]
    return (next(iter(tensor.parts())) for tensor in weights.theirs(pairs, weights.of_tree(params)))


def test_of_two_transformers_one_is_named(tmp_path):
    from stvdm.train import dit as trainer

    both = foreign_wan_model.write(tmp_path / "both", two=True)
    assert cli.main(["import", f"--from={both}", f"--to={tmp_path}/ours"]) == 0
    with pytest.raises(ValueError, match="two transformers that take turns, .* expected turn='high_noise' or"):
        trainer.start_of(tmp_path / "ours", {})
    assert cli.main(["import", f"--from={both}/transformer_2", f"--to={tmp_path}/low"]) == 0
    coder_params, _ = trainer.load_autoencoder(tmp_path / "ours")
    start = trainer.start_of(tmp_path / "low", coder_params)
    second, _ = checkpoint.load_model(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, start.weights["dit"], second["dit_low_noise"])
    with pytest.raises(ValueError, match="one transformer; expected turn='', got 'low_noise'"):
        trainer.start_of(tmp_path / "low", coder_params, turn="low_noise")
    start = trainer.start_of(tmp_path / "ours", coder_params, turn="low_noise")
    assert start.weights.keys() == {"dit"}
    jax.tree.map(np.testing.assert_array_equal, start.weights["dit"], second["dit_low_noise"])


def test_the_description_is_printed(ours, published, tmp_path, capsys):
    assert cli.main(["import", f"--from={published}", f"--to={tmp_path}/ours", "--dtype=bfloat16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["text"]["tower"] == str(published / "text_encoder")
    assert said["config"]["model"]["dtype"] == "bfloat16"
