# SPDX-License-Identifier: Apache-2.0
"""What diffusers makes of the tiny Wan transformers of foreign_wan.py, and the names of the published sizes, as JSON.

    pip install -e '.[parity]' && python tests/models/golden/make_wan_transformer.py

The authors' model is written here as its modules' names and sizes, after wan/modules/model.py of
github.com/Wan-Video/Wan2.1; that these are the right ones is checked by diffusers' own converter of such checkpoints.
"""

import json

import diffusers
import foreign
import foreign_wan
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def model_of(config: dict) -> torch.nn.Module:
    """With every parameter drawn."""
    model = diffusers.WanTransformer3DModel(**config)
    tensors = {name: torch.from_numpy(array) for name, array in foreign.weights(shapes_of(model)).items()}
    model.load_state_dict(tensors)
    return model


def tiny(case: str) -> dict:
    """Output, what each block gives, and gradients of <output, probe> for all inputs."""
    model, given = model_of(foreign_wan.CONFIGS[case]), foreign_wan.inputs(case)
    given = {name: torch.from_numpy(array) for name, array in given.items()}
    told = {name: given[name].requires_grad_() for name in ("latent", "text", "image") if name in given}
    outputs: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, found, i=i: outputs.update({f"block_{i}": found}))
    velocity = model(
        hidden_states=given["latent"],
        timestep=given["timestep"],
        encoder_hidden_states=given["text"],
        encoder_hidden_states_image=given.get("image"),
    ).sample
    outputs["velocity"] = velocity
    gradients = torch.autograd.grad((velocity * given["probe"]).sum(), list(told.values()))
    outputs |= {f"gradient_{name}": gradient for name, gradient in zip(told, gradients, strict=True)}
    return {
        "shapes": shapes_of(model),
        "outputs": {name: foreign.shown(tensor.detach().numpy()) for name, tensor in outputs.items()},
    }


def original(config: dict) -> dict[str, list[int]]:
    """The authors' names and shapes of a model that diffusers' config describes, as their modules have them."""
    heads, width = config.get("num_attention_heads", 40), config.get("attention_head_dim", 128)
    D, F = heads * width, config["ffn_dim"]
    channels, image = config.get("in_channels", 16), config.get("image_dim")

    def linear(name: str, wide_in: int, wide: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [wide, wide_in], f"{name}.bias": [wide]}

    def norm(name: str, wide: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [wide], f"{name}.bias": [wide]}

    found = {"patch_embedding.weight": [D, channels, 1, 2, 2], "patch_embedding.bias": [D]}
    found |= linear("text_embedding.0", config.get("text_dim", 4096), D) | linear("text_embedding.2", D, D)
    found |= linear("time_embedding.0", config.get("freq_dim", 256), D) | linear("time_embedding.2", D, D)
    found |= linear("time_projection.1", D, 6 * D)
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        found[f"{block}.modulation"] = [1, 6, D]
        for part in ("self_attn", "cross_attn"):
            for one in "qkvo":
                found |= linear(f"{block}.{part}.{one}", D, D)
            found |= {f"{block}.{part}.norm_{one}.weight": [D] for one in "qk"}
        if image:
            found |= linear(f"{block}.cross_attn.k_img", D, D) | linear(f"{block}.cross_attn.v_img", D, D)
            found[f"{block}.cross_attn.norm_k_img.weight"] = [D]
        found |= norm(f"{block}.norm3", D) | linear(f"{block}.ffn.0", D, F) | linear(f"{block}.ffn.2", F, D)
    found["head.modulation"] = [1, 2, D]
    found |= linear("head.head", D, 4 * config.get("out_channels", 16))
    if image:
        found |= norm("img_emb.proj.0", image) | linear("img_emb.proj.1", image, image)
        found |= linear("img_emb.proj.3", image, D) | norm("img_emb.proj.4", D)
    return found


def names(config: dict) -> dict:
    """Of one size in both formats, of which no memory is taken."""
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**config)
        theirs = {name: torch.empty(shape) for name, shape in original(config).items()}
    shapes = shapes_of(model)
    converted = convert_wan_transformer_to_diffusers(theirs)
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == shapes
    return {
        "diffusers": foreign_wan.folded(shapes),
        "original": foreign_wan.folded(original(config)),
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
    }


def main() -> None:
    made = {
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "tiny": {case: tiny(case) for case in foreign_wan.CONFIGS},
        "published": {name: names(config) for name, config in foreign_wan.PUBLISHED.items()},
    }
    text = json.dumps(made, separators=(",", ":")).replace('},"', '},\n"')
    foreign_wan.FILE.write_text(text + "\n")
    print(foreign_wan.FILE, foreign_wan.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
