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
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from foreign_wan_autoencoder import FILE, FRAMES, FULL, SIZES, digest, inputs, total


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


def original(**sizes: object) -> dict[str, list[int]]:
    """Names and shapes of the authors' modules: wan/modules/vae.py of Wan 2.1, vae2_2.py of Wan 2.2."""
    config = diffusers.AutoencoderKLWan(**sizes).config
    z, blocks, residual = config["z_dim"], config["num_res_blocks"], config["is_residual"]
    conv, conv2d, numbered = torch.nn.Conv3d, torch.nn.Conv2d, torch.nn.ModuleDict

    def norm(wide: int, axes: int = 3) -> torch.nn.Module:
        made = torch.nn.Module()
        made.gamma = torch.nn.Parameter(torch.ones(wide, *(1,) * axes))
        return made

    def block(wide_in: int, wide: int) -> torch.nn.Module:
        made = torch.nn.Module()
        layers = {"0": norm(wide_in), "2": conv(wide_in, wide, 3), "3": norm(wide), "6": conv(wide, wide, 3)}
        made.residual = numbered(layers)
        if wide_in != wide:
            made.shortcut = conv(wide_in, wide, 1)
        return made

    def resample(wide: int, wide_out: int, wide_time: int) -> torch.nn.Module:
        made = torch.nn.Module()
        made.resample = numbered({"1": conv2d(wide, wide_out, 3)})
        if wide_time:
            made.time_conv = conv(wide, wide_time, (3, 1, 1))
        return made

    def ends(first: int, wide_first: int, wide_middle: int, wide_last: int, last: int) -> torch.nn.Module:
        made, attention = torch.nn.Module(), torch.nn.Module()
        made.conv1 = conv(first, wide_first, 3)
        attention.norm = norm(wide_middle, 2)
        attention.to_qkv, attention.proj = conv2d(wide_middle, 3 * wide_middle, 1), conv2d(wide_middle, wide_middle, 1)
        made.middle = numbered({"0": block(*[wide_middle] * 2), "1": attention, "2": block(*[wide_middle] * 2)})
        made.head = numbered({"0": norm(wide_last), "2": conv(wide_last, last, 3)})
        return made

    def staged(stages: list[list[torch.nn.Module]], inner: str) -> torch.nn.Module:
        if not residual:
            return torch.nn.ModuleList([module for stage in stages for module in stage])
        return torch.nn.ModuleList([numbered({inner: torch.nn.ModuleList(stage)}) for stage in stages])

    multipliers, halves = config["dim_mult"], config["temperal_downsample"]
    down = [config["base_dim"] * m for m in (1, *multipliers)]
    up = [(config["decoder_base_dim"] or config["base_dim"]) * m for m in (multipliers[-1], *multipliers[::-1])]
    stages: dict[str, list[list[torch.nn.Module]]] = {"down": [], "up": []}
    for i in range(len(multipliers)):
        last = i == len(multipliers) - 1
        stage = [block(down[i] if j == 0 else down[i + 1], down[i + 1]) for j in range(blocks)]
        if not last:
            stage.append(resample(down[i + 1], down[i + 1], down[i + 1] * halves[i]))
        stages["down"].append(stage)
        entered = up[i] // 2 if i and not residual else up[i]
        stage = [block(entered if j == 0 else up[i + 1], up[i + 1]) for j in range(blocks + 1)]
        if not last:
            stage.append(resample(up[i + 1], up[i + 1] if residual else up[i + 1] // 2, 2 * up[i + 1] * halves[-1 - i]))
        stages["up"].append(stage)
    pixels = config["in_channels"]
    whole = torch.nn.Module()
    whole.encoder = ends(pixels, down[0], down[-1], down[-1], 2 * z)
    whole.encoder.downsamples = staged(stages["down"], "downsamples")
    whole.conv1, whole.conv2 = conv(2 * z, 2 * z, 1), conv(z, z, 1)
    whole.decoder = ends(z, up[0], up[0], up[-1], pixels)
    whole.decoder.upsamples = staged(stages["up"], "upsamples")
    return shapes_of(whole)


def main() -> None:
    made = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    for version in SIZES:
        with torch.device("meta"):
            theirs, authors = shapes_of(diffusers.AutoencoderKLWan(**FULL[version])), original(**FULL[version])
        if version == "2.1":  # diffusers reads the authors' file of this one
            assert convert_wan_vae_to_diffusers(dict(authors)) == theirs
        made[version] = {
            "shapes": shapes_of(model(version)),
            "outputs": {
                str(frames): {
                    name: foreign.shown(array, most=8) for name, array in sorted(reference(version, frames).items())
                }
                for frames in FRAMES
            },
            "full": {
                name: {"sha256": digest(shapes), "tensors": len(shapes), "parameters": total(shapes)}
                for name, shapes in (("diffusers", theirs), ("original", authors))
            },
        }
    text = json.dumps(made, separators=(",", ":")).replace('},"', '},\n"')
    FILE.write_text(text + "\n")
    print(FILE, len(text), "bytes")


if __name__ == "__main__":
    main()
