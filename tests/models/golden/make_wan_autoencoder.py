# SPDX-License-Identifier: Apache-2.0
"""What diffusers' AutoencoderKLWan makes of small random weights, into wan_autoencoder.json; and its full sizes.

    pip install -e '.[parity]' && python tests/models/golden/make_wan_autoencoder.py

The tests compare with the file, and where PyTorch is installed with all values of a fresh run of this.
"""

import json

import diffusers
import foreign
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from foreign_wan_autoencoder import FILE, FRAMES, FULL, SIZES, digest, inputs


def model(version: str) -> torch.nn.Module:
    """The small model of a version, all its weights random."""
    made = diffusers.AutoencoderKLWan(**SIZES[version])
    tensors = foreign.weights({name: list(tensor.shape) for name, tensor in made.state_dict().items()})
    made.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return made.eval()


def reference(version: str, frames: int) -> dict[str, np.ndarray]:
    """Every output of a version for a clip of so many frames, channels last."""
    made, given = model(version), inputs(version, frames)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, __, out: seen.setdefault(name, []).append(out))  # once a chunk

    blocks = made.config.num_res_blocks
    for half, inner in (("encoder", made.encoder), ("decoder", made.decoder)):
        stages = inner.down_blocks if half == "encoder" else inner.up_blocks
        if half == "encoder" and not made.config.is_residual:  # one flat list: a stage ends with what halves it
            stages = [*stages[blocks :: blocks + 1], stages[-1]]
        for i, stage in enumerate(stages):
            watch(f"{half}/stage_{i}", stage)
        watch(f"{half}/middle", inner.mid_block)
        watch(f"{half}/all", inner)

    video, latent = (foreign_to_torch(given[name]).requires_grad_() for name in ("video", "latent"))
    moments = made.encode(video).latent_dist.parameters
    clipped = made.decode(latent).sample
    found = {name: torch.cat(chunks, dim=2) for name, chunks in seen.items()}
    del found["encoder/all"]
    decoded = unpatchify(found.pop("decoder/all"), made.config.patch_size or 1)
    found |= {"moments": moments, "clipped": clipped, "decoded": decoded}
    for name, output, by in (("encode", moments, video), ("decode", decoded, latent)):
        weights = foreign_to_torch(given[f"weights_{name}"])
        (found[f"gradient_{name}"],) = torch.autograd.grad((output * weights).sum(), by)
    return {name: tensor.detach().permute(0, 2, 3, 4, 1).numpy() for name, tensor in found.items()}


def foreign_to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3).contiguous()


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def main() -> None:
    made = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    for version in SIZES:
        with torch.device("meta"):
            full = shapes_of(diffusers.AutoencoderKLWan(**FULL[version]))
        made[version] = {
            "shapes": shapes_of(model(version)),
            "outputs": {
                str(frames): {
                    name: foreign.shown(array, most=8) for name, array in sorted(reference(version, frames).items())
                }
                for frames in FRAMES
            },
            "full": {"tensors": len(full), "sha256": digest(full)},
        }
    text = json.dumps(made, separators=(",", ":")).replace('},"', '},\n"')
    FILE.write_text(text + "\n")
    print(FILE, len(text), "bytes")


if __name__ == "__main__":
    main()
