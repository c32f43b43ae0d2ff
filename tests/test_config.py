# SPDX-License-Identifier: Apache-2.0
"""A config that cannot run is refused whole, with every problem; every file in configs/ is a config that can."""

import importlib.util
import itertools
import math
import pathlib
import sys

import pytest

from stvdm import config as base
from stvdm.data.kinetic_shapes import World
from stvdm.models import dit
from stvdm.planning import report
from stvdm.sharding import MESH_AXES

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
    config.mesh.tensor = 4
    config.flow.prediction = "score"
    config.total_steps = 20
    with pytest.raises(ValueError, match="this config cannot run") as error:
        base.validate(config)
    message = str(error.value)
    for part in (
        "model.width=384: expected a multiple of model.num_heads=5",
        "model.attention='fulll': expected one of full, frame",
        "batch=3: expected a multiple",
        "model.num_heads=5: expected a multiple of mesh.tensor=4",
        "flow.prediction='score'",
        "expected fewer than total_steps=20, e.g. --config.optimizer.warmup_steps=2, or",
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
    config.sample.spacing, config.sample.boundary = "linear", 875.0
    config.image.tower_dtype = "int8"
    config.export_dtype = "float8"
    with pytest.raises(ValueError) as error:
        base.validate(config)
    for part in ("model.remat='most'", "model.attention=()", "data.buckets=()", "validation_share=0.0", "(0.9, 0.1)"):
        assert part in str(error.value)
    for part in ("sample.spacing='linear': expected one of even", "sample.boundary=875.0", "image.tower_dtype='int8'"):
        assert part in str(error.value)
    assert "export_dtype='float8': expected one of float32, bfloat16, float16" in str(error.value)


@pytest.mark.parametrize("value", [0, -1])
def test_what_would_fail_late_or_train_nothing_is_refused_before(value):
    config = base.autoencoder()
    config.eval_batches = config.keep_checkpoints = config.statistics_batches = value
    for clip_norm in (float(value), math.nan):
        config.optimizer.clip_norm = clip_norm
        with pytest.raises(ValueError) as error:
            base.validate(config)
        for key in ("eval_batches", "keep_checkpoints", "statistics_batches"):
            assert f"{key}={value}: expected a whole number of at least 1." in str(error.value)
        assert f"optimizer.clip_norm={clip_norm}: expected above 0 (1e9 clips nothing)." in str(error.value)


@pytest.mark.parametrize("value", [-1, math.nan])
def test_numbers_that_samples_and_clips_are_made_by_are_checked_before_the_first_of_them(value):
    config = base.dit()
    config.autoencoder = "runs/autoencoder"
    config.sample.steps = config.data.num_clips = 0
    config.data.num_workers = config.optimizer.warmup_steps = -1
    numbers = "sample.guidance sample.guidance_low sample.shift flow.shift data.fps".split()
    config.update_from_flattened_dict(dict.fromkeys(numbers, float(value)))
    with pytest.raises(ValueError) as error:
        base.validate(config)
    for name in (*numbers, "sample.steps", "data.num_clips", "data.num_workers", "optimizer.warmup_steps"):
        assert f"- {name}=" in str(error.value)


NOT_NUMBERS = {
    base.autoencoder: {
        "mesh.data": 0,
        "mesh.fsdp": -3,
        "seed": -1,
        "max_skipped": -1,
        "num_slices": 0,
        "optimizer.learning_rate": math.nan,
        "optimizer.accumulate": 0,
        "optimizer.weight_decay": -0.1,
        "optimizer.b2": 1.0,
        "loss.kl": math.inf,
        "model.width": 0,
        "model.unshuffle": 0,
        "model.latent_channels": -4,
        "model.multipliers": (1, 0, 4, 4),
        "data.buckets": ((17, 64, 64, 8, math.nan),),
    },
    base.dit: {
        "seed": 2**32,
        "optimizer.learning_rate": math.inf,
        "model.width": 0,
        "model.num_layers": 0,
        "model.num_heads": 0,
        "model.time_features": 7,
        "model.patch": (1, 2),
        "model.window": (1, -4, 4),
        "model.rope_theta": 0.0,
        "text.max_tokens": 0,
        "text.num_heads": 0,
        "flow.std": math.nan,
        "flow.mean": math.inf,
        "flow.times": (0.0, 0.5, 1.0),
        "sample.shift": math.inf,
        "data.buckets": ((17, 64, 64, "8", 1.0),),
    },
    base.unet: {"model.width": 0, "model.num_heads": 0, "model.num_blocks": -1, "model.patch": ()},
}


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(kind, *item) for kind, keys in NOT_NUMBERS.items() for item in keys.items()]
)
def test_numbers_that_mean_nothing_are_refused_alone_and_beside_others(kind, key, value):
    config = kind().unlock()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"- {key}=.*: expected "):
        base.validate(config)
    config.update_from_flattened_dict(NOT_NUMBERS[kind])
    with pytest.raises(ValueError) as error:
        base.validate(config)
    assert all(f"- {name}=" in str(error.value) for name in NOT_NUMBERS[kind])


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_every_number_of_a_config_is_looked_at(kind):
    """Of a key that is added: what is expected of it stands in the table."""
    config, kinds = kind().unlock(), (int, float)
    numbers = [
        key
        for key, value in base.flat(config).items()
        if type(value) in kinds or (isinstance(value, tuple) and value and type(value[0]) in (*kinds, tuple))
    ]
    config.update_from_flattened_dict(dict.fromkeys(numbers))
    with pytest.raises(ValueError) as error:
        base.validate(config)
    assert not [key for key in numbers if f"- {key}=None: " not in str(error.value)]


def test_ways_of_telling_time_and_text_that_do_not_go_together_are_refused():
    config = base.dit()
    config.autoencoder = "somewhere"
    for text_path, time_path in itertools.product(dit.TEXT_PATHS, dit.TIME_PATHS):
        config.model.text_path, config.model.time_path = text_path, time_path
        if time_path == "cross_attention" and text_path != "cross":
            with pytest.raises(ValueError, match=f"text_path='{text_path}' has no cross-attention; use .*in_context"):
                base.validate(config)
        else:
            base.validate(config)
    config.model.text_path, config.model.time_path = "double", "adaln_one"
    with pytest.raises(
        ValueError, match=r"expected one of cross, joint, dual(.|\n)*expected one of adaln_zero, adaln, in"
    ):
        base.validate(config)


@pytest.mark.parametrize("buckets", [(17, 64, 64, 32, 1.0), ((17, 64, 64, 32),), ((17, 64, 64, 32, 1.0), 9)])
def test_buckets_are_a_tuple_of_tuples(buckets):
    """A single one without a comma behind it is five numbers."""
    config = base.autoencoder()
    config.data.buckets = buckets
    with pytest.raises(ValueError, match=r"data.buckets=\(.*: expected entries .* comma behind it, as \(\(17, "):
        base.validate(config)


def test_clips_that_the_autoencoder_cannot_compress_are_refused():
    config = base.autoencoder()
    config.data.buckets = ((16, 64, 60, 8, 1.0),)
    with pytest.raises(ValueError, match="width=60"):
        base.validate(config)
    config.data.buckets = ((16, 64, 64, 8, 1.0),)
    with pytest.raises(ValueError, match=r"num_frames=16: .* 13 or 17"):
        base.validate(config)


def test_clips_in_a_bucket_are_to_be_mounted():
    config = base.autoencoder()
    config.data.update(dict(source="folder", path="gs://bucket/clips", validation_path="gs://bucket/held"))
    with pytest.raises(ValueError, match=r"data.path='gs://bucket/clips': .*gcsfuse(.|\n)*data.validation_path="):
        base.validate(config)


def test_a_typo_is_refused_with_the_near_match():
    with pytest.raises(AttributeError, match='Did you mean "width"'):
        base.dit().model.widht = 3


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batch_size", "data.buckets"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("model.depth", "model.num_layers"),
        ("model.hidden_size", "model.width"),
        ("epochs", "total_steps"),
    ],
)
def test_a_key_by_another_name_is_answered_with_ours(key, meant):
    with pytest.raises(ValueError, match=f"has no such key; did you mean {meant}\\?"):
        base.load(str(CONFIGS / "quickstart.py:dit"), [f"--config.{key}=1"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("total_steps=abc", "a whole number, as in "),
        ("total_steps=1.5", "a whole number, as in "),
        ("optimizer.learning_rate=fast", "a number, as in 0.001."),
        ("model.qk_norm=maybe", "true or false, as in True."),
        ("data.buckets=((5,16,16,2,1.0),", "values with commas between them, as in "),
        ("data.world=a: b", "values with commas between them, as in "),
        ("optimizer=3", "one of the keys in it, e.g. --config.optimizer.accumulate=1."),
        ("model=3", "one of the keys in it, e.g. --config.model.extra_channels=0."),
        ("total_steps", ""),
    ],
)
def test_a_value_of_another_kind_is_answered_with_what_its_key_holds(override, expected, config_file):
    said = f"--config.{override}: expected {expected}" if expected else f"Missing value for flag --config.{override}"
    with pytest.raises(ValueError) as refused:
        base.load(config_file, ["--config.seed=1", f"--config.{override}"])
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no attribute 'get_config'"),
        ("x = 1\ndef get_config(:", r"SyntaxError: invalid syntax \(a_config.py, line 2\)"),
        ("def get_config():\n    return {}['a']", "line 2: KeyError: 'a'"),
        ("from stvdm import config\ndef get_config():\n    config.dit().widht = 1", "line 3: AttributeError: .*widht"),
        ("import nowhere_to_be_found", "line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    open('nowhere')", "line 2: FileNotFoundError: .*nowhere"),
        ("def get_config():\n    return None", "expected get_config to return a base of stvdm.config"),
        ("def get_config():\n    return dict(kind='dit')", "expected get_config to return a base of stvdm.config"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_its_line(text, said, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # where ml_collections loads files
    (tmp_path / "a_config.py").write_text(text + "\n")
    with pytest.raises(ValueError, match=f"--config=.*a_config.py: .*{said}"):
        base.load(str(tmp_path / "a_config.py"))


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
    config = base.dit()
    config.autoencoder = config.start_from = "somewhere"
    config.lora.rank, config.optimizer.name = 8, "muon"
    with pytest.warns(UserWarning, match="optimizer.name='muon' has no effect: adapters"):
        base.validate(config)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid_in_every_variant(path):
    module = load(path)
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        base.validate(config)
        assert "stvdm" in module.__doc__  # a config says with which command it is used
        if world := dict(config.data.world):  # whose things keep to the frame for so long
            longest = max(num_frames for num_frames, *_ in config.data.buckets)
            assert (longest - 1) / config.data.fps <= World(**world).duration, variant


@pytest.mark.parametrize("name", ["pod_dit", "pod_autoencoder"])
def test_docstrings_and_table_tell_the_same_plans(name):
    lines = (CONFIGS / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): dict(zip(report.COLUMNS, row, strict=True)) for row in rows}
    module = load(CONFIGS / f"{name}.py")
    told = {line.split()[0]: line.split()[1:] for line in module.__doc__.splitlines() if " GiB " in line}
    assert "unproven" in module.__doc__.lower()
    assert list(told) == list(module.VARIANTS)
    for variant, (config, row) in ((v, (module.get_config(v), table[v])) for v in module.VARIANTS):
        expected = [*row["GiB a device"].split(), "GiB", *row["least step"].split(), row["MFU at that"]]
        assert told[variant] == expected
        assert config.topology in row["slice"]
        assert row["mesh"] == report.mesh_text({axis: config.mesh[axis] for axis in MESH_AXES})


def test_the_bundled_model_has_one_world():
    autoencoder, dit = (load(CONFIGS / f"{name}_kinetic.py") for name in ("autoencoder", "dit"))
    assert autoencoder.WORLD == dit.WORLD
