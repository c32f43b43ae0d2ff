# SPDX-License-Identifier: Apache-2.0
"""The ladder of imports: a file imports only from files above it in this list; `diffusion` knows no model, no data."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LADDER = """
    shapes
    sharding
    config
    tensor_files
    checkpoint
    models.linear
    models.lora
    models.patterns
    models.attention_kernels
    models.context_parallel
    models.attention
    models.embeddings
    models.block
    models.dit
    models.quantized
    models.causal_conv
    models.unet
    models.tiling
    models.autoencoder3d
    models.text_encoders
    models.tokenizers
    models.transformer
    models.t5
    models.clip
    models.videomae
    models.i3d
    models.lpips
    models.critics
    models.video_features
    interop.mapping
    interop.weights
    interop.wan_autoencoder
    interop.towers
    interop.judges
    interop.lora
    diffusion.flow
    diffusion.schedules
    diffusion.guidance
    diffusion.samplers
    data.kinetic_scene
    data.kinetic_shapes
    data.kinetic_shapes_tfds
    data.transforms
    data.video
    data.folder
    data.records
    data.buckets
    data.loader
    preprocess
    sampling.first_frame
    sampling.denoising
    sampling.pipeline
    sampling.inspection
    sampling.attention_page
    interop.wan
    interop.wan_model
    interop.stablehlo
    evaluation.result_file
    evaluation.metrics
    evaluation.tracking
    evaluation.physics
    evaluation.comparison
    evaluation.distributions
    evaluation.vbench
    evaluation.block_matching
    evaluation.damage
    evaluation.instruments
    evaluation.agreement
    evaluation.published
    evaluation.run
    planning.chips
    planning.cache
    planning.report
    planning.flops
    train.compiler_flags
    train.supervisor
    train.split_weights
    train.state
    train.preemption
    train.telemetry
    train.autoencoder
    train.batches
    train.dit
    train.features
    planning.collectives
    planning.plan
    planning.search
    planning.planner
    ablations.edits
    ablations.questions
    ablations.cost
    ablations.results
    ablations.verdicts
    ablations.shelf
    ablations.cells
    ablations.report
    commands.parts
    commands.generate
    commands.train
    commands.supervise
    commands.preprocess
    commands.lora
    commands.evaluate
    commands.ablate
    commands.plan
    commands.data
    commands.import_weights
    commands.export_weights
    cli
""".split()
FORBIDDEN = {"diffusion": ("models", "data"), "shapes": ("",)}  # what may not be imported, beyond the ladder


def module_name(path: Path) -> str:
    """stvdm/models/dit.py -> "models.dit"; a package's __init__.py has the package's name."""
    parts = path.relative_to(ROOT / "stvdm").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "stvdm").rglob("*.py"))}


def imported(source: str, module: str) -> set[str]:
    """The modules of stvdm that a source imports, at its top or inside its functions."""
    found = set()
    package = ["stvdm", *module.split(".")[:-1]] if module else ["stvdm"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in (
                node.names
            ):  # `from stvdm.models import dit` imports a module, `from stvdm.models.dit import DiT` a name
                inner = f"{name}.{alias.name}".removeprefix("stvdm.")
                found.add(f"stvdm.{inner}" if inner in FILES else name)
    return {name.removeprefix("stvdm.") for name in found if name.startswith("stvdm.")}


def test_imports_are_found_in_every_spelling():
    source = """
import stvdm.shapes
import numpy as np
from stvdm import config, __version__
from stvdm.models import dit as transformer
from stvdm.models.dit import DiT
from . import attention
from ..data import video
def f():
    from stvdm.train import state
"""
    assert imported(source, "models.embeddings") == {
        "shapes",
        "config",
        "models.dit",
        "models.attention",
        "data.video",
        "train.state",
    }


def test_every_file_is_a_rung_and_every_rung_a_file():
    assert sorted(LADDER) == [module for module, path in sorted(FILES.items()) if path.name != "__init__.py"]


@pytest.mark.parametrize("module", LADDER)
def test_imports_go_up(module):
    below = {
        name
        for name in imported(FILES[module].read_text("utf-8"), module)
        if name in LADDER and LADDER.index(name) >= LADDER.index(module)
    }
    assert not below, f"stvdm/{module} imports {sorted(below)}, which stand below it"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_some_know_nothing_of_others(package):
    for module in FILES:
        if module.split(".")[0] == package:
            names = imported(FILES[module].read_text("utf-8"), module)
            assert not [name for name in names if name.startswith(FORBIDDEN[package])], (
                f"stvdm/{module} imports {names}"
            )


def test_packages_import_nothing():
    """The lazy namespace of stvdm/__init__.py apart: importing one module must not bring its neighbours along."""
    for module, path in FILES.items():
        if module and path.name == "__init__.py":
            assert not imported(path.read_text("utf-8"), f"{module}.__init__"), path


def test_there_is_no_cycle():
    graph = {module: imported(path.read_text("utf-8"), module) for module, path in FILES.items() if module}
    graphlib.TopologicalSorter(graph).prepare()
