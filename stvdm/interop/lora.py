# SPDX-License-Identifier: Apache-2.0
r"""Low-rank adapters from the files that others load, and into them.

    adapters = from_foreign(read("style.safetensors"), tables)                # {"dit": ...}, for `models.lora`
    tensors = to_foreign(adapters, tables, "comfyui")                         # name -> array

``tables`` are {"original": pairs, "diffusers": pairs} of the model: what each of its tensors is called by its authors
and by diffusers, and the parameter that it is (`mapping.pairs_of`).

| format | a name in it |
|---|---|
| comfyui | ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``: the authors' |
| peft | ``base_model.model.blocks.0.attn1.to_q.lora_A.weight``: diffusers', with adapter_config.json beside it |
| diffusers | ``transformer.blocks.0.attn1.to_q.lora_A.weight`` |
| kohya, read alone | ``lora_unet_blocks_0_self_attn_q.lora_down.weight``: either's, without its dots |

lora_A is (rank, in) and lora_B (out, rank); elsewhere they are called lora_down and lora_up. Of a layer with ``alpha``
they count alpha / rank times, and without it once. PEFT says alpha in adapter_config.json, and diffusers in the file's
metadata. Read is any of these, written are lora_A and lora_B that count once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from stvdm import tensor_files
from stvdm.interop import weights

Tree = Any
Tables = Mapping[str, Sequence[Any]]  # format of the model -> its `mapping.Pair`s

FORMATS = {  # whose names of layers, and what stands before them
    "comfyui": ("original", "diffusion_model."),
    "peft": ("diffusers", "base_model.model."),
    "diffusers": ("diffusers", "transformer."),
}
_PREFIXES = r"lora_unet_|(?:base_model\.model\.|model\.)?(?:diffusion_model\.|transformer\.)?"
_HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


def read(place: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a file, or of a folder of one; where alpha is said beside them, as PEFT's rules have it, with it.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: for pickles, damaged files, or a folder in which a name stands in two files.
    """
    source = epath.Path(place).expanduser()
    found = weights.Weights(source)
    tensors = {name: found.read(name) for name in found.places}
    said: dict[str, Any] = {}
    for file in {leaf.file for leaf in found.places.values()}:
        told = json.loads(tensor_files.metadata_in(file).get("lora_adapter_metadata", "{}"))
        said |= {name.removeprefix("transformer."): value for name, value in told.items()}
    beside = source / "adapter_config.json"
    said |= json.loads(beside.read_text()) if beside.exists() else {}
    if "lora_alpha" not in said:
        return tensors
    for name in [name for name in tensors if re.search(r"\.lora_A(\.default)?\.weight$", name)]:
        layer, rank = name.rsplit(".lora_A", 1)[0], tensors[name].shape[0]
        others = said.get("alpha_pattern") or {}
        own = (alpha for key, alpha in others.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(own, said["lora_alpha"]) * (math.sqrt(rank) if said.get("use_rslora") else 1)
        tensors.setdefault(f"{layer}.alpha", np.asarray(alpha, np.float32))
    return tensors


def from_foreign(tensors: Mapping[str, np.ndarray], tables: Tables) -> Tree:
    """Adapters of a file, in any of `FORMATS` or kohya's. Layers that it has none for get zeros, as do lesser ranks.

    Raises:
      ValueError: listing the tensors that belong to no linear layer of the model, lack their other half, or do not fit.
    """
    pairs = {pair.theirs: pair for table in tables.values() for pair in table}
    known = {_without_dots(name.removesuffix(".weight")): pair for name, pair in pairs.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{_PREFIXES})(.+?)\.(?:({'|'.join(_HALVES)})(?:\.default)?\.weight|alpha)", name)
        pair = match and known.get(_without_dots(match[1]))
        if match is None or pair is None or len(pair.shape) != 2:
            problems.append(f"{name} {np.shape(tensor)}: no linear layer of the model has such an adapter")
        else:
            found.setdefault(pair.theirs, {})[_HALVES.get(match[2], "alpha")] = np.asarray(tensor, np.float32)
    stacks: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = {}
    for theirs, parts in found.items():
        whole = pairs[theirs]
        wide_out, wide_in = whole.shape
        shapes = [parts[half].shape if half in parts else None for half in ("down", "up")]
        rank = shapes[0][0] if shapes[0] else 0
        if shapes != [(rank, wide_in), (wide_out, rank)] or not rank:
            problems.append(f"{theirs}: A, B of {shapes[0]}, {shapes[1]}, expected (r, {wide_in}), ({wide_out}, r)")
            continue
        scale = parts["alpha"].item() / rank if "alpha" in parts else 1.0
        halves = whole.layout.to_ours(parts["down"]), whole.layout.to_ours(parts["up"] * scale)
        stacks.setdefault(whole.ours.removesuffix("/kernel"), {})[whole.layer] = halves
    if problems or not stacks:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ValueError("these adapters are not this model's:\n  - " + "\n  - ".join(problems[:12] + more))
    flat: dict[str, np.ndarray] = {}
    for path, layers in stacks.items():
        rank = max(down.shape[-1] for down, _ in layers.values())
        padded = {at: (_wider(down, rank, -1), _wider(up, rank, -2)) for at, (down, up) in layers.items()}
        if None in padded:
            flat[f"{path}/down"], flat[f"{path}/up"] = padded[None]
            continue
        num = 1 + max(pair.layer for pair in pairs.values() if pair.ours == f"{path}/kernel")
        nothing = tuple(np.zeros_like(half) for half in next(iter(padded.values())))
        for name, half in (("down", 0), ("up", 1)):
            flat[f"{path}/{name}"] = np.stack([padded.get(layer, nothing)[half] for layer in range(num)])
    return {"dit": traverse_util.unflatten_dict(flat, sep="/")}


def to_foreign(adapters: Tree, tables: Tables, form: str) -> dict[str, np.ndarray]:
    """The tensors of adapters under the names of one of `FORMATS`.

    Raises:
      ValueError: for an unknown format, or naming layers that have an adapter here and are not linear, or not at all,
        there.
    """
    if form not in FORMATS:
        raise ValueError(f"format={form!r}: expected one of {', '.join(FORMATS)}.")
    names, prefix = FORMATS[form]
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(adapters["dit"], sep="/").items()}
    made: dict[str, np.ndarray] = {}
    homeless = {path.rpartition("/")[0] for path in flat}
    for pair in tables[names]:
        path = pair.ours.removesuffix("/kernel")
        if f"{path}/down" not in flat or path == pair.ours or len(pair.shape) != 2:
            continue
        homeless.discard(path)
        for name, half in (("lora_A", "down"), ("lora_B", "up")):
            value = flat[f"{path}/{half}"]
            value = pair.layout.to_theirs(value if pair.layer is None else value[pair.layer])
            made[f"{prefix}{pair.theirs.removesuffix('.weight')}.{name}.weight"] = np.ascontiguousarray(value)
    if homeless:
        raise ValueError(
            f"{sorted(homeless)}: {form} has no linear layers of these names; train with other lora.targets."
        )
    return made


def peft_config(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """adapter_config.json for what `to_foreign` made in "peft"."""
    prefix = FORMATS["peft"][1]
    layers = {name.removeprefix(prefix).rsplit(".lora_", 1)[0] for name in tensors}
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def write(to: epath.PathLike, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """The tensors of `to_foreign` as a file; in "peft" as a folder, with what PEFT wants to know beside them."""
    from safetensors.numpy import save

    target = epath.Path(to).expanduser()
    if form == "peft":
        target.mkdir(parents=True, exist_ok=True)
        (target / "adapter_config.json").write_text(json.dumps(peft_config(tensors), indent=2) + "\n")
        target = target / "adapter_model.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(save(dict(tensors), {"format": "pt"}))


def _without_dots(layer: str) -> str:
    return layer.replace(".", "_")


def _wider(half: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """With zeros up to a rank."""
    widths = [(0, 0)] * half.ndim
    widths[axis] = (0, rank - half.shape[axis])
    return np.pad(half, widths)
