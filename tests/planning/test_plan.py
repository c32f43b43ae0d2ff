# SPDX-License-Identifier: Apache-2.0
"""Plans: the geometry, the parameters, and what the TPU compiler says of a step (where that compiler is installed)."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stvdm import cli, sharding
from stvdm import config as base
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.planning import chips, plan, report
from stvdm.planning.planner import Planner
from stvdm.train import dit as train_dit

CODER_SETTINGS = dict(
    latent_channels=16, width=8, multipliers=(1, 1, 1), num_res_blocks=0, unshuffle=2, grouping="uniform",
    spatial_down=(True, True), temporal_down=(True, True),
)  # fmt: skip
CODER = Autoencoder(**CODER_SETTINGS)


def small_dit():
    config = base.dit()
    config.autoencoder = "nowhere"
    config.data.source, config.data.path = "latents", "nowhere"
    config.data.buckets = ((8, 32, 32, 8, 1.0),)
    config.model.update(dict(width=32, num_layers=2, num_heads=4, mlp_width=64))
    config.text.update(dict(width=16, num_layers=1, num_heads=2, max_tokens=6))
    return config


@pytest.mark.parametrize(
    ("patch", "tokens"), [((1, 2, 2), 30_720), ((2, 2, 2), 15_360), ((1, 4, 4), 7_680), ((2, 4, 4), 3_840)]
)
def test_five_seconds_of_512_pixels(patch, tokens):
    config = small_dit()
    config.data.buckets = ((120, 512, 512, 1, 1.0),)
    config.model.patch = patch
    (clip,) = plan.outline(config, CODER).to_json()["clips"]
    assert clip["latent"] == (30, 64, 64)
    assert clip["compression"] == 48
    assert clip["tokens"] == tokens
    if patch == (1, 2, 2):
        assert clip["attention_pairs"]["full"] == 943_718_400
        assert clip["attention_pairs"]["factorised"] == 32_378_880


@pytest.mark.parametrize(("frames", "latents"), [(121, 31), (81, 21), (49, 13), (1, 1)])
def test_the_first_frame_alone(frames, latents):
    config = small_dit()
    config.data.buckets = ((frames, 480, 832, 1, 1.0),)
    (clip,) = plan.outline(config, CODER.clone(grouping="causal")).to_json()["clips"]
    assert clip["latent"] == (latents, 60, 104)
    assert clip["tokens"] == latents * 30 * 52


@pytest.mark.parametrize(
    ("grouping", "frames", "latents", "other"),
    [("uniform", 120, 30, (121, 31)), ("causal", 81, 21, (80, 20)), ("causal", 1, 1, (4, 1))],
)
def test_both_groupings_of_time_are_told(grouping, frames, latents, other):
    config = small_dit()
    config.data.buckets = ((frames, 512, 512, 1, 1.0),)
    made = plan.outline(config, CODER.clone(grouping=grouping)).to_json()
    (clip,) = made["clips"]
    assert (clip["latent"], clip["tokens"]) == ((latents, 64, 64), latents * 1024)
    told = clip["other_grouping"]
    assert (told["video"][0], told["latent"], told["tokens"]) == (other[0], (other[1], 64, 64), other[1] * 1024)
    said = report.as_text({**made, "compiled": None})
    assert f"{told['grouping']}: {other[0]}x512x512 -> {other[1]}x64x64 -> {other[1] * 1024:,} tokens" in said
    config.model.patch = (2, 2, 2)
    if grouping == "uniform":  # 31 are no whole number of patches
        (clip,) = plan.outline(config, CODER).to_json()["clips"]
        assert clip["tokens"] == 15 * 1024 and clip["other_grouping"]["tokens"] is None


def test_pairs_that_are_seen_and_pairs_that_are_computed():
    """Model FLOPs are of the pairs that are seen, the bound on a TPU of the blocks that its kernel goes through."""
    config = small_dit()
    config.data.buckets = ((84, 480, 832, 1, 1.0),)
    config.model.attention, config.model.window = ("window", "frame"), (1, 4, 4)
    made = plan.outline(config, CODER).to_json()
    window, frame = made["clips"][0]["patterns"]
    assert made["clips"][0]["grid"] == (21, 30, 52)
    assert window["seen"] / window["all"] == pytest.approx(0.0064, abs=5e-5)
    assert window["computed"] / window["all"] == pytest.approx(0.164, abs=5e-4)
    assert frame["seen"] == frame["computed"] == 21 * 1560**2
    seen, computed = (made[name]["self-attention"] for name in ("step_flops", "block_flops"))
    ratio = (window["computed"] + frame["computed"]) / (window["seen"] + frame["seen"])
    assert computed / seen == pytest.approx(ratio, rel=0.01) and ratio > 3  # 0.01: blocks on a CPU are filled up
    assert {**made["block_flops"], "self-attention": seen} == made["step_flops"]
    said = report.as_text({**made, "compiled": None})
    assert "'window' attention sees" in said and "0.64% of all; a TPU computes whole blocks" in said
    assert "16.4% of all" in said and "whole blocks of attention that a TPU computes" in said
    config.model.attention = ("full",)
    made = plan.outline(config, CODER).to_json()
    assert made["block_flops"] == made["step_flops"]
    assert made["clips"][0]["patterns"][0]["computed"] == 32_760**2


def test_parameters_are_those_that_a_run_makes():
    config = small_dit()
    counted = plan.outline(config, CODER).parameters
    made = jax.eval_shape(train_dit.program(config, CODER).init)
    assert sum(counted.values()) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))
    assert counted["dit/layers"] > counted["dit/patch"]


def test_model_flops_leave_out_the_optimiser_and_what_is_done_again():
    config = small_dit()
    plain = plan.outline(config, CODER)
    config.model.remat, config.optimizer.name = "everything", "muon"
    dear = plan.outline(config, CODER)
    assert dear.model_flops == plain.model_flops
    assert sum(dear.step_flops.values()) > sum(plain.step_flops.values()) > 0.9 * plain.model_flops


def test_adapters_keep_a_fraction_of_what_a_whole_training_keeps():
    """Of a weight 16 bytes: itself, its average, two moments; or the 2 that products in bfloat16 read."""
    config = small_dit()
    config.model.update(dict(width=256, num_layers=4, mlp_width=1024, dtype="bfloat16"))
    config.start_from = "nowhere"
    whole = plan.outline(config, CODER)
    config.lora.rank = 8
    beside = plan.outline(config, CODER)
    assert sum(beside.parameters.values()) < 0.1 * sum(whole.parameters.values())
    assert beside.state_bytes + beside.frozen_bytes < 0.3 * whole.state_bytes
    assert 0.6 * whole.model_flops < beside.model_flops < 0.85 * whole.model_flops  # no gradients of kernels
    said = report.as_text({**beside.to_json(), "compiled": None})
    assert f"{beside.frozen_bytes / 2**30:.2f} of what stays as it is" in said


def test_an_autoencoder_has_a_plan_too():
    config = base.autoencoder()
    config.model.update(dict(width=8, multipliers=(1, 1), spatial_down=(True,), temporal_down=(True,)))
    config.data.buckets = ((5, 16, 16, 8, 1.0),)
    made = plan.make(config, config.model.to_dict())
    assert made["step_flops"]["decoder"] > made["step_flops"]["encoder"] > 0
    assert made["compiled"] is None
    assert "clips of 5x16x16 -> latents of 3x8x8x16" in report.as_text(made)


def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expected CHIP:SHAPE with a chip of v5e, v5p, v6e, tpu7x"):
        chips.topology("h100:8")


def test_without_the_tpu_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the TPU compiler is not installed.*pip install -e '.\[tpu\]'"):
        chips.topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "slices", "devices"), [("v5e:1x1", 1, 1), ("v5p:4x4x4", 2, 128), ("tpu7x:2x2x1", 1, 8)]
)
def test_devices_are_counted_from_the_name(name, slices, devices):
    assert chips.num_devices(name, num_slices=slices) == devices


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected CHIP:SHAPE"):
        chips.num_devices("v5p:large")


@pytest.mark.parametrize(
    ("said", "needed", "limit"),
    [
        (
            "INTERNAL\nRESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory: total memory required "
            "(61.36G) exceeds available HBM (15.75G)",
            61.36,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (15.98G) "
            "exceeds available HBM (15.75G).",
            15.98,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.5G of 31.25G hbm. Exceeded by 9G",
            40.5,
            31.25,
        ),
        ("RESOURCE_EXHAUSTED: no number", None, None),
    ],
)
def test_what_the_compiler_says_of_too_little_memory_is_read(said, needed, limit):
    fields = plan.refused(said)
    assert fields["refusal"].startswith("RESOURCE_EXHAUSTED")
    assert fields.get("needed_bytes") == (None if needed is None else pytest.approx(needed * 2**30))
    assert fields.get("limit_bytes") == (None if limit is None else pytest.approx(limit * 2**30))


@pytest.mark.parametrize(
    "said", ["\nINTERNAL: Mosaic failed to compile\nbacktrace", "RESOURCE_EXHAUSTED: Ran out in memory space vmem", ""]
)
def test_a_refusal_that_is_not_of_memory_is_an_error(said):
    with pytest.raises(ValueError, match=f"not for want of memory: {said.strip()[:20]}"):
        plan.refused(said)


def test_what_is_in_eight_bits_goes_at_their_peak():
    chip, flops = chips.CHIPS["v6e"], {"MLP": 4e15, "self-attention": 2e15}
    assert chips.arithmetic_seconds(flops, chip) == 6e15 / chip.flops
    assert chips.arithmetic_seconds(flops, chip, "int8") == pytest.approx(4e15 / chip.flops)
    assert chips.arithmetic_seconds(flops, chip, "fp8") == 6e15 / chip.flops  # which it has not


def test_the_largest_of_several_buckets_is_what_is_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("STVDM_CACHE", str(tmp_path))
    config = small_dit()
    config.data.buckets = ((5, 16, 16, 8, 1.0), (9, 32, 32, 8, 0.5), (1, 32, 32, 32, 1.0))
    config.autoencoder = "configs/autoencoder_kinetic.py"
    made = Planner(config).outline()
    # More pixels are in the clips, more latents in the images: 1 of each, but 3 of 9 frames.
    assert [clip["video"] for clip in made["clips"]] == [[1, 32, 32], [9, 32, 32], [5, 16, 16]]
    assert config.data.buckets[0][0] == 5
    (alone := small_dit()).data.buckets = ((1, 32, 32, 32, 1.0),)
    alone.autoencoder = config.autoencoder
    assert made["step_flops"] == Planner(alone).outline()["step_flops"]


def test_the_command_prints_tables_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", {**cli.os.environ, "STVDM_CACHE": str(tmp_path)})
    arguments = ["plan", "--config=configs/dit_kinetic.py", "--autoencoder=configs/autoencoder_kinetic.py"]
    assert cli.main(arguments) == 0
    assert "80 tokens (5x4x4)" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"][0]["tokens"] == 80
    assert told["compiled"] is None
    monkeypatch.setattr(plan, "make", lambda *_, **__: pytest.fail("this was asked before"))
    assert cli.main(arguments) == 0


def test_a_search_needs_a_slice(capsys, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))
    coder = "--autoencoder=configs/autoencoder_kinetic.py"
    assert cli.main(["plan", "--config=configs/dit_kinetic.py", coder, "--search"]) == 2
    assert "expected a slice to compile for, so add one, e.g. --topology=v5p:4x4x4" in capsys.readouterr().err


def test_a_file_without_variants_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, "environ", dict(cli.os.environ))
    file = tmp_path / "one.py"
    file.write_text("from stvdm import config\nget_config = config.dit\n")
    assert cli.main(["plan", f"--config={file}", "--variants"]) == 2
    assert "lists none in VARIANTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--slices=2", "--slices=2: without effect beside a plan by arithmetic alone, without --compile"),
        ("--quick --price=4", "--quick=True --price=4.0: without effect beside a plan by arithmetic alone"),
        ("--compile --tries=4", "--tries=4: without effect beside a plan without --search"),
        ("--variants --search", "--search=True: without effect beside --variants"),
        ("--variants", "configs/pod_dit.py:14b-480p-81f-v5p: --variants plans all of a file, so leave :VARIANT out"),
    ],
)
def test_options_without_effect_are_refused(options, said, capsys):
    assert cli.main(["plan", "--config=configs/pod_dit.py:14b-480p-81f-v5p", *options.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_table_has_a_row_for_each_plan():
    fit = dict(
        topology="v5p:2x2x1", num_slices=2, num_devices=8, mesh=dict(data=2, fsdp=4), remat="everything", accumulate=2,
        fits=True, needed_bytes=2.0 * 2**30, limit_bytes=95.74 * 2**30, step_seconds=1.8, utilisation=0.5,
        collectives=[dict(exact=True)],
    )  # fmt: skip
    made = {**plan.make(small_dit(), CODER_SETTINGS), "compiled": fit}
    refused = {**made, "compiled": {**fit, "fits": False, "needed_bytes": None}}
    table = report.as_table({"one": made, "two": refused}).splitlines()
    assert len(table) == 4
    assert (
        "| 2 x v5p:2x2x1 | data 2, fsdp 4 | everything, 2 micro-batches | 2.00 of 95.74 | 1.8 s | 50% | 0.5 |"
        in table[2]
    )
    assert "| more than 95.74 | does not fit |" in table[3]
    unclear = {**made, "compiled": {**fit, "collectives": [dict(exact=False)]}}
    table = report.as_table({"one": made, "three": unclear}).splitlines()
    assert "| 1.8 s |" in table[2] and "| 1.8 s (≥) |" in table[3]
    assert table[-1].startswith("(≥) Some transfers are in loops")


tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (extra 'tpu') is not installed"
)


@pytest.mark.slow
@tpu_compiler
def test_the_real_step_compiles_for_a_slice():
    config = small_dit()
    config.mesh.fsdp = 2
    fit = plan.compiled(config, CODER, chips.topology("v5e:2x2"), plan.outline(config, CODER))
    assert fit.fits
    assert fit.mesh == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert 0 < fit.needed_bytes < fit.limit_bytes
    assert {collective.kind for collective in fit.collectives} & {"all-reduce", "reduce-scatter"}
    json.dumps(fit.to_json(), allow_nan=False)
    assert fit.step_seconds >= fit.bounds["arithmetic"] > 0
    assert 0 < fit.utilisation < 1
    quick = plan.compiled(config, CODER, chips.topology("v5e:2x2"), plan.outline(config, CODER), quick=True)
    assert quick.quick and quick.fits and quick.argument_bytes == fit.argument_bytes
    assert jax.config.jax_exec_time_optimization_effort == 0.0


@pytest.mark.slow
@tpu_compiler
def test_little_effort_for_a_chip_with_sparse_cores_which_then_stand_by():
    config = small_dit()
    config.mesh.fsdp = 8
    config.data.buckets = ((8, 32, 32, 16, 1.0),)
    where = chips.topology("tpu7x:2x2x1")
    fit = plan.compiled(config, CODER, where, plan.outline(config, CODER), quick=True)
    assert fit.quick and fit.fits and any("gather" in collective.kind for collective in fit.collectives)


@pytest.mark.slow
@tpu_compiler
@pytest.mark.parametrize(("kind", "topology"), [("int8", "v5p:2x2x1"), ("fp8", "tpu7x:2x2x1")])
def test_products_in_eight_bits_compile_for_a_slice(kind, topology):
    where = chips.topology(topology)
    config = small_dit()
    config.mesh.update(dict(data=1, fsdp=len(where.devices)))
    config.model.update(dict(dtype="bfloat16", remat="everything"))
    plain = plan.compiled(config, CODER, where, plan.outline(config, CODER))
    config.model.matmul = kind
    rounded = plan.compiled(config, CODER, where, plan.outline(config, CODER))
    assert rounded.fits
    assert 0.5 < rounded.bounds["arithmetic"] / plain.bounds["arithmetic"] < 1
    told = report.as_text({**plan.outline(config, CODER).to_json(), "compiled": rounded.to_json()})
    assert "memory is there for the state and the batch, read and written once" in told
    assert f"op/s in {kind}, memory" in told and "of bfloat16's peak" in told


@pytest.mark.slow
@tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_every_chips_program_tells_how_often_its_loops_turn(topology):
    """In earnest, as what is compiled with little effort has other loops: each layer's weights are gathered."""
    where, num_layers = chips.topology(topology), 6
    config = small_dit()
    config.mesh.update(dict(data=1, fsdp=8))
    config.model.update(dict(width=128, num_layers=num_layers, mlp_width=512, dtype="bfloat16", remat="everything"))
    fit = plan.compiled(config, CODER, where, plan.outline(config, CODER))
    assert all(collective.exact for collective in fit.collectives)
    sent = sum(collective.num for collective in fit.collectives if "gather" in collective.kind)
    assert sent >= 2 * num_layers  # forward and again


@pytest.mark.slow
@tpu_compiler
@pytest.mark.parametrize("chip", chips.SLICES)
def test_slices_are_known_to_the_compiler_and_grow(chip):
    sizes = [chips.num_devices(f"{chip}:{shape}") for shape in chips.SLICES[chip]]
    assert sizes == sorted(set(sizes))
    for shape in (chips.SLICES[chip][0], chips.SLICES[chip][-1]):
        assert len(chips.topology(f"{chip}:{shape}").devices) == chips.num_devices(f"{chip}:{shape}")


@pytest.mark.slow
@tpu_compiler
def test_the_compiler_refuses_by_the_peak_and_not_by_its_sum():
    """A program whose arguments and temporaries add up to more than there is is taken; one whose peak does is not."""
    where = chips.topology("v5e:2x2")
    mesh = sharding.make_mesh(data=4, devices=where.devices)

    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None))
        return jnp.sum(jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)))

    def compiled(num_rows):
        split = NamedSharding(mesh, P(None, "data"))
        weights = jax.ShapeDtypeStruct((32, 2048, 2048), jnp.float32, sharding=split)
        x = jax.ShapeDtypeStruct((num_rows, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
        step = jax.jit(lambda w, x: w - 0.1 * jax.grad(loss)(w, x), donate_argnums=0, out_shardings=split)
        return step.lower(weights, x).compile()

    limit = chips.CHIPS["v5e"].memory_gib * 2**30
    memory = compiled(446_000).memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes > 1.05 * limit
    assert 0.98 * limit < memory.peak_memory_in_bytes < limit
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        compiled(456_000)
    fields = plan.refused(str(error.value))
    peak = memory.peak_memory_in_bytes * 456 / 446  # all but the weights grows with the rows
    assert fields["needed_bytes"] == pytest.approx(peak, rel=0.01)
    assert fields["limit_bytes"] == limit


@pytest.mark.slow
@tpu_compiler
def test_too_much_for_the_memory_is_an_answer():
    config = small_dit()
    config.model.update(dict(width=4096, num_layers=6, num_heads=32, mlp_width=16384))
    outline = plan.outline(config, CODER)
    fit = plan.compiled(config, CODER, chips.topology("v5e:1x1"), outline)
    assert not fit.fits
    assert fit.needed_bytes > fit.limit_bytes == pytest.approx(15.75 * 2**30)
    assert "does not fit" in report.as_text({**outline.to_json(), "compiled": fit.to_json()})
