# SPDX-License-Identifier: Apache-2.0
"""Every ablation of the list can be run: its names fit together, its edits give configs that validate and fit."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from stvdm import config as base
from stvdm.ablations import cells, cost, edits
from stvdm.ablations.questions import QUESTIONS, find
from stvdm.data.kinetic_shapes import World, sample_scene
from stvdm.evaluation import physics
from stvdm.sampling import pipeline

SCORES = {*physics.ITEMS, "frame_change", "flow_loss", "kinetic_frechet"}
SCORES |= {"psnr_db", "ssim", "change_error", "latent_flicker", "kinetic_recall"}
VARIANTS = [(question.name, variant) for question in QUESTIONS.values() for variant in question.variants]


@pytest.mark.parametrize("name", QUESTIONS)
def test_claims_are_about_what_is_run_and_shown(name):
    question = QUESTIONS[name]
    assert question.name == name and question.claims and question.asks.endswith("?")
    assert all(re.fullmatch(r"\w+", word) for word in (*question.variants, *question.samplings))  # file names, and @
    assert len(set(question.scores)) == len(question.scores) and set(question.scores) <= SCORES
    for claim in question.claims:
        for variant, sampling in (question.split(claim.better), question.split(claim.worse)):
            assert variant in question.variants and sampling in question.samplings
        assert claim.better != claim.worse and claim.says
        assert claim.score in question.scores, "a verdict's score is in the table"
        falls = claim.score in ("frame_change", "flow_loss", "change_error", "latent_flicker", "flicker", "residual")
        assert claim.higher is not falls


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", ["tiny", "small", "pod"])
@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_of_every_size_is_a_config_that_can_run(name, variant, size, bases):
    question = QUESTIONS[name]
    runs = cells.prepared(question, bases(size), variant, seed=3)
    assert sum(stage.share for stage in question.stages(variant)) == pytest.approx(1.0)
    for number, run in enumerate(runs):
        run.dit.start_from = "the stage before" if number else ""
        base.validate(run.dit)
        base.validate(run.autoencoder)
        coder = pipeline.autoencoder_of(run.autoencoder.model.to_dict())
        for bucket in run.dit.data.buckets:
            assert math.prod(cost.grid_of(run.dit, coder, bucket)) >= 1  # whole latents, and whole patches of them
        assert (run.dit.seed, run.autoencoder.seed) == (3, 3)
    assert question.trains_autoencoder or not any(
        ".autoencoder" in f".{key}" for key in cells.edit_of(bases(size), runs, with_autoencoder=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, variant", [one for one in VARIANTS if one[0] not in ("objective", "guidance", "average", "optimizer")]
)
def test_every_variant_is_a_network_that_can_be_made(name, variant, bases):
    for run in cells.prepared(QUESTIONS[name], bases("tiny"), variant, seed=0):
        coder = pipeline.autoencoder_of(run.autoencoder.model.to_dict())
        run.dit.text.words = ("a", "red", "ball")
        price = cost.training_flops(run.dit, coder)  # of the traced step, with its gradient
        assert price > 1e8
        clip = jnp.zeros((1, *run.autoencoder.data.buckets[0][:3], 3))
        jax.eval_shape(coder.init, jax.random.key(0), clip)


@pytest.mark.parametrize("name", QUESTIONS)
def test_variants_differ(name, bases):
    found = bases("tiny")
    runs = {variant: cells.prepared(QUESTIONS[name], found, variant, 0) for variant in QUESTIONS[name].variants}
    changes = [str(cells.edit_of(found, each, with_autoencoder=True)) for each in runs.values()]
    assert len(set(changes)) == len(changes)
    assert cells.edit_of(found, [bases("tiny")], with_autoencoder=True) == {}  # edits leave the bases alone


@pytest.mark.parametrize("size", ["tiny", "small", "pod"])
@pytest.mark.parametrize("name", ["time", "text"])
def test_ways_of_telling_time_and_text_have_equal_parameters(name, size, bases):
    sizes = {}
    for variant in QUESTIONS[name].variants:
        config = cells.prepared(QUESTIONS[name], bases(size), variant, 0)[0].dit
        dit = pipeline.build(config.to_dict(), latent_channels=8).dit
        text = jnp.zeros((1, 40, config.text.width))
        made = jax.eval_shape(dit.init, jax.random.key(0), jnp.zeros((1, 5, 8, 8, 8)), jnp.zeros((1, 1)), None, text)
        sizes[variant] = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(made)))
    usual = sizes["cross" if name == "text" else "adaln_zero"]
    assert sizes == {variant: pytest.approx(usual, rel=0.005) for variant in sizes}


def test_the_unet_has_about_the_parameters_of_the_transformer(bases):
    """And in all stages the same, but for its layers over time."""
    sizes = {}
    for variant in ("dit", "unet", "images_alone"):
        (run,) = cells.prepared(QUESTIONS["bolted_on"], bases("tiny"), variant, 0)
        network = pipeline.build(run.dit.to_dict(), latent_channels=8).dit
        text = jnp.zeros((1, 40, run.dit.text.width))
        made = jax.eval_shape(
            network.init, jax.random.key(0), jnp.zeros((1, 5, 8, 8, 8)), jnp.zeros((1, 1)), None, text
        )
        sizes[variant] = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(made)))
    assert 0.7 < sizes["unet"] / sizes["dit"] < 1.4
    assert sizes["images_alone"] < sizes["unet"]
    images, clips = cells.prepared(QUESTIONS["bolted_on"], bases("tiny"), "bolted_on", 0)
    assert (images.dit.model.temporal, clips.dit.model.temporal, clips.dit.train_only) == (False, True, "temporal")


def test_patterns_of_attention_differ_in_nothing_else(bases):
    question, found = QUESTIONS["attention"], bases("tiny")
    for variant in question.variants:
        config = cells.prepared(question, found, variant, 0)[0].dit
        assert config.model.positions == "sincos"  # of which a frame alone reads its time


@pytest.mark.parametrize("size", ["tiny", "small", "pod"])
def test_an_autoencoder_by_frames_has_about_as_many_latent_values(bases, size):
    values = {}
    for variant in QUESTIONS["autoencoder"].variants:
        (run,) = cells.prepared(QUESTIONS["autoencoder"], bases(size), variant, 0)
        coder = pipeline.autoencoder_of(run.autoencoder.model.to_dict())
        T, H, W = run.dit.data.buckets[0][:3]
        assert tuple(run.autoencoder.data.buckets[0][:3]) == (T, H, W)
        values[variant] = math.prod(coder.latent_shape((T, H, W))) * coder.latent_channels / T
    assert max(values.values()) / min(values.values()) < 1.035


def test_the_diagonal_probe_asks_for_diagonals(bases):
    world = {**dict(bases("tiny").dit.data.world), **dict(find("attention").samplings["diagonal"].world)}
    scenes = [sample_scene(0, index, split="test", world=World(**world)) for index in range(30)]
    things = [thing for scene in scenes for thing in scene.things]
    assert all(abs(thing.velocity[0]) > 0.1 and abs(thing.velocity[1]) > 0.1 for thing in things)


def test_the_world_is_that_of_the_bundled_model(bases):
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).parents[2] / "configs" / "dit_kinetic.py"
    specification = importlib.util.spec_from_file_location("dit_kinetic", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert tuple(bases("tiny").dit.data.world) == module.WORLD


def test_an_unknown_ablation_names_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        find("atention")
    with pytest.raises(ValueError, match="expected one of attention, objective"):
        find("qwertz")


def test_edits_say_what_they_are_for(bases):
    run = bases("tiny")
    edits.mix_in((0, 1), (2, 1), share=0.5)(run)
    assert tuple(run.dit.data.buckets) == ((17, 32, 32, 32, 0.5), (1, 32, 32, 32, 0.25), (9, 32, 32, 32, 0.25))
    run = bases("tiny")
    edits.sized(4, 1.5)(run)
    model = run.dit.model
    assert (model.width, model.num_heads, model.mlp_width, tuple(model.patch)) == (144, 6, 576, (1, 4, 4))
