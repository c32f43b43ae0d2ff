# SPDX-License-Identifier: Apache-2.0
"""A small question, and results of it that nobody had to train for."""

import importlib.util
import pathlib

import pytest

from stvdm.ablations import edits, results
from stvdm.ablations.questions import Claim, Question, Sampling

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bases():
    """The bases of a size, from configs/ablation.py."""
    specification = importlib.util.spec_from_file_location("ablation", ROOT / "configs" / "ablation.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return lambda size: edits.Run(module.get_config(size), module.get_config(f"{size}_autoencoder"))


@pytest.fixture
def question():
    return Question(
        name="attention",
        asks="Does it help?",
        source="somebody",
        budget="steps",
        variants={"frame": edits.attend("frame"), "full": edits.as_it_is},
        samplings={"default": Sampling(), "diagonal": Sampling(world=(("motions", ("up_left",)),))},
        scores=("persistence", "flicker"),
        claims=(
            Claim("full", "frame", "persistence", "it holds together"),
            Claim("full@diagonal", "frame@diagonal", "flicker", "it flickers less", higher=False),
        ),
        limits="much",
    )


@pytest.fixture
def made_up(question):
    """(variant, seed, persistence, flicker) -> a result, the diagonal's a tenth above the default's."""

    def make(variant, seed, persistence, flicker, **changes):
        references = {"real": {"persistence": 1.0}, "reconstructed": {"persistence": 0.9}, "chance": {}}

        def sampling(plus):
            scores = {"persistence": persistence + plus, "flicker": flicker + plus}
            return {"scores": scores, "references": references, "not_reported": {}}

        steps = [[step, 1.0 / step + seed / 100] for step in (1, 10, 20)]
        return {
            "question": question.name,
            "size": "tiny",
            "variant": variant,
            "seed": seed,
            "conditions": {"device": "cpu", "versions.jax": "1", "evaluation.prompts": "eight", "dit.total_steps": 20},
            "edit": {"dit.model.attention": ["frame"]} if variant == "frame" else {},
            "samplings": {"default": sampling(0.0), "diagonal": sampling(0.1)},
            "curves": {"held-out error of the velocity": steps},
            "cost": {
                "seconds": {"training": 60.0, "evaluation": 30.0},
                "parameters": {"dit": 900_000, "text": 100_000, "autoencoder": 5},
                "tokens": 80,
                "flops_per_step": 2e9,
                "steps": 20,
            },
            "command": f"stvdm ablate attention --size=tiny --cell={variant}:{seed} --num=8",
            **changes,
        }

    return make


@pytest.fixture
def grid(made_up):
    """Three seeds of both variants: full holds together, frame does not; they flicker alike."""
    return [made_up("frame", seed, 0.2 + 0.02 * seed, 0.5 + 0.1 * seed) for seed in range(3)] + [
        made_up("full", seed, 0.7 - 0.03 * seed, 0.55 + 0.1 * seed) for seed in range(3)
    ]


@pytest.fixture
def written(grid, tmp_path):
    """The folder of those results."""
    folder = tmp_path / "attention" / "tiny"
    for result in grid:
        results.write(folder, result)
    return folder
