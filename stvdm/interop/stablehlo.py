# SPDX-License-Identifier: Apache-2.0
"""A model as StableHLO: its networks as programs that run where there is neither stvdm nor Flax.

    stablehlo.write("runs/dit", "OUT")              # for clips as it was trained on; or size=(81, 480, 832)
    python OUT/example.py "a red ball bounces"      # samples with them, and shows all that it takes

| program | weights | what it gives |
|---|---|---|
| velocity | dit | of a noisy latent at a time: what a sampler follows from noise, time 1, to a clip, time 0 |
| text | text | what the network reads, of words as numbers; where a published tower reads them there is none |
| decode_first, decode_next | decoder | a latent frame as video, of a clip the first or a later; what to remember |

No program makes latents of images, so of a model that is given one there is no example.py.

programs.json has the files of each, and every input and output with its shape and dtype. Inputs are named, weights are
a dict of arrays by name; to StableHLO they are one list: weights by name, then inputs by name, as jax.tree orders them.

A file does for CPU, CUDA and TPU and for any number of clips B of one size. So it is plain XLA: attention in blocks, no
kernel of one kind of chip. Weights are arguments, so that a program has some hundred kilobytes whatever their size, and
they are copied a layer at a time. Later versions of JAX read such files for six months at least
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax import export

from stvdm import shapes, sharding, tensor_files
from stvdm.checkpoint import WEIGHTS, describe_model
from stvdm.diffusion import flow
from stvdm.interop import mapping, wan, wan_autoencoder, wan_model, weights
from stvdm.models import autoencoder3d
from stvdm.models.block import MODULATED
from stvdm.sampling import denoising, first_frame, pipeline

Tree = Any
Size3 = tuple[int, int, int]

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAMS, EXAMPLE = "programs.json", "example.py"
_WAN_CLIP = (81, 480, 832)  # what Wan's authors sample
_WAN_WORDS, _WAN_IMAGE = 512, 257  # tokens of text and of an image that it reads
_WAN_OBJECTIVE = flow.Objective("velocity", flow.PATHS["rectified"])


class Program(NamedTuple):
    """What is to be written."""

    function: Callable[..., Any]  # (params, **inputs) -> outputs
    weights: str  # the file's name for those that it takes
    holds: tuple[str, ...]  # beginnings of their names
    inputs: dict[str, Any]  # name -> ShapeDtypeStruct, or a dict of such
    outputs: tuple[str, ...]


def write(
    place: epath.PathLike,
    target: epath.PathLike,
    *,
    size: Size3 | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    params: Tree | None = None,
) -> list[str]:
    """Writes the programs of a model and their weights; returns the paths of the files.

    Args:
      place: what a training or `stvdm import` wrote.
      size: (T, H, W) of the clips; None: of the largest that it was trained on.
      dtype: of weights and products.
      params: weights in place of those in the folder, all or some.

    Raises:
      FileNotFoundError: if there is no model.
      ValueError: for an autoencoder alone, a size that the model can't make, or if JAX runs on an accelerator, whose
        own kernels would be in the programs.
    """
    if sharding.platform() != "cpu":
        raise ValueError(
            f"JAX runs on {sharding.platform()!r}, and would put kernels of that alone into the programs: set "
            "JAX_PLATFORMS=cpu; nothing is computed here."
        )
    folder, out, kind = pipeline.model_folder(place), epath.Path(target).expanduser(), jnp.dtype(dtype)
    description, source = describe_model(folder), weights.Weights(folder / WEIGHTS)
    programs = _programs(folder, description, source, size, kind)
    others = traverse_util.flatten_dict(params or {}, sep="/")
    out.mkdir(parents=True, exist_ok=True)
    said: dict[str, dict[str, Any]] = {}
    files: dict[str, list[str]] = {}  # of weights
    for name, program in programs.items():
        names = sorted(found for found in source.shapes if found.startswith(program.holds))
        if program.weights not in files:
            tensors = [_tensor(source, found, others.get(found)) for found in names]
            written = tensor_files.write(out, tensors, stem=program.weights, dtype=kind, shard_bytes=shard_bytes)
            files[program.weights] = sorted(written)
        params = {found: jax.ShapeDtypeStruct(source.shapes[found], kind) for found in names}
        about = _exported(out / f"{name}.jax", program, params)
        said[name] = {"file": f"{name}.jax", "weights": files[program.weights], **about}
    settings: Any = description.get("config")
    whole = {"programs": said, "platforms": PLATFORMS, "jax": jax.__version__, "config": settings}
    beside = [PROGRAMS]
    if {"text", "velocity"} <= said.keys() and not first_frame.parts_of(settings["model"]):
        coder = pipeline.autoencoder_of(description["autoencoder"])
        latent_thw = programs["velocity"].inputs["latent_Bthwz"].shape[1:4]
        whole["shift"] = settings["sample"]["shift"] or pipeline.shift_of(latent_thw, coder, settings)
        (out / EXAMPLE).write_text(_EXAMPLE)
        beside.append(EXAMPLE)
    (out / PROGRAMS).write_text(json.dumps(whole, indent=1) + "\n")
    everything = [about["file"] for about in said.values()] + [file for some in files.values() for file in some]
    return [str(out / file) for file in (*everything, *beside)]


def _exported(path: epath.Path, program: Program, params: dict[str, Any]) -> dict[str, Any]:
    """Writes one program; returns what it takes and gives."""

    def call(flat: dict[str, jax.Array], **inputs: Any) -> Any:
        return program.function(traverse_util.unflatten_dict(flat, sep="/"), **inputs)

    made = export.export(jax.jit(call, keep_unused=True), platforms=PLATFORMS)(params, **program.inputs)
    path.write_bytes(bytes(made.serialize()))
    outputs = jax.tree.unflatten(made.out_tree, made.out_avals)
    outputs = outputs if len(program.outputs) > 1 else (outputs,)
    return {
        "inputs": jax.tree.map(_said, program.inputs),
        "outputs": {name: jax.tree.map(_said, output) for name, output in zip(program.outputs, outputs, strict=True)},
    }


def _said(array: Any) -> str:
    """float32[B, 5, 8, 8, 16]"""
    return f"{jnp.dtype(array.dtype).name}[{', '.join(map(str, array.shape))}]"


def _tensor(source: weights.Weights, name: str, other: np.ndarray | None) -> tensor_files.Tensor:
    """A tensor of the file, or another in its place, for another file; stacked layers come one by one."""
    shape = source.shapes[name]
    layers = [layer for layer, *_ in mapping.layers_of(name.partition("/")[2], shape, wan.STACKED)]
    if other is None:
        return tensor_files.Tensor(name, shape, lambda: (source.read(name, layer) for layer in layers))
    return tensor_files.Tensor(name, shape, lambda: (other if layer is None else other[layer] for layer in layers))


# ---- what the programs are ------------------------------------------------------------------------------------------


def _programs(
    folder: epath.Path, description: Mapping[str, Any], source: weights.Weights, size: Size3 | None, dtype: jnp.dtype
) -> dict[str, Program]:
    (batch,) = export.symbolic_shape("B")
    array = functools.partial(_array, batch)
    if description["kind"] != "dit":
        made = {}
        for name, (dit, _) in wan_model.held(folder).transformers.items():
            coder = wan_autoencoder.WAN_2_2 if dit.latent_channels == 48 else wan_autoencoder.WAN_2_1
            reads = dict(text_BSE=array(_WAN_WORDS, dit.text_width, dtype=dtype))
            velocity = _velocity(
                array, name, dit.copy(dtype=dtype), coder.latent_shape(size or _WAN_CLIP, dit.patch), reads
            )
            made[f"velocity{name.removeprefix('dit')}"] = velocity
        if not made:
            raise ValueError(f"{folder}: an autoencoder alone, expected a model that makes clips; train one on it.")
        return made

    settings, text = description["config"], description["config"]["text"]
    coder = pipeline.autoencoder_of(description["autoencoder"]).copy(dtype=dtype)
    plain = {**settings, "model": {**settings["model"], "matmul": "", "dtype": dtype.name}}
    models = pipeline.build(plain, latent_channels=coder.latent_channels)
    latent = coder.latent_shape(size or pipeline.largest_clip(settings), models.dit.patch)
    of_words = dict(mask_BS=array(text["max_tokens"], dtype=jnp.bool_))
    reads = of_words | dict(text_BSE=array(text["max_tokens"], text["width"]))
    objective = denoising.objective(settings["flow"])
    names = sorted(name for name in {found.partition("/")[0] for found in source.shapes} if name.startswith("dit"))
    turn = settings.get("turn") if names == ["dit"] else ""
    if turn:
        warnings.warn(
            f"{folder}: of two networks that take turns this has the one that was trained, for {turn}; the other is in "
            f"{settings['start_from']}, so write that one's programs too.",
            stacklevel=3,
        )
    made = {
        f"velocity_{turn}" if turn else f"velocity{name.removeprefix('dit')}": _velocity(
            array, name, models.dit, latent, reads, objective
        )
        for name in names
    }
    if models.text is not None:
        of_words |= dict(tokens_BS=array(text["max_tokens"], dtype=jnp.int32))
        made["text"] = Program(models.read, "text", ("text/",), of_words, ("text_BSE",))
    statistics = {name: source.read(f"statistics/{name}") for name in ("mean_z", "std_z")}
    return made | _decoder(array, coder, statistics, latent[1:])


def _array(batch: Any, *sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *sizes), dtype)


def _velocity(
    array: Callable[..., Any],
    name: str,
    network: Any,
    latent: Size3,
    reads: dict[str, Any],
    objective: flow.Objective = _WAN_OBJECTIVE,
) -> Program:
    """Tokens where ``known_BN`` is true are at time 0, as the first frame of image-to-video; what it gives there is of
    no use."""
    z, num_tokens = network.latent_channels, math.prod(shapes.token_grid(latent, network.patch))
    inputs = dict(latent_Bthwz=array(*latent, z + getattr(network, "extra_channels", 0)), time_B=array(), **reads)
    if getattr(network, "time_path", "") in MODULATED:
        inputs["known_BN"] = array(num_tokens, dtype=jnp.bool_)
    if width := getattr(network, "image_width", 0):
        inputs["image_BSE"] = array(_WAN_IMAGE, width)

    def velocity(
        params: Tree,
        *,
        latent_Bthwz: jax.Array,
        time_B: jax.Array,
        text_BSE: jax.Array,
        mask_BS: jax.Array | None = None,
        known_BN: jax.Array | None = None,
        image_BSE: jax.Array | None = None,
    ) -> jax.Array:
        given_Bthwz = latent_Bthwz[..., z:]
        image = {} if image_BSE is None else {"image_BSE": image_BSE}

        def predict(x_Bthwz: jax.Array, t_B: jax.Array) -> jax.Array:
            x_Bthwz = jnp.concatenate([x_Bthwz, given_Bthwz], axis=-1)
            time_BK, level_BN = t_B[:, None], None
            if known_BN is not None:
                time_BK, level_BN = jnp.stack([t_B, jnp.zeros_like(t_B)], axis=1), known_BN.astype(jnp.int32)
            told = (x_Bthwz, time_BK, level_BN, text_BSE, mask_BS)
            return network.apply({"params": params[name]}, *told, **image)

        return flow.velocity_field(predict, objective=objective)(latent_Bthwz[..., :z], time_B)

    return Program(velocity, name, (f"{name}/",), inputs, ("velocity_Bthwz",))


def _decoder(
    array: Callable[..., Any], coder: autoencoder3d.Autoencoder, statistics: Mapping[str, Any], frame: tuple[int, int]
) -> dict[str, Program]:
    """Of normalised latents, a frame of them at a time; "remembered" of one call is an input of the next."""

    def decode(params: Tree, *, latent_B1hwz: jax.Array, remembered: Mapping[str, jax.Array] | None = None) -> Any:
        latent_B1hwz = autoencoder3d.denormalise(latent_B1hwz, dict(statistics))
        cache = traverse_util.unflatten_dict(dict(remembered or {}), sep="/")
        video_BTHWC, cache = autoencoder3d.decode_chunk(coder, params["autoencoder"], latent_B1hwz, cache)
        return video_BTHWC, traverse_util.flatten_dict(cache, sep="/")

    latent = dict(latent_B1hwz=array(1, *frame, coder.latent_channels))
    params = {"autoencoder": wan_autoencoder.shapes(coder)}
    _, remembered = jax.eval_shape(decode, params, **latent)
    whole = functools.partial(Program, decode, "decoder", ("autoencoder/decoder/", "autoencoder/post_quant/"))
    outputs = ("video_BTHWC", "remembered")
    return {
        "decode_first": whole(latent, outputs),
        "decode_next": whole(latent | {"remembered": remembered}, outputs),
    }


_EXAMPLE = '''"""A clip by these programs alone: python example.py "a red ball bounces" [SEED]

jax, numpy and safetensors are enough.
"""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "programs.json").read_text())
SAMPLE, TEXT = ABOUT["config"]["sample"], ABOUT["config"]["text"]


def program(name):
    """It takes its weights by their names, and inputs by theirs."""
    said = ABOUT["programs"][name]
    call = export.deserialize(bytearray((HERE / said["file"]).read_bytes())).call
    weights = {key: array for file in said["weights"] for key, array in load_file(HERE / file).items()}
    return lambda **inputs: call(weights, **inputs)


def numbers(prompt):
    """Words by their place in the vocabulary, from 3 on; 1 begins every prompt, 0 fills it up."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    if unknown := sorted(set(words) - set(TEXT["words"])):
        sys.exit(f"{', '.join(unknown)}: not among the words it knows: {' '.join(TEXT['words'])}")
    found = [1, *(3 + TEXT["words"].index(word) for word in words)]
    tokens_BS = np.array([found + [0] * (TEXT["max_tokens"] - len(found))], np.int32)
    return dict(tokens_BS=tokens_BS, mask_BS=tokens_BS != 0)


def main(prompt, seed=0):
    velocity, inputs = program("velocity"), ABOUT["programs"]["velocity"]["inputs"]
    size = [int(number) for number in re.findall(r"\\d+", inputs["latent_Bthwz"].partition("[")[2])]
    x = np.asarray(jax.random.normal(jax.random.key(int(seed)), size))[None]
    known = {}
    if "known_BN" in inputs:  # tokens of a first frame that is given: here none
        known["known_BN"] = np.zeros((1, int(re.findall(r"\\d+", inputs["known_BN"])[-1])), bool)

    told = []  # what guidance leads to, and away from
    read = program("text")
    for words in (numbers(prompt), numbers(SAMPLE.get("negative", ""))):
        told.append(dict(text_BSE=np.asarray(read(**words)), mask_BS=words["mask_BS"], **known))

    times = np.linspace(1, 0, SAMPLE["steps"] + 1)
    times = ABOUT["shift"] * times / (1 + (ABOUT["shift"] - 1) * times)
    for now, then in zip(times, times[1:]):  # Euler; the velocity leads from the clip to noise
        to, away = (velocity(latent_Bthwz=x, time_B=np.float32([now]), **part) for part in told)
        x = x + np.float32(then - now) * (np.asarray(away) + SAMPLE["guidance"] * np.asarray(to - away))

    video, remembered = program("decode_first")(latent_B1hwz=x[:, :1])
    frames, decode_next = [video], program("decode_next")
    for t in range(1, x.shape[1]):
        video, remembered = decode_next(latent_B1hwz=x[:, t : t + 1], remembered=remembered)
        frames.append(video)
    clip = np.clip(np.round((np.concatenate(frames, axis=1)[0] + 1) * 127.5), 0, 255).astype(np.uint8)
    np.save(HERE / "clip.npy", clip)
    print(HERE / "clip.npy", "holds bytes (T, H, W, 3) =", clip.shape)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else print(__doc__)
'''
