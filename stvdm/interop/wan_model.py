# SPDX-License-Identifier: Apache-2.0
"""A whole Wan model: its transformers, its autoencoder and how it is sampled, as one folder of ours, and out again.

    wan_model.bring("Wan2.1-T2V-1.3B-Diffusers", "wan")              # from files to a file of ours, a tensor at a time
    Pipeline.load("wan").generate(["a red ball bounces"])            # or trained on: start_from, autoencoder
    wan_model.give("wan", "back", "diffusers")                       # and back; or what was trained here

| theirs                                                           | here                                            |
|------------------------------------------------------------------|-------------------------------------------------|
| ``transformer/``; the authors' folder itself                     | ``dit/...`` of model.safetensors                |
| ``transformer/``, ``transformer_2/``; ``high_noise_model/``, ... | ``dit_high_noise/...``, ``dit_low_noise/...``   |
| ``vae/``: its tensors; latents_mean and latents_std              | ``autoencoder/...``; ``statistics/...``         |
| ``scheduler/``, ``model_index.json``                             | model.json's config: ``sample``, ``flow.shift`` |
| ``text_encoder/`` with ``tokenizer/``, ``image_encoder/``        | the same: where they lie, in ``text.tower`` and |
|                                                                  | ``image.tower``                                 |

The towers stay where they are: `interop.towers` reads them as they were published. Of a transformer alone comes a
folder that can be given back and started from, and of an autoencoder alone one that can be trained on.

The authors keep autoencoder and tower as pickles, which are never opened; name folders of safetensors in their place.

Sources: diffusers' WanPipeline; wan/configs of github.com/Wan-Video/Wan2.1 and Wan2.2, for what no file says.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from stvdm import config as base
from stvdm import tensor_files
from stvdm.checkpoint import DESCRIPTION, WEIGHTS, describe_model
from stvdm.interop import mapping, wan, wan_autoencoder, weights
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.dit import DiT
from stvdm.sampling import pipeline

Tree = Any
Opened = TypeVar("Opened")

_KIND = "transformers"  # of a folder of ours that holds nothing else
_CLIPS = {8: ((81, 480, 832), 16.0), 16: ((121, 704, 1280), 24.0)}  # (T, H, W) and fps, by the autoencoder's scale
_SCHEDULERS = {"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler"}  # by our sampler
_FOLLOWED = {  # settings of UniPCMultistepScheduler that samples here follow: the class's default, what they may be
    "prediction_type": ("epsilon", "flow_prediction"),
    "use_flow_sigmas": (False, True),
    "solver_order": (2, 2),
    "solver_type": ("bh2", "bh2"),
    "predict_x0": (True, True),
    "lower_order_final": (True, True),
    "final_sigmas_type": ("zero", "zero"),
    "thresholding": (False, False),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
    "use_dynamic_shifting": (False, False),
    "disable_corrector": ([], []),
}


class Coder(NamedTuple):
    """An autoencoder, its parameters, and its latents' {"mean_z", "std_z"}."""

    model: Autoencoder
    part: weights.Part
    statistics: dict[str, np.ndarray]


class Held(NamedTuple):
    """What a folder of ours holds; no parameters are read yet."""

    transformers: dict[str, tuple[DiT, weights.Part]]
    autoencoder: Coder | None
    description: dict[str, Any]


# ---- in -------------------------------------------------------------------------------------------------------------


def bring(
    place: epath.PathLike,
    target: epath.PathLike,
    *,
    autoencoder: epath.PathLike | None = None,
    tower: epath.PathLike | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Writes a Wan model, or what there is of one, as a folder of ours; returns its description.

    Args:
      place: a model's folder, that of a transformer or of an autoencoder, or the OWNER/NAME of one on the hub.
      autoencoder: where the autoencoder lies, if not in the ``vae`` of the model.
      tower: where the UMT5 lies that reads prompts, if not in the ``text_encoder`` of the model.
      dtype: of the transformers' weights, and of their products when they are used; an autoencoder's stay float32.

    Raises:
      FileNotFoundError: if nothing is there, or the tower is neither there nor a name on the hub.
      ValueError: before anything is written, listing all tensors that are missing, left over or of another shape; for
        damaged files, pickles and settings that no network here has; for a whole model without a tower.
    """
    if tower:
        mapping.check_place(tower)
    folder = mapping.folder_of(place)
    alone = _is_autoencoder(folder)
    coder_at = autoencoder or (folder if alone or (folder / "vae").is_dir() else None)
    problems: list[str] = []

    def tried(open: Callable[[epath.Path], Opened], where: epath.Path) -> Opened | None:
        try:
            return open(where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            return None

    opened = {} if alone else {name: tried(wan.opened, at) for name, at in wan.folders_of(folder).items()}
    coder = None if coder_at is None else tried(wan_autoencoder.opened, mapping.folder_of(coder_at))
    sources = {name: source for name, source in opened.items() if source is not None}
    problems += _apart({name: source.dit for name, source in sources.items()}, coder)
    towers = {"text": tower or _if_there(folder / "text_encoder"), "image": _if_there(folder / "image_encoder")}
    if sources and coder and not towers["text"]:
        problems.append(
            f"{folder}: found no text_encoder/; name the folder of the UMT5 that reads its prompts by `--tower`, e.g. "
            "the text_encoder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, which all Wan models share."
        )
    if problems:
        raise ValueError("\n".join(problems))

    if sources and coder is None:
        warnings.warn(
            f"{folder}: no autoencoder comes with it, so what is written can be trained on and exported, not sampled. "
            "Its authors' is a pickle, which is never opened; name one of safetensors by `--vae`, e.g. the vae of "
            "diffusers' folder of the model.",
            stacklevel=2,
        )
    tensors = []
    for name, source in sources.items():
        shapes, part = nn.unbox(wan.shapes_of(source.dit)), weights.of_theirs(source.pairs, source.weights.read)
        tensors += weights.ours(shapes, part, prefix=f"{name}/", stacked=wan.STACKED)
    description: dict[str, Any] = {
        "kind": _KIND,
        "transformers": {n: wan.own_fields(s.dit) for n, s in sources.items()},
    }
    if coder is not None:
        for prefix, tree, part in (
            ("autoencoder/", wan_autoencoder.shapes(coder.model), coder.part),
            ("statistics/", coder.statistics, weights.of_tree(coder.statistics)),
        ):
            tensors += weights.ours(tree, part, prefix=prefix, dtype=jnp.float32)
        config = base.autoencoder()
        config.model.update({name: getattr(coder.model, name) for name in config.model})
        settings: ConfigDict = config
        if sources:
            settings = settings_of(
                [source.dit for source in sources.values()],
                coder.model,
                scheduler=mapping.told_in(folder / "scheduler" / "scheduler_config.json"),
                index=mapping.told_in(folder / "model_index.json"),
                towers=towers,
                dtype=dtype,
            )
            settings.autoencoder = str(target)
        description = {
            "kind": "dit" if sources else "autoencoder",
            "autoencoder": config.model.to_dict(),
            "config": settings.to_dict(),
        }
    digests = tensor_files.write(target, tensors, stem=epath.Path(WEIGHTS).stem, dtype=dtype, shard_bytes=sys.maxsize)
    if digests:
        description["sha256"] = digests[WEIGHTS]
        (epath.Path(target).expanduser() / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return description


def settings_of(
    dits: list[DiT],
    coder: Autoencoder,
    *,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
    towers: Mapping[str, epath.PathLike | None],
    dtype: jax.typing.DTypeLike,
) -> ConfigDict:
    """The config of a published model: what a training would have been given, and how it is sampled.

    Args:
      dits: one, or the two that take turns, that for much noise first.
      scheduler, index: scheduler_config.json and model_index.json; {} where there is none.
      towers: "text" and "image".
    """
    config, dit = base.dit(), dits[0]
    config.model.update({name: value for name, value in wan.own_fields(dit).items() if name in config.model})
    config.model.dtype = "bfloat16" if jnp.dtype(dtype) == jnp.bfloat16 else "float32"
    text, image = (str(towers[name] or "") for name in ("text", "image"))
    config.text.update(dict(tower=text, padding="zeros", max_tokens=512, width=dit.text_width))
    config.image.tower = image
    clip, config.data.fps = _CLIPS.get(coder.spatial, _CLIPS[8])
    config.data.buckets = ((*clip, 1, 1.0),)
    of_images = dit.extra_channels > 0
    usual = {(1, True): 3.0, (2, False): 12.0}.get((len(dits), of_images), 5.0)  # the authors', of such clips
    sampler, shift = _schedule(scheduler, usual)
    config.flow.shift = config.sample.shift = shift
    config.sample.update(dict(sampler=sampler, spacing=sampler, steps=50, guidance=5.0))
    if len(dits) == 2:
        boundary = index.get("boundary_ratio") or (0.9 if of_images else 0.875)
        high, low = (3.5, 3.5) if of_images else (4.0, 3.0)
        config.sample.update(dict(steps=40, guidance=high, guidance_low=low, boundary=boundary))
    return config


def _schedule(scheduler: Mapping[str, Any], usual: float) -> tuple[str, float]:
    """(sampler, shift) of a scheduler's config, without one the usual shift; a warning for what is not followed."""
    kind = scheduler.get("_class_name", _SCHEDULERS["unipc"])
    if kind == _SCHEDULERS["euler"]:
        return "euler", float(scheduler.get("shift", 1.0))
    other = {name: scheduler.get(name, default) for name, (default, _) in _FOLLOWED.items() if scheduler}
    other = {name: value for name, value in other.items() if value != _FOLLOWED[name][1]}
    if kind != _SCHEDULERS["unipc"] or other:
        warnings.warn(
            f"scheduler: {kind} with {other or 'its settings'} is not what samples here follow, UniPC of order 2 on "
            "flow sigmas; give `--sampler` and `--steps` that suit it.",
            stacklevel=4,
        )
    return "unipc", float(scheduler.get("flow_shift", 1.0 if scheduler else usual))


def _is_autoencoder(folder: epath.Path) -> bool:
    """Whether a folder is an autoencoder's own, or holds nothing but one."""
    if folder.is_file():
        return True
    if (folder / "config.json").exists():
        return "base_dim" in mapping.settings(folder) or "z_dim" in mapping.settings(folder)
    inside = {path.name for path in folder.iterdir()}
    if inside & {"transformer", *wan.TURNS["original"]}:
        return False
    return "vae" in inside or any(name.endswith(".safetensors") for name in inside)


def _apart(dits: Mapping[str, DiT], coder: wan_autoencoder.Opened | None) -> list[str]:
    """Why these are not parts of one model."""
    problems = []
    if len(set(dits.values())) > 1:
        problems.append(f"transformers of two shapes: {' and '.join(map(str, map(wan.own_fields, dits.values())))}.")
    for name, dit in dits.items():
        if coder is not None and dit.latent_channels != coder.model.latent_channels:
            problems.append(
                f"{name} has latents of {dit.latent_channels} channels, expected {coder.model.latent_channels}, which "
                "the autoencoder has; name that model's own."
            )
    return problems


def _if_there(folder: epath.Path) -> str:
    return str(epath.Path(folder).absolute()) if folder.is_dir() else ""


# ---- out ------------------------------------------------------------------------------------------------------------


def held(place: epath.PathLike) -> Held:
    """What a folder of ours holds of a Wan model, for `weights.fill` and for giving back.

    Args:
      place: what `bring` wrote, or a training: its run, or the model that it exported. Of a training of one of two
        networks that take turns, the other is of the model that it started from.

    Raises:
      FileNotFoundError: if files are missing.
      ValueError: if there is no such network, its files are damaged, or it was trained for another quantity than the
        velocity from data to noise on straight paths, which is what Wan's formats mean.
    """
    folder = pipeline.model_folder(place)
    description = describe_model(folder)
    kind, dits = description["kind"], {}
    file = weights.Weights(folder / WEIGHTS)
    if kind == _KIND:
        dits = {
            name: DiT(**fields | {"patch": tuple(fields["patch"])})
            for name, fields in description["transformers"].items()
        }
    elif kind == "dit":
        names = sorted({name.split("/")[0] for name in file.shapes} & {"dit", *wan.TURNS["original"].values()})
        dits = dict.fromkeys(names, _trained(folder, description))
    elif kind != "autoencoder":
        hint = " Merge adapters into their model first: `stvdm lora merge`." if kind == "lora" else ""
        raise ValueError(f"{folder}: a model of kind {kind!r}, expected 'dit', 'autoencoder' or {_KIND!r}.{hint}")
    coder = None
    if "autoencoder" in description:
        statistics = {name: file.read(f"statistics/{name}") for name in ("mean_z", "std_z")}
        model = pipeline.autoencoder_of(description["autoencoder"])
        coder = Coder(model, weights.of_file(file, "autoencoder/"), statistics)
    parts = {name: (dit, weights.of_file(file, f"{name}/")) for name, dit in dits.items()}
    if kind == "dit" and (turn := description["config"].get("turn")) and "dit" in parts:
        other = held(description["config"]["start_from"]).transformers
        parts = {**other, f"dit_{turn}": parts["dit"]}
    return Held(parts, coder, description)


def _trained(folder: epath.Path, description: Mapping[str, Any]) -> DiT:
    settings = description["config"]
    flow, model = settings["flow"], dict(settings["model"])
    if model.get("network", "dit") != "dit":
        raise ValueError(f"{folder}: its network is a {model['network']!r}, expected a 'dit'.")
    if (flow["path"], flow["prediction"]) != ("rectified", "velocity"):
        raise ValueError(
            f"{folder}: flow.path={flow['path']!r} and flow.prediction={flow['prediction']!r}, but what reads Wan's "
            "formats expects 'rectified' and 'velocity'; train on with these."
        )
    latent_channels = pipeline.autoencoder_of(description["autoencoder"]).latent_channels
    plain = {**settings, "model": model | {"matmul": ""}}  # how products are rounded is no part of the weights
    return pipeline.build(plain, latent_channels=latent_channels).dit


def give(
    place: epath.PathLike,
    target: epath.PathLike,
    to: wan.Format,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    shard_bytes: int = tensor_files.SHARD_BYTES,
    params: Tree | None = None,
) -> list[str]:
    """Writes a folder of ours as that format has it: the inverse of `bring`; returns the folders of networks.

    For diffusers: ``transformer``, ``vae``, ``scheduler`` and model_index.json, which ``WanPipeline`` loads. In the
    authors' format: one transformer in ``target`` itself, and the autoencoder in ``vae`` under their names. An
    autoencoder that has not Wan's shape is left out, with a warning, and a text encoder that is no tower. README.md
    says what it was made from.

    Args:
      dtype: of the transformers' weights; an autoencoder's stay float32.
      params: {"dit"}: those of the transformer that was trained, in place of those in the folder.

    Raises:
      FileNotFoundError, ValueError: as `held` and `wan.config_of`; ValueError if weights lie in ``target`` that this
        does not write over.
    """
    model, out = held(place), epath.Path(target).expanduser()
    named = {"dit": "transformer" if to == "diffusers" else "."} | {ours: name for name, ours in wan.TURNS[to].items()}
    for dit, _ in model.transformers.values():
        wan.config_of(dit, to)  # refused before anything is written
    coder = model.autoencoder
    if coder is not None:
        try:
            wan_autoencoder.config_of(coder.model, coder.statistics)
        except ValueError as error:
            warnings.warn(f"the autoencoder is left out: {error}", stacklevel=2)
            coder = None
    stems = {named[name]: wan.STEM for name in model.transformers}
    _refuse_others(out, stems if coder is None else {**stems, "vae": wan_autoencoder.stem_of(coder.model, to)})
    if model.description["kind"] == "dit" and not model.description["config"]["text"].get("tower"):
        warnings.warn("the text encoder that was trained along is left out: the format has no place", stacklevel=2)
    folders = []
    for name, (dit, part) in model.transformers.items():
        if params is not None and name in ("dit", f"dit_{model.description['config'].get('turn')}"):
            part = weights.of_tree(params["dit"])
        folders.append(str(out / named[name]))
        wan.save(folders[-1], dit, part, to, dtype=dtype, shard_bytes=shard_bytes)
    if coder is not None:
        wan_autoencoder.save(out / "vae", coder.model, coder.part, coder.statistics, to)
        folders.append(str(out / "vae"))
    if jax.process_index() == 0:
        whole = bool(model.transformers) and coder is not None
        if whole and coder is not None and to == "diffusers":
            settings = model.description["config"]
            latent_thw = coder.model.latent_shape(pipeline.largest_clip(settings), settings["model"]["patch"])
            shift = settings["sample"]["shift"] or pipeline.shift_of(latent_thw, coder.model, settings)
            settings = {**settings, "sample": {**settings["sample"], "shift": shift}}
            own, there = settings["sample"], _sampler_there(settings)
            if left := [f"sample.{key}={own[key]!r}" for key in ("sampler", "spacing") if own[key] != there]:
                warnings.warn(
                    f"{' and '.join(left)} stays behind: the scheduler is written as {_SCHEDULERS[there]}, so clips "
                    f"made there are not those made here, unless these are made with {there!r} too.",
                    stacklevel=2,
                )
            for name, content in (
                ("scheduler/scheduler_config.json", scheduler_of(settings)),
                ("model_index.json", index_of(list(model.transformers.values()), settings)),
            ):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text(json.dumps(content, indent=2) + "\n")
        (out / "README.md").write_text(card_of(place, model, to, folders, whole=whole))
    return folders


def _refuse_others(out: epath.Path, stems: Mapping[str, str]) -> None:
    """Raises ValueError for weights where loaders look, but for those of these stems, by folder."""
    for name in (".", "transformer", "vae", *wan.TURNS["diffusers"], *wan.TURNS["original"]):
        there = (out / name).iterdir() if (out / name).is_dir() else ()
        found = sorted(path.name for path in there if ".safetensors" in path.name)
        if others := [file for file in found if name not in stems or not file.startswith(stems[name])]:
            raise ValueError(
                f"{out / name}: holds {', '.join(others)}, which this does not write over, and loaders would take it "
                "for a part of what is written; name another folder, or move what is there."
            )


def scheduler_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of a config's ``sample``, whose shift is a number: not 0, by token count."""
    there, shift = _sampler_there(settings), settings["sample"]["shift"]
    if there == "euler":
        return {"_class_name": _SCHEDULERS[there], "num_train_timesteps": 1000, "shift": shift}
    followed = {name: value for name, (_, value) in _FOLLOWED.items()}
    return {"_class_name": _SCHEDULERS[there], "num_train_timesteps": 1000, "flow_shift": shift, **followed}


def _sampler_there(settings: Mapping[str, Any]) -> str:
    return "euler" if settings["sample"]["sampler"] == "euler" else "unipc"


def index_of(transformers: list[tuple[DiT, weights.Part]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json; of the towers, which are not in the folder, the classes that they are expected to be."""
    dit, two = transformers[0][0], len(transformers) == 2
    of_images = {"image_encoder": ("transformers", "CLIPVisionModel")} if dit.image_width else {}
    of_images |= {"image_processor": ("transformers", "CLIPImageProcessor")} if dit.image_width else {}
    kind = "WanImageToVideoPipeline" if dit.extra_channels else "WanPipeline"
    parts = {
        **of_images,
        "scheduler": ("diffusers", scheduler_of(settings)["_class_name"]),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "transformer_2": ("diffusers", "WanTransformer3DModel") if two else (None, None),
        "vae": ("diffusers", "AutoencoderKLWan"),
    }
    return {
        "_class_name": kind,
        **{name: list(where) for name, where in parts.items()},
        "boundary_ratio": (settings["sample"].get("boundary") or None) if two else None,
        "expand_timesteps": dit.latent_channels == 48,
    }


def card_of(place: epath.PathLike, model: Held, to: wan.Format, folders: list[str], *, whole: bool) -> str:
    """README.md: what it was made from, and how it is loaded. Its licence is for whoever gives it away to say."""
    about = model.description
    settings = about.get("config", {})
    tower = settings.get("text", {}).get("tower", "")
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        "license: # that of the weights it was made from binds this too: say which",
        "---",
        "",
        f"# {epath.Path(place).expanduser().absolute().name}",
        "",
        f"Weights of Wan's shape, in the format of {'diffusers' if to == 'diffusers' else 'their authors'}, written by "
        "`stvdm export`.",
        "",
        f"- made from: `{place}`, a model of kind `{about['kind']}`, sha256 `{about['sha256']}`",
    ]
    if settings.get("start_from"):
        lines.append(f"- trained on from: `{settings['start_from']}`, {settings['total_steps']} steps")
    if tower:
        lines.append(f"- read its prompts by: `{tower}`, which is not in this folder")
    if whole and to == "diffusers":
        sample, (T, H, W) = settings["sample"], pipeline.largest_clip(settings)
        index = index_of(list(model.transformers.values()), settings)
        kind, looks, begins = index["_class_name"], "image_encoder" in index, index["_class_name"] != "WanPipeline"
        classes = ["AutoTokenizer", *(["CLIPImageProcessor", "CLIPVisionModel"] if looks else []), "UMT5EncoderModel"]
        low = f", guidance_scale_2={sample['guidance_low'] or sample['guidance']}" if index["boundary_ratio"] else ""
        lines += [
            "",
            "```python",
            "import torch",
            f"from diffusers import {kind}",
            *(["from diffusers.utils import load_image"] if begins else []),
            f"from transformers import {', '.join(classes)}",
            "",
            'tower, words = "text_encoder", "tokenizer"  # of the model that it was made from',
            *(['looks, cuts = "image_encoder", "image_processor"  # likewise'] if looks else []),
            f"pipe = {kind}.from_pretrained(",
            '    ".",',
            "    text_encoder=UMT5EncoderModel.from_pretrained(tower, torch_dtype=torch.bfloat16),",
            "    tokenizer=AutoTokenizer.from_pretrained(words),",
            *(["    image_encoder=CLIPVisionModel.from_pretrained(looks),"] if looks else []),
            *(["    image_processor=CLIPImageProcessor.from_pretrained(cuts),"] if looks else []),
            "    torch_dtype=torch.bfloat16,",
            ")",
            f"frames = pipe({'image=load_image(IMAGE), ' if begins else ''}prompt=PROMPT,",
            f"              num_frames={T}, height={H}, width={W}, num_inference_steps={sample['steps']},",
            f"              guidance_scale={sample['guidance']}{low}).frames[0]",
            "```",
        ]
    lines += ["", "Config it was trained or published with:", "", "```json"]
    return "\n".join([*lines, json.dumps(settings or about.get("transformers"), indent=1), "```", ""])
