# SPDX-License-Identifier: Apache-2.0
r"""Weights under foreign names into our trees: a table of names, and nothing lost in silence.

    rules = [(r"encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"layers/layer_\1/mlp_in/\2"), ...]
    params = into(shapes, read(folder), rules)

A rule is a regular expression for a whole foreign name, and our path for it; "" says that we have no use for it. Every
foreign tensor is used by one rule, and every parameter of ours is filled by one tensor; else all that is wrong is said
at once.

Of layout there is one convention to cross: PyTorch keeps kernels as (out, in, *space), Flax as (*space, in, out), so
what becomes a ``kernel`` is turned, and all else fits as it is. Last words follow from what we have there: ``weight``
is our ``kernel`` or ``scale``, ``running_mean`` and ``running_var`` are ``mean`` and ``var``.

Where weights also go back to where they came from, the table is read from our side, and says how each lies there:

    rules = [Rule(r"layers_(\d+)/mlp_in/kernel", r"blocks.\1.ffn.0.weight", KERNEL), ...]
    pairs = pairs_of(shapes, rules, stacked="layers")     # one foreign tensor each, and the parameter that it fills
    agree(pairs, foreign_shapes)                          # by names and shapes alone, before a byte is read

From a pair alone follow the foreign name and shape, and both directions; `interop.weights` reads and writes by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax import traverse_util

from stvdm.tensor_files import DTYPES, Shape, bytes_of, places_in, told_in

Tree = Any
Rules = Sequence[tuple[str, str]]

_LAST_WORDS = {"weight": ("kernel", "scale"), "running_mean": ("mean",), "running_var": ("var",)}
_FLOATS = [DTYPES[name] for name in ("F64", "F32", "F16", "BF16")]  # the rest are counters, which are no weights
_CONVERT = (  # what a user may run; some files hold the tensors one level down
    "import sys, torch; from safetensors.torch import save_file; "
    "found = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "found = found.get('model', found.get('module', found.get('state_dict', found))); "
    "save_file({k: v.clone().contiguous() for k, v in found.items() if hasattr(v, 'clone')}, sys.argv[2])"
)
_SIZES = frozenset(  # what config.json files of all kinds count in whole numbers
    "dim num_heads num_layers ffn_dim freq_dim text_dim in_dim out_dim num_attention_heads attention_head_dim "
    "in_channels num_hidden_layers hidden_size intermediate_size d_model d_kv d_ff base_dim z_dim".split()
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Layout(NamedTuple):
    """The same values as they lie there and here: two functions, each the other's inverse."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """What a parameter is called there, and how it lies."""

    ours: str  # a regular expression for our whole path
    theirs: str  # the foreign name, as `re.Match.expand` takes it
    layout: Layout


class Pair(NamedTuple):
    """One foreign tensor, and the parameter of ours that it fills, or the layer of one."""

    theirs: str
    shape: Shape  # as it lies there
    ours: str
    layer: int | None  # of a parameter that holds all layers; None: the tensor is the whole parameter
    layout: Layout


AS_IS = Layout(np.asarray, np.asarray)
KERNEL = Layout(lambda x: np.transpose(x, (*range(2, np.ndim(x)), 1, 0)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))
ROWS = Layout(lambda x: x[0], lambda x: x[None])  # they have one more dimension, of size 1, in front


def pairs_of(shapes: Tree, rules: Sequence[Rule], *, stacked: str = "") -> list[Pair]:
    """The foreign tensor of each parameter, in the order of our paths.

    Args:
      shapes: nested dicts of anything with a ``shape``.
      rules: of which the first that fits a path counts.
      stacked: the name of scanned layers: parameters of "layers/..." hold one for each layer, "layers_0/..." and so on
        to the rules.

    Raises:
      ValueError: naming all parameters that have no place there.
    """
    found, homeless = [], []
    for path, leaf in sorted(traverse_util.flatten_dict(shapes, sep="/").items()):
        for layer, alone, shape in layers_of(path, tuple(leaf.shape), stacked):
            match = next(((rule, m) for rule in rules if (m := re.fullmatch(rule.ours, alone))), None)
            if match is None:
                homeless.append(f"{alone} {shape}")
                continue
            rule, names = match
            theirs = rule.layout.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
            found.append(Pair(names.expand(rule.theirs), theirs, path, layer, rule.layout))
    if homeless:
        raise ValueError("the other format has no place for these parameters:\n  - " + "\n  - ".join(_folded(homeless)))
    return found


def layers_of(path: str, shape: Shape, stacked: str) -> list[tuple[int | None, str, Shape]]:
    """(layer, path, shape) of each layer that a parameter holds, as if it stood alone; itself if it is no stack."""
    first, _, rest = path.partition("/")
    if not stacked or first != stacked:
        return [(None, path, shape)]
    return [(layer, f"{stacked}_{layer}/{rest}", shape[1:]) for layer in range(shape[0])]


def agree(pairs: Sequence[Pair], found: Mapping[str, Shape], *, ignored: str = "") -> None:
    """Returns if the tensors found are exactly those of the pairs, in name and shape.

    Args:
      found: foreign name -> shape.
      ignored: a regular expression for whole names that may be there and are of no use.

    Raises:
      ValueError: listing all tensors that are missing, left over or of another shape; those that differ in a number
        alone stand in one line.
    """
    wanted = {pair.theirs: pair.shape for pair in pairs}
    problems = [f"{name} {shape}: missing" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{name} {shape}: left over" for name, shape in found.items() if name not in wanted and not _is(ignored, name)
    ]
    problems += [
        f"{name} {found[name]}: expected {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise ValueError(
            "these weights are not this model's, so see whether the config.json beside them is theirs:\n  - "
            + "\n  - ".join(_folded(problems))
        )


def into(shapes: Tree, source: Mapping[str, np.ndarray], rules: Rules, *, dtype: Any = np.float32) -> Tree:
    """The tensors of ``source`` as a tree of arrays in ``dtype``, of the names and shapes of ``shapes``.

    Args:
      shapes: nested dicts of anything with a ``shape``, e.g. of `jax.eval_shape`.
      source: foreign name -> array.
      rules: foreign name -> our path, joined by "/"; the first that fits counts.

    Raises:
      ValueError: naming tensors that no rule knows, that fit no parameter or one that has another, and parameters that
        nothing fills.
    """
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    found: dict[str, np.ndarray] = {}
    came_from: dict[str, str] = {}
    problems, doubtful = [], set()
    for name, array in source.items():
        meant = _renamed(name, rules)
        if meant is None:
            problems.append(f"{name} {np.shape(array)}: no rule knows it")
        elif meant:
            path = next((spelt for spelt in _spellings(meant) if spelt in wanted), None)
            value = turned(array) if path is not None and path.endswith("/kernel") else np.asarray(array)
            if path is None:
                problems.append(f"{name} {np.shape(array)}: the model has no {meant}")
            elif value.shape != tuple(wanted[path].shape):
                problems.append(f"{name}: {value.shape} for {path}, expected {tuple(wanted[path].shape)}")
                doubtful.add(path)
            elif path in found:
                problems.append(f"{name}: {path} has {came_from[path]} already")
            else:
                found[path], came_from[path] = value.astype(dtype, copy=False), name
    problems += [f"{path}: nothing fills it" for path in wanted if path not in found and path not in doubtful]
    if problems:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ValueError(
            "these weights are not this model's, so see whether the config.json beside them is theirs:\n  - "
            + "\n  - ".join(problems[:12] + more)
        )
    return traverse_util.unflatten_dict(found, sep="/")


def shapes_of(model: nn.Module, *inputs: jax.Array) -> Tree:
    """Shapes of all parameters of a network that is given these."""
    return nn.unbox(boxed_shapes_of(model, *inputs))


def boxed_shapes_of(model: nn.Module, *inputs: jax.Array) -> Tree:
    """The same with the logical names of their dimensions."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])


def turned(kernel: np.ndarray) -> np.ndarray:
    """(out, in, *space), as PyTorch keeps a kernel, to (*space, in, out)."""
    return np.ascontiguousarray(np.transpose(kernel, (*range(2, np.ndim(kernel)), 1, 0)))


def check_place(place: epath.PathLike) -> None:
    """Raises FileNotFoundError for what is neither there nor written as the hub's OWNER/NAME."""
    if not epath.Path(place).expanduser().exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise FileNotFoundError(f"{place}: expected a folder of safetensors, or the OWNER/NAME of one on the hub.")


def folder_of(place: epath.PathLike) -> epath.Path:
    """The folder of weights: ``place`` itself, or, if it is "owner/name" of the Hugging Face hub, what is brought here.

    Only safetensors and text are brought.

    Raises:
      FileNotFoundError: if it is neither.
      ImportError: if it would be brought, and huggingface_hub is not installed.
    """
    path = epath.Path(place).expanduser()
    if path.exists():
        return path
    check_place(place)
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{place}: there is no such folder, and to bring it from the hub takes huggingface_hub: "
            "pip install huggingface_hub, or stvdm's extra [hub]"
        ) from error
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model"]
    try:
        return epath.Path(huggingface_hub.snapshot_download(str(place), allow_patterns=wanted))
    except OSError as error:  # as all of the hub's are, of the network or for want of the name
        raise FileNotFoundError(f"{place}: there is no such folder, and the hub gave none: {error}") from error


def settings(folder: epath.PathLike) -> dict[str, Any]:
    """config.json of a folder; {} if there is none. Raises ValueError for one that can't be, also by its sizes."""
    path = epath.Path(folder) / "config.json"
    config = told_in(path)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _SIZES & section.keys():
            if not isinstance(section[name], int) or section[name] < 1:
                raise ValueError(f"{path}: {name}={section[name]!r}: expected a whole number of at least 1.")
    return config


def read(place: epath.PathLike) -> dict[str, np.ndarray]:
    """All weights of a safetensors file, or of all such files of a folder, by name.

    Raises:
      FileNotFoundError: if there are none.
      ValueError: for damaged files, or if there are only pickles, which can run any program when they are opened, and
        never are here.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in files_of(epath.Path(place).expanduser()):
        places = places_in(path)
        data = bytes_of(path)
        for name, (_, start, dtype, shape) in places.items():
            if dtype in _FLOATS:
                tensors[name] = data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return tensors


def files_of(source: epath.Path) -> list[epath.Path]:
    """The safetensors files of a folder, or the file itself; raises as `read` does."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) if source.exists() else []
    pickles = [path for path in (files or _files(source)) if path.suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{pickles[0]}: this is a pickle, which can run any program when it is opened, so it is not. Convert it "
            f'once, where PyTorch is:\n  python -c "{_CONVERT}" {pickles[0].name} model.safetensors'
        )
    if not files:
        raise FileNotFoundError(f"{source}: expected a .safetensors file, or a folder of them.")
    return files


def _folded(lines: Iterable[str]) -> list[str]:
    """Lines, where those that differ in their first number alone are one: "blocks.0-29.norm.weight (8,): missing"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        head, number, tail = re.match(r"(\D*)(\d*)(.*)", line.replace("\n", " ")).groups()  # type: ignore[union-attr]
        is_in_name = number and " " not in head
        numbers.setdefault((head, tail) if is_in_name else (line, ""), []).append(int(number) if is_in_name else -1)
    return [head + _ranges(found) + tail for (head, tail), found in numbers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"; [-1], of what has no number, as ""."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers) - {-1}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _is(pattern: str, name: str) -> bool:
    return bool(pattern) and re.fullmatch(pattern, name) is not None


def _files(folder: epath.Path) -> Iterable[epath.Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else ()


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, path in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(path)
    return None


def _spellings(path: str) -> Iterable[str]:
    """A path as it is, and with what its last word may mean here."""
    head, _, last = path.rpartition("/")
    return (path, *(f"{head}/{word}" if head else word for word in _LAST_WORDS.get(last, ())))
