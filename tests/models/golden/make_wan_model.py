# SPDX-License-Identifier: Apache-2.0
"""What diffusers' WanPipeline makes of the tiny Wan of foreign_wan_model.py, step by step, as JSON.

pip install -e '.[parity]' && python tests/models/golden/make_wan_model.py
"""

import json
import tempfile
from pathlib import Path

import diffusers
import foreign
import foreign_wan_model
import numpy as np
import torch
import transformers


def opened(folder: Path, towers: Path | None = None) -> diffusers.WanPipeline:
    """The pipeline of a folder, whose text encoder lies in that of ``towers``."""
    at = towers or folder
    return diffusers.WanPipeline(
        tokenizer=transformers.T5Tokenizer(vocab=foreign.pieces(), extra_ids=2),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(at / "text_encoder"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler"),
        transformer=diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )


def sampled(pipe: diffusers.WanPipeline) -> dict[str, np.ndarray]:
    """Latents after each step, channels last, and frames in [0, 1]."""
    latents = []

    def keep(pipe: object, step: int, time: object, found: dict) -> dict:
        latents.append(found["latents"].permute(0, 2, 3, 4, 1).numpy().copy())
        return {}

    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        foreign_wan_model.PROMPTS,
        **foreign_wan_model.SIZE,
        num_inference_steps=foreign_wan_model.STEPS,
        guidance_scale=foreign_wan_model.GUIDANCE,
        latents=torch.from_numpy(foreign_wan_model.noise()).permute(0, 4, 1, 2, 3),
        callback_on_step_end=keep,
    ).frames
    return {**{f"latent_{i + 1}": latent for i, latent in enumerate(latents)}, "frames": frames}


def made(folder: Path) -> dict:
    pipe = opened(folder)
    outputs = {name: foreign.shown(array, most=100) for name, array in sampled(pipe).items()}
    return {
        "sigmas": [float(str(sigma)) for sigma in pipe.scheduler.sigmas.numpy()],
        "timesteps": pipe.scheduler.timesteps.tolist(),
        "outputs": outputs,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        found = made(foreign_wan_model.write(Path(place)))
    about = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    text = json.dumps(about | found, separators=(",", ":")).replace('},"', '},\n"')
    foreign_wan_model.FILE.write_text(text + "\n")
    print(foreign_wan_model.FILE, foreign_wan_model.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
