# SPDX-License-Identifier: Apache-2.0
"""A tiny whole Wan as diffusers keeps it, the same with PyTorch and without, and one sampling of it.

Transformer, autoencoder and UMT5 are those of foreign_wan.py, foreign_wan_autoencoder.py and foreign.py, of which only
the width of the text was made one. wan_model.json has what diffusers' WanPipeline makes of it, step by step.
"""

import json
from pathlib import Path

import foreign
import foreign_wan
import foreign_wan_autoencoder
import foreign_wan_sampling
import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "wan_model.json"
TRANSFORMER = dict(foreign_wan.CONFIGS["t2v"], text_dim=foreign.T5["d_model"])
PROMPTS = ["a red ball bounces to the right", "all the balls"]
SIZE = dict(num_frames=9, height=32, width=48)
STEPS, GUIDANCE, SHIFT = 4, 5.0, 3.0
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": SHIFT,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


def noise() -> np.ndarray:
    """noise_Bthwz of both prompts."""
    t, h, w = 1 + (SIZE["num_frames"] - 1) // 4, SIZE["height"] // 8, SIZE["width"] // 8
    return foreign.inputs("noise", (len(PROMPTS), t, h, w, TRANSFORMER["in_channels"]))


def transformer_shapes(kind: str = "t2v") -> dict[str, list[int]]:
    runs = foreign_wan_sampling.golden()["runs"]
    shapes = foreign_wan.golden()["tiny"]["t2v"]["shapes"] if kind == "t2v" else runs[kind]["shapes"]
    name = "condition_embedder.text_embedder.linear_1.weight"
    return shapes | {name: [shapes[name][0], TRANSFORMER["text_dim"]]}


def write(folder: Path, *, two: bool = False, kind: str = "t2v") -> Path:
    """The folder of the model, all weights random; with two transformers that take turns, or one.

    ``kind``: one of `foreign_wan_sampling.KINDS`.
    """
    towers, shapes = foreign.golden(), transformer_shapes(kind)
    config = dict(foreign_wan_sampling.KINDS[kind]["config"], text_dim=TRANSFORMER["text_dim"])
    version = foreign_wan_sampling.KINDS[kind]["coder"]
    parts = {
        "transformer": (
            {"_class_name": "WanTransformer3DModel", **(TRANSFORMER if kind == "t2v" else config)},
            foreign.weights(shapes),
        ),
        "vae": (
            {"_class_name": "AutoencoderKLWan", **foreign_wan_autoencoder.SIZES[version]},
            foreign.weights(json.loads(foreign_wan_autoencoder.FILE.read_text())[version]["shapes"]),
        ),
        "text_encoder": (foreign.T5_KINDS["umt5"], foreign.weights(towers["t5"]["umt5"]["shapes"])),
    }
    if "image_dim" in config:
        seen = {name: shape for name, shape in towers["clip"]["shapes"].items() if name.startswith("vision_model")}
        settings = {**foreign.CLIP["vision_config"], "model_type": "clip_vision_model"}
        parts["image_encoder"] = (settings, foreign.weights(seen))
    if two:
        others = {name: foreign.drawn(f"second {name}", tuple(shape)) for name, shape in shapes.items()}
        parts["transformer_2"] = (parts["transformer"][0], others)
    for name, (config, tensors) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "model" if "encoder" in name else "diffusion_pytorch_model"
        save_file(tensors, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("tokenizer/tokenizer.json", towers["t5_tokenizer"]["file"]),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("model_index.json", {"_class_name": "WanPipeline", "boundary_ratio": 0.875 if two else None}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def golden() -> dict:
    return json.loads(FILE.read_text())
