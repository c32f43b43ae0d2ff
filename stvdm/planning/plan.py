# SPDX-License-Identifier: Apache-2.0
"""What a run costs and whether it fits, before anything is rented: by arithmetic, and by compiling the real step.

    video -> latent -> tokens;  parameters;  FLOPs of a step by part           `outline`: from shapes alone
    bytes per device, collectives by mesh axis, a bound on the step time       `compiled`: from the compiler's program

*Model FLOPs* are three times those of the forward pass (PaLM, arXiv:2204.02311, appendix B) and what utilisation is
measured by; the step itself does more: the optimiser's, and what is computed again in the backward pass.

Memory is what the compiler says. It refuses a program if the peak, arguments and all, is more than there is; the sum of
arguments and temporaries that it reports may be more, as buffers that loops pass on stand in it twice
(`tests/planning/test_plan.py` has a program of each kind). The peak is what is alive, and where it lies leaves gaps of
some hundredths: with nothing to spare, spare more.

The bound is a roofline: the step takes no less time than its arithmetic, its memory traffic or its communication would
alone, at the peaks of `CHIPS`. The arithmetic is that of the whole blocks of attention that a TPU's kernel computes,
not of the pairs that are seen (which model FLOPs are). The memory traffic is the state, the batch and what else goes
into the program and comes out of it, read and written once: activations and what is read twice are not in it. A real
step is slower. What remat "offload" sends to the host's memory is not in it: no peak of that link is published. Nothing
here has been compared with a real chip.

    report = make(config, autoencoder_settings, topology="v5p:4x4x4")        # JSON, which `report.as_text` reads
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvdm import config as base
from stvdm import shapes, sharding
from stvdm.models import attention_kernels
from stvdm.models.autoencoder3d import Autoencoder
from stvdm.models.patterns import Pattern
from stvdm.planning import chips
from stvdm.planning.chips import CHIPS, Topology
from stvdm.planning.collectives import BETWEEN_SLICES, Collective, collectives_of
from stvdm.planning.flops import count_flops
from stvdm.sampling import pipeline
from stvdm.train import autoencoder as train_autoencoder
from stvdm.train import batches
from stvdm.train import dit as train_dit
from stvdm.train import state as state_lib
from stvdm.train.compiler_flags import COMPILER_FLAGS, QUICK_FLAGS
from stvdm.train.state import Program

Tree = Any


def make(
    config: ConfigDict, autoencoder: Any, *, topology: str | None = None, num_slices: int = 1, quick: bool = False
) -> dict[str, Any]:
    """The plan of a run as JSON; with a topology the step is compiled for that.

    Args:
      config: of a training.
      autoencoder: the settings of its autoencoder, of which only the shapes matter.
      topology: e.g. "v5p:4x4x4"; see `chips.topology`.
      num_slices: equal slices of that topology.
      quick: compile with little effort; see `compiled`.
    """
    coder = pipeline.autoencoder_of(autoencoder)
    plan = outline(config, coder)
    if topology is None:
        return {**plan.to_json(), "compiled": None}
    where = chips.topology(topology, num_slices=num_slices)
    return {**plan.to_json(), "compiled": compiled(config, coder, where, plan, quick=quick).to_json()}


# ---- from shapes alone ----------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """What becomes of the clips of one bucket."""

    video: tuple[int, int, int]
    latent: tuple[int, int, int]
    grid: tuple[int, int, int]
    batch: int
    weight: float
    patterns: tuple[dict[str, Any], ...]  # of a transformer's attention: `_pairs` of each that it has
    other_grouping: dict[str, Any]  # `_other_grouping`

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class Outline:
    """What can be told of a run without compiling it."""

    kind: str
    clips: tuple[Clip, ...]
    latent_channels: int
    parameters: dict[str, int]  # by part
    step_flops: dict[str, float]  # of a whole step, all devices, by part; the first bucket; at the pairs that are seen
    block_flops: dict[str, float]  # the same at the pairs that a TPU's kernel computes
    model_flops: float
    state_bytes: int  # one copy of what a run keeps from step to step: weights that are trained, averages, moments
    frozen_bytes: int  # and of what it reads and leaves as it is

    def to_json(self) -> dict[str, Any]:
        clips = [
            {
                **clip._asdict(),
                "tokens": clip.tokens,
                "compression": shapes.compression_ratio(clip.video, clip.latent, latent_channels=self.latent_channels),
                "attention_pairs": {
                    name: shapes.attention_pairs(clip.grid, name) for name in ("full", "factorised", "block_causal")
                },
            }
            for clip in self.clips
        ]
        return {**dataclasses.asdict(self), "clips": clips}


def outline(config: ConfigDict, coder: Autoencoder) -> Outline:
    """The outline of a run with this config; ``coder`` is its autoencoder, of which only the shapes matter."""
    program, arguments = _program(config, coder, mesh=None)
    patch = tuple(config.model.patch) if config.kind == "dit" else (1, 1, 1)
    clips = []
    for T, H, W, batch, weight in config.data.buckets:
        latent = coder.latent_shape((T, H, W), patch)
        grid, other = shapes.token_grid(latent, patch), _other_grouping(coder, (T, H, W), patch)
        patterns = tuple(_pairs(pattern) for pattern in _patterns(config, grid))
        clips.append(Clip((T, H, W), latent, grid, batch, weight, patterns, other))
    params = jax.eval_shape(program.init)
    step = blocks = count_flops(program.step, *arguments)
    skipping = [pattern for pattern in _patterns(config, clips[0].grid) if not pattern.falls_apart]
    computed = {f"{pattern.share:.6f}": attention_kernels.share_computed(pattern) for pattern in skipping}
    if any(f"{share:.6f}" != seen for seen, share in computed.items()):
        blocks = count_flops(program.step, *arguments, computed=computed)
    return Outline(
        kind=config.kind,
        clips=tuple(clips),
        latent_channels=coder.latent_channels,
        parameters=parameters_by_part(params),
        step_flops=step,
        block_flops=blocks,
        model_flops=program.work(arguments[1])["flops"],
        state_bytes=_bytes(arguments[0]),
        frozen_bytes=_bytes(arguments[2:]),
    )


def _patterns(config: ConfigDict, grid: shapes.Size3) -> list[Pattern]:
    """Of a transformer's attention, each once."""
    if config.kind != "dit" or config.model.network != "dit":
        return []
    return [Pattern(kind, grid, tuple(config.model.window)) for kind in dict.fromkeys(config.model.attention)]


def _pairs(pattern: Pattern) -> dict[str, Any]:
    """A layer's pairs: of the tokens that see each other, and of the blocks that a TPU's kernel computes for them."""
    everything = pattern.num_tokens**2
    computed = round(attention_kernels.share_computed(pattern) * everything)
    return {"pattern": pattern.kind, "seen": round(pattern.share * everything), "computed": computed, "all": everything}


def _other_grouping(coder: Autoencoder, video: shapes.Size3, patch: shapes.Size3) -> dict[str, Any]:
    """What the other grouping of time would make of a clip that has, if need be, one frame more or less.

    The grid is None, and the tokens are, where the latent is no whole number of patches.
    """
    other: shapes.Grouping = "uniform" if coder.grouping == "causal" else "causal"
    frames, height, width = video
    if coder.temporal > 1:  # 4k + 1 frames are 4k, and 4k are 4k + 1
        frames = max(coder.temporal, frames - 1) if other == "uniform" else frames + 1
    video = (frames, height, width)
    latent = shapes.latent_shape(video, temporal=coder.temporal, spatial=coder.spatial, grouping=other)
    whole = all(size % p == 0 for size, p in zip(latent, patch, strict=True))
    grid = shapes.token_grid(latent, patch) if whole else None
    tokens = math.prod(grid) if grid else None
    return {"grouping": other, "video": video, "latent": latent, "grid": grid, "tokens": tokens}


def _bytes(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _program(config: ConfigDict, coder: Autoencoder, mesh: Mesh | None) -> tuple[Program, tuple[Any, ...]]:
    """The program of a run, and the arguments of its step as shapes, split over the mesh if there is one."""
    base.validate(config)
    T, H, W, batch, _ = config.data.buckets[0]
    rows: dict[str, tuple[tuple[int, ...], Any]] = {"video": ((T, H, W, 3), jnp.uint8)}
    frozen: tuple[Tree, ...] = ()
    if config.kind == "autoencoder":
        program = train_autoencoder.program(config)
    else:
        program = train_dit.program(config, coder)
        if config.data.source == "latents":
            rows = {"latent": ((*coder.latent_shape((T, H, W)), coder.latent_channels), jnp.float32)}
        S, has_tower = config.text.max_tokens, bool(config.text.tower)
        words = ((S, config.text.width), jnp.float32) if has_tower else ((S,), jnp.int32)
        rows |= {"tokens": words, "mask": ((S,), jnp.bool_), **batches.image_rows(config, coder, (T, H, W))}
        clip = jax.ShapeDtypeStruct((1, T, H, W, 3), jnp.float32)
        weights = jax.eval_shape(coder.init, jax.random.key(0), clip)["params"]
        scale = jax.ShapeDtypeStruct((coder.latent_channels,), jnp.float32)
        whole = {"autoencoder": nn.unbox(weights), "statistics": {"mean_z": scale, "std_z": scale}}
        null = {"null": batches.no_caption(config)} if has_tower else {}
        frozen = ({**batches.frozen_weights(config, whole), **null},)
    splits = (None, None) if mesh is None else (sharding.batch_sharding(mesh), sharding.replicated(mesh))
    examples = {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=splits[0]) for name, (shape, dtype) in rows.items()
    }
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=splits[1]), frozen)
    if config.kind == "dit" and config.lora.rank:
        frozen[0]["base"] = train_dit.base_shapes(config, coder, mesh or sharding.make_mesh())
    return program, (state_lib.abstract_state(program, mesh or sharding.make_mesh()), examples, *frozen)


def parameters_by_part(boxed: Tree) -> dict[str, int]:
    """How many parameters each part of a tree holds: its first two levels, blocks and all layers of a scan together."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed):
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        counts["/".join(names[: 2 if len(names) > 2 else 1])] += math.prod(leaf.shape)
    return dict(counts.most_common())


# ---- from the compiler's program ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the compiler says of a step. Bytes are per device, times in seconds; None is what it did not say."""

    topology: str
    num_slices: int
    num_devices: int
    mesh: dict[str, int]
    remat: str
    accumulate: int
    matmul: str  # "int8" or "fp8", if products are in eight bits
    quick: bool  # compiled with little effort
    fits: bool
    refusal: str  # what the compiler said, "" if it did not refuse
    limit_bytes: float
    needed_bytes: float | None  # the most that is alive at any one time: what the compiler compares with the limit
    argument_bytes: float | None
    temporary_bytes: float | None  # of the compiler's sum, in which some of a loop's buffers stand twice
    collectives: tuple[Collective, ...]
    model_flops: float  # per device
    # The least time of a step for each of these alone: arithmetic, of `Outline.block_flops`; memory, the state and the
    # batch read and written once, without activations; links; network.
    bounds: dict[str, float]
    chip: dict[str, Any]  # the peaks of a device, and where they are published
    compile_seconds: float
    compile_cpu_seconds: float  # of all threads: what stays the same on a busy machine

    @property
    def step_seconds(self) -> float:
        """No step is shorter than this."""
        return max(self.bounds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation of a step that takes no longer than the bound: a real one has less."""
        return self.model_flops / (self.step_seconds * self.chip["flops"])

    def to_json(self) -> dict[str, Any]:
        derived: dict[str, Any] = {}
        if self.needed_bytes is not None:
            derived["margin_bytes"] = self.limit_bytes - self.needed_bytes
        if self.fits:
            derived |= {"step_seconds": self.step_seconds, "utilisation": self.utilisation}
        return {**dataclasses.asdict(self), "collectives": [c._asdict() for c in self.collectives], **derived}


def compiled(config: ConfigDict, coder: Autoencoder, where: Topology, plan: Outline, *, quick: bool = False) -> Fit:
    """Compiles the training step of a config for a topology, with the flags that a run there has.

    Too little memory is an answer, not an error. With ``quick`` the compiler makes less of an effort than for a run: it
    takes half the time, and finds a schedule of a little more temporaries.
    """
    chip = CHIPS[where.chip]
    matmul = config.model.matmul if config.kind == "dit" else ""
    mesh = sharding.make_mesh(**config.mesh, devices=where.devices)
    program, arguments = _program(config, coder, mesh)
    started = time.perf_counter(), time.process_time()

    def spent() -> dict[str, Any]:
        return {
            "compile_seconds": time.perf_counter() - started[0],
            "compile_cpu_seconds": time.process_time() - started[1],
        }

    fit = Fit(
        topology=where.name,
        num_slices=where.num_slices,
        num_devices=len(where.devices),
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        remat=config.model.remat,
        accumulate=config.optimizer.accumulate,
        matmul=matmul,
        quick=quick,
        fits=False,
        refusal="",
        limit_bytes=chip.memory_gib * 2**30,
        needed_bytes=None,
        argument_bytes=None,
        temporary_bytes=None,
        collectives=(),
        model_flops=plan.model_flops / len(where.devices),
        bounds={},
        chip=chip._asdict(),
        compile_seconds=0.0,
        compile_cpu_seconds=0.0,
    )
    with jax.set_mesh(mesh), _effort(-1.0 if quick else 0.0):
        out = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
        lowered = jax.jit(program.step, donate_argnums=0, out_shardings=(out, None)).lower(*arguments)
        try:
            more = QUICK_FLAGS.get(where.chip, {}) if quick else {}
            program_here = lowered.compile(compiler_options={**COMPILER_FLAGS[where.chip], **more})
        except jax.errors.JaxRuntimeError as error:
            return dataclasses.replace(fit, **spent(), **refused(str(error)))
    memory: Any = program_here.memory_analysis()
    argument, output = float(memory.argument_size_in_bytes), float(memory.output_size_in_bytes)
    collectives = tuple(collectives_of(program_here.as_text() or "", mesh, num_slices=where.num_slices))
    network = sum(collective.bytes for collective in collectives if collective.kind == BETWEEN_SLICES)
    links = sum(collective.bytes for collective in collectives) - network
    return dataclasses.replace(
        fit,
        fits=bool(memory.peak_memory_in_bytes <= fit.limit_bytes),
        needed_bytes=float(memory.peak_memory_in_bytes),
        argument_bytes=argument,
        temporary_bytes=float(memory.temp_size_in_bytes),
        collectives=collectives,
        bounds={
            "arithmetic": chips.arithmetic_seconds(plan.block_flops, chip, matmul) / len(where.devices),
            "memory": (argument + output) / chip.memory_bandwidth,  # the state and the batch, once
            "links": links / chip.link_bandwidth,
            "network": network / chip.network_bandwidth,
        },
        **spent(),
    )


@contextlib.contextmanager
def _effort(effort: float) -> Iterator[None]:
    """How hard compilers try to make a quick program: from -1 over 0, as usual, to 1."""
    before = jax.config.jax_exec_time_optimization_effort  # type: ignore[attr-defined]
    jax.config.update("jax_exec_time_optimization_effort", effort)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


def refused(said: str) -> dict[str, Any]:
    """The fields of a `Fit` that a compiler's message of too little memory tells.

    Raises:
      ValueError: if the compiler refuses for another reason; the fast memory of a core, "vmem", is one.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if "RESOURCE_EXHAUSTED" in line and "vmem" not in line), None)
    if first is None:
        raise ValueError(f"the compiler refuses it, and not for want of memory: {' '.join(lines)[:400]}")
    fields: dict[str, Any] = {"refusal": first[:400]}
    size = r"([\d.]+)([KMGT])i?B?"
    found = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", said) or re.search(
        rf"Used {size} of {size} hbm", said
    )
    if found:
        needed, limit = (float(found[n]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[n + 1]] for n in (1, 3))
        fields |= {"needed_bytes": needed, "limit_bytes": limit}
    return fields
