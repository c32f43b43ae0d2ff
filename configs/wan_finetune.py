# SPDX-License-Identifier: Apache-2.0
"""Wan's transformers, fine-tuned on one's own clips: all weights, or low-rank adapters beside them.

    hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir wan
    stvdm import --from=wan --to=weights/wan
    stvdm preprocess --config=configs/wan_finetune.py:1.3b-v6e-lora --checkpoint=weights/wan --out=data/latents \
        --config.data.source=folder --config.data.path=my_videos --config.text.tower=wan/text_encoder
    stvdm train dit --config=configs/wan_finetune.py:1.3b-v6e-lora --workdir=runs/style \
        --config.autoencoder=weights/wan --config.start_from=weights/wan --config.text.tower=wan/text_encoder

Of adapters `stvdm lora export` makes a file for other tools, and `stvdm lora merge` a whole model; of a whole model

    stvdm export --from=runs/style --to=out/style --format=diffusers --dtype=bfloat16

makes what diffusers loads. Text is UMT5-XXL's, as Wan reads it: 512 tokens, and zeros behind them that are looked at
too. What each variant takes:

    stvdm plan --config=configs/wan_finetune.py:1.3b-v6e-lora --compile

**Clips that begin with an image**: `i2v-14b` (Wan 2.1), `ti2v-5b`, `i2v-a14b` (Wan 2.2). Each clip's is its own first
frame, and `stvdm preprocess` with the variant stores beside the latents what the network takes of it; the tower that
looks at images is --config.image.tower=wan/image_encoder.

**Two networks that take turns** (A14B) are trained one after the other, each at its own times, e.g.

    stvdm train dit --config=configs/wan_finetune.py:t2v-a14b-high-v5p-lora --workdir=runs/high ...
    stvdm train dit --config=configs/wan_finetune.py:t2v-a14b-low-v5p-lora --workdir=runs/low ...
    stvdm generate "a red ball bounces" --checkpoint=weights/wan --lora=runs/high --lora=runs/low

With all weights trained, --config.start_from=runs/high gives the second run the first one's network as its partner, and
--checkpoint=runs/low samples with both.

**Unproven**: no TPU and no published weights have been through it; tests run these commands on a tiny Wan of random
weights (`tests/commands/test_import_weights.py`).
"""

from typing import Any

from ml_collections import ConfigDict

from stvdm import config as base
from stvdm.models.dit import SIZES

MODELS: dict[str, dict[str, Any]] = {  # what it is trained on, and what there is beside the size of the transformer
    "1.3b": dict(size="1.3b", clip=(81, 480, 832), shift=5.0),
    "14b": dict(size="14b", clip=(81, 480, 832), shift=5.0),
    "i2v-14b": dict(size="14b", clip=(81, 480, 832), shift=3.0, extra_channels=20, image_width=1280),
    "ti2v-5b": dict(size="5b", clip=(121, 704, 1280), shift=5.0),
    "t2v-a14b": dict(size="14b", clip=(81, 480, 832), shift=12.0, boundary=0.875, guidance=(4.0, 3.0)),
    "i2v-a14b": dict(size="14b", clip=(81, 480, 832), shift=5.0, extra_channels=20, boundary=0.9, guidance=(3.5, 3.5)),
}
TURNS = {"high": "high_noise", "low": "low_noise"}
MESHES = {  # of slices that adapters fit as well as all weights do
    "1.3b-v5p": ("v5p:2x2x4", dict(fsdp=16)),
    "1.3b-v6e": ("v6e:4x4", dict(fsdp=16)),
    "14b-v5p": ("v5p:4x4x4", dict(fsdp=16, context=4)),
    "14b-v6e": ("v6e:8x8", dict(fsdp=16, context=4)),
    "i2v-14b-v5p": ("v5p:4x4x4", dict(fsdp=16, context=4)),
    "ti2v-5b-v5p": ("v5p:4x4x4", dict(fsdp=16, context=4)),
    **{
        f"{model}-{turn}-v5p": ("v5p:4x4x4", dict(fsdp=16, context=4))
        for model in ("t2v-a14b", "i2v-a14b")
        for turn in TURNS
    },
}
VARIANTS = tuple(f"{size}-{how}" for size in MESHES for how in ("full", "lora"))


def get_config(variant: str = "1.3b-v6e-lora") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}.")
    where, _, how = variant.rpartition("-")
    name = max((name for name in MODELS if where.startswith(f"{name}-")), key=len)
    model = MODELS[name]
    config = base.dit()
    config.topology, mesh = MESHES[where]
    config.mesh.update(mesh)
    # A plan needs its shapes, a run its weights.
    config.autoencoder = f"configs/pod_autoencoder.py:{'720p-tpu7x' if name == 'ti2v-5b' else '480p-v5p'}"
    config.start_from = "weights/wan"
    config.model.update(SIZES[f"wan-{model['size']}"])
    config.model.extra_channels = model.get("extra_channels", 0)
    config.model.image_width = model.get("image_width", 0)
    config.model.remat = "everything"
    config.model.dtype = "bfloat16"
    config.text.update(dict(tower="wan/text_encoder", padding="zeros", max_tokens=512, width=4096))
    config.image.tower = "wan/image_encoder" if config.model.image_width else ""
    config.image.share = 1.0 if name == "ti2v-5b" else 0.0  # it makes clips of text alone too: 0.5 trains both
    config.data.source = "latents"
    config.data.path = "data/latents"
    config.data.fps = 24.0 if name == "ti2v-5b" else 16.0
    config.data.num_workers = 8
    config.data.buckets = ((*model["clip"], 16, 1.0),)
    config.flow.shift = config.sample.shift = model["shift"]
    config.optimizer.learning_rate = 1e-4 if how == "lora" else 1e-5
    config.optimizer.schedule = "constant"
    config.lora.rank = 32 if how == "lora" else 0
    config.total_steps = 5_000
    config.eval_every = 500
    config.checkpoint_every = 500
    config.sample.sampler = config.sample.spacing = "unipc"
    config.sample.steps = 50
    config.sample.guidance = 5.0
    if "boundary" in model:
        edge = config.sample.boundary = model["boundary"]
        config.turn = TURNS[where.split("-")[2]]
        config.flow.times = (edge, 1.0) if config.turn == "high_noise" else (0.0, edge)
        config.sample.guidance, config.sample.guidance_low = model["guidance"]
        config.sample.steps = 40
    return config.lock()
