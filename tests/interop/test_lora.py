# SPDX-License-Identifier: Apache-2.0
"""Adapters in the files of others: there and back they are the same, and they add there what they add here."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from stvdm.interop import lora as files
from stvdm.interop import wan
from stvdm.models import lora
from stvdm.models.dit import DiT

DIT = DiT(latent_channels=3, width=24, num_layers=3, num_heads=2, mlp_width=40, text_width=6, time_features=8)
SHAPES = wan.shapes_of(DIT)
TABLES = {form: wan.pairs(DIT, form) for form in ("original", "diffusers")}


def draw(tree, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), tree)


@pytest.fixture
def adapters():
    fresh = lora.fresh(jax.random.key(0), {"dit": SHAPES}, rank=4, targets="attention|mlp|text_in")
    return draw(nn.unbox(fresh))


@pytest.mark.parametrize("form", files.FORMATS)
def test_there_and_back_is_the_identity(adapters, form):
    tensors = files.to_foreign(adapters, TABLES, form)
    back = files.from_foreign(tensors, TABLES)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    again = files.to_foreign(back, TABLES, form)
    assert again.keys() == tensors.keys() and len(tensors) == 2 * (3 * 10 + 1)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("comfyui", "diffusion_model.blocks.2.self_attn.q"),
        ("peft", "base_model.model.blocks.2.attn1.to_q"),
        ("diffusers", "transformer.blocks.2.attn1.to_q"),
    ],
)
def test_they_add_there_what_they_add_here(adapters, form, name):
    """lora_B lora_A is added to the foreign weight: brought here, that is what `merged` gives."""
    params = draw(nn.unbox({"dit": SHAPES}), seed=1)
    tensors = files.to_foreign(adapters, TABLES, form)
    assert tensors[f"{name}.lora_A.weight"].shape == (4, 24) and tensors[f"{name}.lora_B.weight"].shape == (24, 4)
    names, prefix = files.FORMATS[form]
    pair = next(pair for pair in TABLES[names] if pair.theirs == f"{name.removeprefix(prefix)}.weight")
    kernel = params["dit"]["layers"]["block_0"]["self_attention"]["query"]["kernel"][2]
    there = pair.layout.to_theirs(kernel) + tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    here = lora.merged(params, [(adapters, 1.0)])["dit"]["layers"]["block_0"]["self_attention"]["query"]["kernel"][2]
    np.testing.assert_allclose(pair.layout.to_ours(there), here, atol=1e-4)


def test_files_of_all_kinds_are_read(adapters):
    """lora_down and lora_up, alpha, ranks that differ, layers that are left out."""
    tensors = files.to_foreign(adapters, TABLES, "comfyui")
    other = {}
    for name, tensor in tensors.items():
        if "blocks.1." in name:
            continue  # no adapter in this layer
        layer = name.rsplit(".lora_", 1)[0]
        name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        if "blocks.2." in name:
            tensor = tensor[:3] if "down" in name else tensor[:, :3]  # of a lesser rank
            other[f"{layer}.alpha"] = np.float32(6.0)  # twice the rank
        other[name] = tensor
    read = files.from_foreign(other, TABLES)
    for (path, ours), (_, theirs) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (adapters, read)), strict=True
    ):
        is_up = path[-1].key == "up"
        if path[1].key != "layers":
            np.testing.assert_array_equal(ours, theirs)
            continue
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert not theirs[1].any()
        expected = ours[2][:3] * 2 if is_up else ours[2][:, :3]
        np.testing.assert_array_equal(expected, theirs[2][:3] if is_up else theirs[2][:, :3])
        assert not (theirs[2][3:] if is_up else theirs[2][:, 3:]).any()


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_several_files_are_read_together(adapters, names):
    """One as kohya writes it, another as ComfyUI's, both changing the same layers; with weights, as one sum."""
    others = draw(adapters, seed=7)
    prefix = {"original": "comfyui", "diffusers": "diffusers"}[names]
    kohya = {}
    for name, tensor in files.to_foreign(adapters, TABLES, prefix).items():
        layer, half = name.removeprefix(files.FORMATS[prefix][1]).removesuffix(".weight").rsplit(".", 1)
        layer = "lora_unet_" + layer.replace(".", "_")
        kohya[f"{layer}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[half] }.weight"] = tensor
        kohya[f"{layer}.alpha"] = np.float32(2.0)  # half of the rank
    assert "lora_unet_blocks_0_ffn_0.lora_down.weight" in kohya or names == "diffusers"
    read = files.from_foreign(kohya, TABLES), files.from_foreign(files.to_foreign(others, TABLES, "comfyui"), TABLES)
    jax.tree.map(np.testing.assert_array_equal, read[0], lora.scaled(adapters, 0.5))
    params = draw(nn.unbox({"dit": SHAPES}), seed=1)
    together = lora.merged(params, [(read[0], 0.8), (read[1], -0.3)])
    alone = lora.merged(lora.merged(params, [(adapters, 0.4)]), [(others, -0.3)])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), together, alone)
    beside = lora.beside(params, [(read[0], 0.8), (read[1], -0.3)])["dit"]["layers"]["block_0"]["mlp_in"]
    assert beside["down"].shape == (3, 24, 8)  # of both ranks together
    kernel = beside["kernel"] + np.asarray(beside["down"]) @ np.asarray(beside["up"])
    np.testing.assert_allclose(kernel, together["dit"]["layers"]["block_0"]["mlp_in"]["kernel"], atol=1e-4)


def test_what_has_no_place_is_named(adapters):
    tensors = files.to_foreign(adapters, TABLES, "comfyui")
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors["lora_te_text_model_encoder.lora_A.weight"] = np.zeros((4, 8))
    tensors["diffusion_model.patch_embedding.lora_A.weight"] = np.zeros((4, 12))
    tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = np.zeros(24)
    del tensors[f"{name}.lora_B.weight"]
    with pytest.raises(ValueError, match="these adapters are not this model's") as error:
        files.from_foreign(tensors, TABLES)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "- lora_te_text_model_encoder.lora_A.weight (4, 8): no linear layer of the model has such an adapter",
        "- diffusion_model.patch_embedding.lora_A.weight (4, 12): no linear layer of the model has such an adapter",
        "- diffusion_model.blocks.0.self_attn.q.diff_b (24,): no linear layer of the model has such an adapter",
        "- blocks.0.self_attn.q.weight: A, B of (4, 24), None, expected (r, 24), (24, r)",
    ]
    with pytest.raises(ValueError, match="format='a1111': expected one of comfyui, peft, diffusers"):
        files.to_foreign(adapters, TABLES, "a1111")
    of_patches = {"dit": {"patch": {"linear": {"down": np.zeros((12, 2)), "up": np.zeros((2, 24))}}}}
    with pytest.raises(ValueError, match=r"\['patch/linear'\]: comfyui has no linear layers of these names"):
        files.to_foreign(of_patches, TABLES, "comfyui")


def test_a_folder_for_peft_says_what_it_holds(adapters, tmp_path):
    tensors = files.to_foreign(adapters, TABLES, "peft")
    files.write(tmp_path / "style", tensors, "peft")
    said = json.loads((tmp_path / "style" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["peft_type"]) == (4, 4, "LORA")
    assert {"attn1.to_q", "attn2.to_out.0", "ffn.net.2"} <= set(said["target_modules"])
    assert len(said["target_modules"]) == 11
    back = files.from_foreign(files.read(tmp_path / "style"), TABLES)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


ALPHA = {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"blocks\.2\.attn1\.to_q": 1, "to_q": 2}}


@pytest.mark.parametrize(
    ("beside", "scales"),  # of blocks.1.attn1.to_q, blocks.2.attn1.to_q, blocks.2.attn1.to_k
    [(ALPHA, (0.5, 0.25, 2)), (ALPHA | {"use_rslora": True}, (1, 0.5, 4)), ({"r": 4}, (1, 1, 1))],
)
@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_alpha_is_found_where_it_is_said(adapters, tmp_path, form, beside, scales):
    """PEFT's layers count lora_alpha / r times, or / sqrt(r); its own code says so in the test below."""
    tensors = files.to_foreign(adapters, TABLES, form)
    if form == "peft":
        files.write(tmp_path, tensors, form)
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    else:
        said = {f"transformer.{name}": value for name, value in beside.items()}
        save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    found = files.from_foreign(files.read(tmp_path), TABLES)
    for layer, name, scale in zip((1, 2, 2), ("query", "query", "key"), scales, strict=True):
        up, expected = (
            tree["dit"]["layers"]["block_0"]["self_attention"][name]["up"][layer] for tree in (found, adapters)
        )
        np.testing.assert_array_equal(up, expected * np.float32(scale))


def test_alpha_may_be_a_whole_number_and_files_are_not_mixed(adapters, tmp_path):
    tensors = files.to_foreign(adapters, TABLES, "comfyui")
    alpha = {f"{name.rsplit('.lora_', 1)[0]}.alpha": np.array([2]) for name in tensors}
    save_file(tensors | alpha, tmp_path / "style-000001.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, files.from_foreign(files.read(tmp_path), TABLES), lora.scaled(adapters, 0.5)
    )
    save_file(tensors, tmp_path / "style-000002.safetensors")
    with pytest.raises(ValueError, match="style-000002.safetensors: .* stands in style-000001.safetensors too"):
        files.read(tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_and_diffusers_save_adds_here_what_it_adds_there(tmp_path, use_rslora):
    pytest.importorskip("torch")
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    config = {name: value for name, value in wan.config_of(DIT, "diffusers").items() if not name.startswith("_")}
    said = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["to_q"],
        alpha_pattern={"attn2.to_q": 3},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    model = diffusers.WanTransformer3DModel(**config)
    model.add_adapter(said)
    model.save_lora_adapter(tmp_path / "diffusers")
    other = diffusers.WanTransformer3DModel(**config)
    peft.get_peft_model(other, said).save_pretrained(tmp_path / "peft")
    for folder, saved in (("diffusers", model), ("peft", other)):
        found = files.from_foreign(files.read(tmp_path / folder), TABLES)["dit"]["layers"]["block_0"]
        for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2")):
            added = getattr(saved.blocks[1], theirs).to_q.get_delta_weight("default").detach().numpy()
            query = found[ours]["query"]
            np.testing.assert_allclose((query["down"][1] @ query["up"][1]).T, added, atol=1e-5)


def test_peft_loads_them_into_diffusers(adapters, tmp_path):
    """What PEFT adds to each of diffusers' weights is what `merged` adds to ours."""
    torch = pytest.importorskip("torch")
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    config = {name: value for name, value in wan.config_of(DIT, "diffusers").items() if not name.startswith("_")}
    model = diffusers.WanTransformer3DModel(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files.write(tmp_path, files.to_foreign(adapters, TABLES, "peft"), "peft")
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload().state_dict()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), nn.unbox({"dit": SHAPES}))
    ours = lora.merged(zeros, [(adapters, 1.0)])["dit"]
    changed = 0
    for pair in TABLES["diffusers"]:
        leaf = ours
        for part in pair.ours.split("/"):
            leaf = leaf[part]
        expected = pair.layout.to_theirs(np.asarray(leaf if pair.layer is None else leaf[pair.layer]))
        added = (loaded[pair.theirs] - before[pair.theirs]).detach().numpy()
        changed += bool(np.abs(added).max() > 0)
        np.testing.assert_allclose(added, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    assert changed == 31
    assert torch.isfinite(loaded["proj_out.weight"]).all()
