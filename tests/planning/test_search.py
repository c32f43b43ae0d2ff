# SPDX-License-Identifier: Apache-2.0
"""The search among meshes, remat policies and micro-batches, with a made-up compiler that answers at once."""

import json
import math

import pytest

from stvdm import config as base
from stvdm.planning import search
from stvdm.planning.planner import Planner

GIB = 2**30
OUTLINE = {
    "parameters": {"dit": 1_000_000_000},
    "state_bytes": 16_000_000_000,
    "clips": [{"batch": 16, "tokens": 32_760, "latent": (21, 60, 104)}],
}


def wide_dit():
    config = base.dit()
    config.data.buckets = ((81, 480, 832, 16, 1.0),)
    config.model.update(dict(width=1536, num_layers=30, num_heads=12, mlp_width=8960, dtype="bfloat16"))
    return config


def compiler(memory):
    """Answers as a compiler that needs memory(config) GiB, and takes longer for each thing that is computed again."""
    asked = []

    def ask(config):
        asked.append(config)
        needed = memory(config) * GIB
        again = search.REMAT["dit"].index(config.model.remat) + config.optimizer.accumulate - 1
        bounds = {"arithmetic": 1.0 + 0.1 * again, "links": 0.01 * config.mesh.context}
        return {"fits": needed <= 15.75 * GIB, "needed_bytes": needed, "bounds": bounds}

    return ask, asked


def arithmetic(remat):
    """Of a step that takes 1 s on sixteen devices, and a tenth more for each rung; longer than its transfers."""
    return 16 * (1 + 0.1 * search.REMAT["dit"].index(remat))


def found_with(memory, num_devices=16, **options):
    ask, asked = compiler(memory)
    options = {"chip": "v5e", "ask": ask, "arithmetic": arithmetic, **options}
    found = search.search(wide_dit(), options.pop("outline", OUTLINE), num_devices=num_devices, **options)
    return found, asked


def remat_rung(config):
    return search.REMAT["dit"].index(config.model.remat)


def test_the_first_rung_that_fits_is_found_by_bisection():
    found, _ = found_with(lambda config: 30 - 8 * remat_rung(config), tries=3)  # 30, 22, 14, 6, -2
    assert found.best.rung == search.Rung("attention", 1)
    assert search.as_text(found).endswith("--config.model.remat=attention --config.optimizer.accumulate=1")


def test_what_is_estimated_slower_is_not_compiled():
    found, asked = found_with(lambda config: 1.0, tries=1000)
    assert found.best.rung == search.Rung("nothing", 1)
    assert found.slower > 0
    assert found.unseen == 0
    meshes = {tuple(config.mesh.to_dict().items()) for config in asked}
    assert 0 < len(meshes) < len(meshes) + found.slower
    assert "estimated slower" in search.as_text(found)


def test_more_micro_batches_come_after_everything_is_computed_again():
    def memory(config):
        return 40.0 / config.optimizer.accumulate if config.mesh.fsdp * config.mesh.data <= 4 else 99.0

    found, _ = found_with(memory, tries=1000)
    assert found.best.rung == search.Rung("everything", 4)
    assert found.best.mesh["data"] * found.best.mesh["fsdp"] <= 4


def test_a_policy_that_costs_more_than_a_leaner_one_is_left_out():
    costs = {"nothing": 3.0, "projections": 3.6, "attention": 3.2, "offload": 3.2, "everything": 4.0}
    found, asked = found_with(lambda config: 20 - 3 * remat_rung(config), arithmetic=costs.__getitem__, tries=50)
    assert found.best.rung == search.Rung("attention", 1)
    assert "projections" not in {config.model.remat for config in asked}


def test_if_none_fits_it_says_what_would_be_needed():
    found, _ = found_with(lambda config: 50.0, tries=1000)
    assert found.best is None
    text = search.as_text(found)
    assert "none fits: the leanest needs 50.00 of 15.75 GiB a device" in text
    assert "at least 4 times the devices, e.g. v5e:8x8, or v5p or tpu7x" in text
    assert "That is if all memory were split" in text and "context up to 16 and tensor up to 8" in text
    json.dumps(found.to_json(), allow_nan=False)


def test_the_slice_that_is_named_exists_and_has_a_mesh():
    named = [found_with(lambda config, n=n: n * 15.0, tries=1000)[0].larger for n in (1, 3, 30)]
    assert named == ["", "v5e:8x8", ""]  # it fits; 48 devices are none; 480 are too many for it
    two = search.search(
        wide_dit(), OUTLINE, chip="v5p", num_devices=16, num_slices=2, tries=1000,
        ask=compiler(lambda config: 150.0)[0], arithmetic=arithmetic,
    )  # fmt: skip
    assert two.larger == "2 x v5p:2x2x4"
    one_clip = {**OUTLINE, "clips": [{"batch": 1, "tokens": 32_760, "latent": (21, 60, 104)}]}
    config = wide_dit()
    config.data.buckets = ((81, 480, 832, 1, 1.0),)
    alone = search.search(
        config, one_clip, chip="v5e", num_devices=16, tries=1000, ask=compiler(lambda config: 99.0)[0],
        arithmetic=arithmetic,
    )  # fmt: skip
    assert alone.larger == "", "context 16 x tensor 4 are 64 devices; a batch of one clip has no use for 112"
    assert "which no slice of this chip with a mesh for this batch has" in search.as_text(alone)


def test_a_state_that_cannot_fit_is_not_compiled():
    huge = {**OUTLINE, "state_bytes": 1.68e12}
    found, asked = found_with(lambda config: 1.0, outline=huge)
    assert not asked
    assert found.best is None
    assert found.too_large > 0
    assert f"the leanest state needs {1.68e12 / 16 / GIB:.2f}" in search.as_text(found)


def test_a_state_counts_as_it_is_kept():
    """Muon with bfloat16 moments keeps 10 bytes of a parameter: 23 G of them fit sixteen devices of 15.75 GiB."""
    found, _ = found_with(lambda config: 15.0, outline={**OUTLINE, "parameters": {"dit": 23e9}, "state_bytes": 2.3e11})
    assert found.best and found.best.mesh["fsdp"] * found.best.mesh["context"] * found.best.mesh["tensor"] == 16


def test_it_stops_after_so_many_programs():
    found, asked = found_with(lambda config: 99.0, tries=5)
    assert len(asked) == 5
    assert found.unseen > 0
    assert "raise --tries" in search.as_text(found)
    assert "none of those tried fits" in search.as_text(found)


def test_a_refusal_without_a_number_is_no_trouble():
    refusal = {"fits": False, "needed_bytes": None, "bounds": {}}
    found, _ = found_with(None, ask=lambda config: refusal, tries=3)
    assert "more than there is, does not fit" in search.as_text(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_meshes_divide_batch_heads_and_slices():
    config = wide_dit()
    meshes = list(search._meshes(config, OUTLINE, 32, num_slices=2))
    assert meshes
    for mesh in meshes:
        assert math.prod(mesh.values()) == 32
        assert mesh["data"] % 2 == 0
        assert 16 % (mesh["data"] * mesh["fsdp"]) == 0
        assert config.model.num_heads % mesh["tensor"] == 0


def test_a_batch_that_no_mesh_divides_is_refused():
    config = wide_dit()
    config.data.buckets = ((81, 480, 832, 1, 1.0),)
    config.model.num_heads = 12
    with pytest.raises(ValueError, match=r"no mesh of 512 devices in 2 slices divides the batch of 1 clips"):
        search.search(config, OUTLINE, chip="v5e", num_devices=512, num_slices=2, ask=None, arithmetic=arithmetic)


def test_what_no_mesh_can_be_compiled_for_is_not_taken_for_too_little_memory():
    def ask(config):
        raise ValueError("the TPU compiler is not installed")

    with pytest.raises(ValueError, match="not installed"):
        found_with(None, num_devices=4, ask=ask)


def test_a_network_that_is_no_transformer_is_refused():
    config = base.unet()
    config.autoencoder = "configs/autoencoder_kinetic.py"
    with pytest.raises(ValueError, match=r"model.network='unet': expected a transformer.*--config.mesh.fsdp=8"):
        Planner(config, topology="v5p:2x2x1").search(tries=1, say=print)


def test_a_mesh_that_some_weight_does_not_divide_over_is_passed_by():
    said = []

    def ask(config):
        if config.mesh.fsdp > 1:
            raise ValueError("these parameters do not divide over the mesh")
        return {"fits": True, "needed_bytes": 1.0, "bounds": {"arithmetic": 100.0}}

    found, _ = found_with(None, num_devices=4, ask=ask, say=said.append, tries=1000)
    assert found.best.mesh["fsdp"] == 1
    assert any("do not divide" in line for line in said)
