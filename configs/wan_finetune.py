# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1's transformers, fine-tuned on one's own clips: all weights, or low-rank adapters beside them.

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

**Unproven**: no TPU and no published weights have been through it; tests run these commands on a tiny Wan of random
weights (`tests/commands/test_import_weights.py`).
"""

from ml_collections import ConfigDict

from stvdm import config as base
from stvdm.models.dit import SIZES

MESHES = {  # of slices that adapters fit as well as all weights do
    "1.3b-v5p": ("v5p:2x2x4", dict(fsdp=16)),
    "1.3b-v6e": ("v6e:4x4", dict(fsdp=16)),
    "14b-v5p": ("v5p:4x4x4", dict(fsdp=16, context=4)),
    "14b-v6e": ("v6e:8x8", dict(fsdp=16, context=4)),
}
VARIANTS = tuple(f"{size}-{how}" for size in MESHES for how in ("full", "lora"))


def get_config(variant: str = "1.3b-v6e-lora") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}.")
    where, _, how = variant.rpartition("-")
    config = base.dit()
    config.topology, mesh = MESHES[where]
    config.mesh.update(mesh)
    config.autoencoder = "configs/pod_autoencoder.py:480p-v5p"  # a plan needs its shapes, a run its weights
    config.start_from = "weights/wan"
    config.model.update(SIZES[f"wan-{where.split('-')[0]}"])
    config.model.remat = "everything"
    config.model.dtype = "bfloat16"
    config.text.update(dict(tower="wan/text_encoder", padding="zeros", max_tokens=512, width=4096))
    config.data.source = "latents"
    config.data.path = "data/latents"
    config.data.fps = 16.0
    config.data.num_workers = 8
    config.data.buckets = ((81, 480, 832, 16, 1.0),)
    config.flow.shift = config.sample.shift = 5.0
    config.optimizer.learning_rate = 1e-4 if how == "lora" else 1e-5
    config.optimizer.schedule = "constant"
    config.lora.rank = 32 if how == "lora" else 0
    config.total_steps = 5_000
    config.eval_every = 500
    config.checkpoint_every = 500
    config.sample.sampler = config.sample.spacing = "unipc"
    config.sample.steps = 50
    config.sample.guidance = 5.0
    return config.lock()
