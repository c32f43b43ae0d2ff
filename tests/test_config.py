# SPDX-License-Identifier: Apache-2.0
"""A config that cannot run is refused whole, with every problem; every file in configs/ is a config that can."""

import importlib.util
import pathlib

import pytest

from stvdm import config as base

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_base_autoencoder_is_valid():
    base.validate(base.autoencoder())


def test_all_problems_are_reported_at_once():
    config = base.dit()
    config.model.num_heads = 5
    config.model.attention = ("full", "fulll")
    config.data.buckets = ((17, 64, 64, 3, 1.0),)
    config.mesh.data = 2
    config.flow.prediction = "score"
    with pytest.raises(ValueError, match="this config cannot run") as error:
        base.validate(config)
    message = str(error.value)
    for part in (
        "model.width=384: expected a multiple of model.num_heads=5",
        "model.attention='fulll': expected one of full, frame",
        "batch=3: expected a multiple",
        "flow.prediction='score'",
        "autoencoder='': name the folder",
    ):
        assert part in message


def test_choices_and_empty_lists_are_checked():
    config = base.dit()
    config.autoencoder = "runs/autoencoder"
    config.model.remat = "most"
    config.model.attention = ()
    config.data.buckets = ()
    config.data.validation_share = 0.0
    config.sample.guidance_interval = (0.9, 0.1)
    config.export_dtype = "float8"
    with pytest.raises(ValueError) as error:
        base.validate(config)
    for part in ("model.remat='most'", "model.attention=()", "data.buckets=()", "validation_share=0.0", "(0.9, 0.1)"):
        assert part in str(error.value)
    assert "export_dtype='float8': expected one of float32, bfloat16, float16" in str(error.value)


def test_clips_that_the_autoencoder_cannot_compress_are_refused():
    config = base.autoencoder()
    config.data.buckets = ((16, 64, 60, 8, 1.0),)
    with pytest.raises(ValueError, match="width=60"):
        base.validate(config)
    config.data.buckets = ((16, 64, 64, 8, 1.0),)
    with pytest.raises(ValueError, match=r"num_frames=16: .* 13 or 17"):
        base.validate(config)


def test_a_typo_is_refused_with_the_near_match():
    with pytest.raises(AttributeError, match='Did you mean "width"'):
        base.dit().model.widht = 3


def test_frame_by_frame_has_no_temporal_compression():
    config = base.autoencoder()
    assert base.compression(config.model) == dict(temporal=4, spatial=8, grouping="causal")
    config.model.grouping = "frame"
    assert base.compression(config.model) == dict(temporal=1, spatial=8, grouping="uniform")


def test_settings_without_effect_are_said():
    config = base.autoencoder()
    config.model.grouping = "frame"
    with pytest.warns(UserWarning, match="temporal_down.* has no effect"):
        base.validate(config)
    config = base.dit()
    config.autoencoder = "somewhere"
    config.flow.density, config.flow.mean = "uniform", 1.0
    config.sample.guidance, config.sample.guidance_rescale = 1.0, 0.5
    with pytest.warns(UserWarning, match="no effect") as said:
        base.validate(config)
    assert [str(warning.message).split(" ")[0] for warning in said] == ["flow.mean=1.0,", "sample.guidance_interval"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid_in_every_variant(path):
    module = load(path)
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        base.validate(config)
        assert "stvdm" in module.__doc__  # a config says with which command it is used


def test_the_bundled_model_has_one_world():
    autoencoder, dit = (load(CONFIGS / f"{name}_kinetic.py") for name in ("autoencoder", "dit"))
    assert autoencoder.WORLD == dit.WORLD
