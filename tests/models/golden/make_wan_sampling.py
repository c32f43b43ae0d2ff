# SPDX-License-Identifier: Apache-2.0
"""What diffusers' schedulers and Wan pipelines make of the tiny models of foreign_wan_sampling.py, as JSON.

pip install -e '.[parity]' && python tests/models/golden/make_wan_sampling.py
"""

import json

import diffusers
import foreign
import foreign_wan_sampling as told
import make_wan_autoencoder
import numpy as np
import PIL.Image
import torch
import transformers


def unipc(shift: float) -> diffusers.UniPCMultistepScheduler:
    """As in the scheduler/ of Wan's folders."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def lists(steps: int, shift: float) -> dict:
    """Sigmas, and the times that the network is told."""
    found = {}
    for name, scheduler in (("unipc", unipc(shift)), ("euler", diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))):
        scheduler.set_timesteps(steps)
        found[name] = {"sigmas": scheduler.sigmas.tolist(), "timesteps": scheduler.timesteps.tolist()}
    return found


def march(steps: int, shift: float) -> list:
    """All states on the way of UniPC, along the velocity of Gaussian data."""
    scheduler = unipc(shift)
    scheduler.set_timesteps(steps)
    x, states = torch.from_numpy(told.march_noise()), []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        alpha = 1 - sigma
        whitened = (x - alpha * told.MEAN) / (alpha**2 * told.STD**2 + sigma**2)
        velocity = sigma * whitened - (told.MEAN + alpha * told.STD**2 * whitened)
        x = scheduler.step(velocity, t, x).prev_sample
        states.append(x.flatten().tolist())
    return states


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def filled(module: torch.nn.Module, tensors: dict[str, np.ndarray]) -> torch.nn.Module:
    module.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return module.eval()


def transformer(config: dict, weights=foreign.weights) -> torch.nn.Module:
    model = diffusers.WanTransformer3DModel(**config)
    return filled(model, weights(shapes_of(model)))


def image_tower() -> dict:
    """Modules of the pipeline; weights are drawn by their names in a CLIPModel."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**foreign.CLIP["vision_config"]))
    tensors = {
        name: foreign.drawn(f"vision_model.{name.removeprefix('vision_model.')}", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if "position_ids" not in name
    }
    size = foreign.CLIP["vision_config"]["image_size"]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=False)
    return {"image_encoder": model.eval(), "image_processor": processor}


@torch.no_grad()
def run(kind: str) -> dict:
    """The latents that a pipeline ends in."""
    about, settings = told.KINDS[kind], told.SETTINGS
    model = transformer(about["config"])
    modules = dict(
        tokenizer=None,
        text_encoder=None,
        vae=make_wan_autoencoder.model(about["coder"]),
        scheduler=unipc(settings["shift"]),
        transformer=model,
        transformer_2=transformer(about["config"], told.second) if about["boundary"] else None,
        boundary_ratio=about["boundary"],
        expand_timesteps=kind == "ti2v",
    )
    height, width = told.side(kind)
    noise, (prompt, negative) = told.noise(kind), told.texts(kind)
    inputs = dict(
        prompt_embeds=torch.from_numpy(prompt),
        negative_prompt_embeds=torch.from_numpy(negative),
        latents=torch.from_numpy(noise).permute(0, 4, 1, 2, 3).contiguous(),
        height=height,
        width=width,
        num_frames=told.FRAMES,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        guidance_scale_2=settings["guidance_low"] if about["boundary"] else None,
        output_type="latent",
    )
    found = {}
    if told.image(kind) is None:
        pipeline = diffusers.WanPipeline(**modules)
    else:
        pipeline = diffusers.WanImageToVideoPipeline(**modules, **(image_tower() if kind == "i2v" else {}))
        inputs["image"] = PIL.Image.fromarray(told.image(kind))
        frame = pipeline.video_processor.preprocess(inputs["image"], height=height, width=width)
        prepared = pipeline.prepare_latents(
            frame, 2, noise.shape[-1], height, width, told.FRAMES, torch.float32, torch.device("cpu"), None, None
        )
        found["condition"] = prepared[1]
        if kind == "i2v":
            found["tokens"] = pipeline.encode_image(inputs["image"])
    pipeline.set_progress_bar_config(disable=True)
    found["latent"] = pipeline(**inputs).frames
    outputs = {
        name: foreign.shown((tensor.permute(0, 2, 3, 4, 1) if tensor.ndim == 5 else tensor).numpy())
        for name, tensor in found.items()
    }
    return {"shapes": shapes_of(model), "outputs": outputs}


def main() -> None:
    made = {
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "lists": {f"{steps},{shift}": lists(steps, shift) for steps, shift in told.LISTS},
        "marches": {f"{steps},{shift}": march(steps, shift) for steps, shift in told.MARCHES},
        "runs": {kind: run(kind) for kind in told.KINDS},
    }
    text = json.dumps(made, separators=(",", ":")).replace('},"', '},\n"')
    told.FILE.write_text(text + "\n")
    print(told.FILE, told.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
