# SPDX-License-Identifier: Apache-2.0
"""What a command line means: which function is called with what, what is written, what is refused and how."""

import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
from flax import linen as nn

from stvdm import cli

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="dit"):
    if variant not in ("dit", "autoencoder"):
        raise ValueError(f"variant={variant!r}: expected dit or autoencoder")
    config = ConfigDict()
    config.kind = variant
    config.overfit = False
    config.autoencoder = "runs/ae"
    config.model = ConfigDict(dict(width=64, patch=(1, 2, 2)))
    config.optimizer = ConfigDict(dict(learning_rate=1e-3))
    return config
"""


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module of these functions in the place of a module of the library."""

    def put(name, **functions):
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(sys.modules.get(parent) or __import__(parent, fromlist=["_"]), child, module, raising=False)

    return put


@pytest.fixture
def calls(stand_in):
    """Every function below the commands, replaced by one that notes its arguments."""
    noted = []

    def note(name):
        return lambda *args, **kwargs: noted.append((name, args, kwargs))

    stand_in("stvdm.train.autoencoder", main=note("autoencoder"))
    stand_in("stvdm.train.dit", main=note("dit"))
    stand_in("stvdm.evaluation.run", main=note("evaluate"))
    stand_in("stvdm.evaluation.agreement", main=note("damage"))
    return noted


def failure(capsys, *argv):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.fixture
def generated(stand_in):
    noted = {}

    class Pipeline:
        @classmethod
        def load(cls, checkpoint, **more):
            noted["checkpoint"], noted["more"] = checkpoint, more
            return cls()

        def generate(self, prompts, *, num, progress, **settings):
            noted["settings"] = settings
            warnings.warn("clips of another size", stacklevel=1)
            for done in range(1, 4):
                progress(done, 3)
            n = len(prompts) * num
            return types.SimpleNamespace(
                videos=np.zeros((n, 5, 16, 16, 3), np.uint8),
                latents=np.arange(n * 4, dtype=np.float32).reshape(n, 1, 2, 2, 1),
                prompts=[prompt for prompt in prompts for _ in range(num)],
                seeds=[settings["seed"] + i for _ in prompts for i in range(num)],
                settings={"fps": 8.0, "steps": np.int64(30), "model_sha256": "ab"},
            )

    stand_in("stvdm.sampling.pipeline", Pipeline=Pipeline)
    return noted


def test_generate_writes_clips_contact_sheet_and_what_makes_them_again(tmp_path, generated, capsys):
    command = ["generate", "A red ball!", "two", "--num", "2", "--seed", "7", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    stems = ["a-red-ball-7", "a-red-ball-8", "two-7", "two-8"]
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".mp4", ".gif", ".json")} | {"contact.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert generated["checkpoint"] is None  # the bundled one
    record = json.loads((tmp_path / "out" / "two-8.json").read_text())
    latent = np.arange(12, 16, dtype=np.float32)
    assert record["latent_sha256"] == hashlib.sha256(latent.tobytes()).hexdigest()
    assert (record["prompt"], record["seed"], record["steps"], record["model_sha256"]) == ("two", 8, 30, "ab")
    assert shlex.split(record["command"]) == ["stvdm", *command]
    assert {"jax", "stvdm", "python"} <= record["versions"].keys()
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "loading the model",
        "compiling",
        "stvdm: warning: clips of another size",
        "denoising 1/3",
        "denoising 3/3",
    ]
    assert captured.out.splitlines()[-1].endswith("contact.png")


def test_clips_of_one_name_do_not_overwrite_each_other():
    assert cli._stems(["a ball", "A ball!", "a ball", "?"], [0, 0, 0, 5]) == [
        "a-ball-0",
        "a-ball-0-2",
        "a-ball-0-3",
        "clip-5",
    ]


def test_generate_passes_its_options_on_and_leaves_the_rest_to_the_checkpoint(tmp_path, generated):
    words = "generate x --steps 5 --guidance 2.5 --sampler dpm++ --frames 9 --height 32 --checkpoint runs/dit --output"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    assert generated["checkpoint"] == "runs/dit"
    assert generated["settings"] == {
        "steps": 5,
        "guidance": 2.5,
        "sampler": "dpm++",
        "seed": 0,
        "num_frames": 9,
        "height": 32,
        "width": None,
    }


def test_a_refusal_of_the_library_is_one_line_and_status_2(stand_in, capsys):
    class Pipeline:
        @staticmethod
        def load(checkpoint, **more):
            raise FileNotFoundError(f"checkpoint={checkpoint}: expected a folder")

    stand_in("stvdm.sampling.pipeline", Pipeline=Pipeline)
    assert failure(capsys, "generate", "x", "--checkpoint", "nowhere").endswith(
        "stvdm: error: checkpoint=nowhere: expected a folder\n(`--debug` shows where)\n"
    )
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "x", "--checkpoint", "nowhere", "--debug"])


@pytest.mark.parametrize("words", ["--num 0", "--steps -1", "--frames 2.5", "--sampler rk4"])
def test_values_out_of_range_are_refused_before_anything_is_loaded(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "x", *words.split()])
    assert stopped.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_a_mistyped_flag_names_its_neighbour(capsys):
    assert "--guidence=2: no such argument; did you mean --guidance?" in failure(
        capsys, "generate", "x", "--guidence=2"
    )


# --------------------------------------------------------------------------------------------------------------- train


def test_train_reads_config_variant_and_overrides(config_file, calls):
    words = ["train", "dit", f"--config={config_file}:dit", "--workdir=w"]
    assert cli.main([*words, "--config.model.width=128", "--config.model.patch=(1,4,4)", "--overfit"]) == 0
    ((name, (config, workdir), _),) = calls
    assert (name, workdir) == ("dit", "w")
    assert (config.model.width, tuple(config.model.patch), config.overfit) == (128, (1, 4, 4), True)
    assert config.optimizer.learning_rate == 1e-3
    assert config.is_locked


def test_train_joins_the_other_processes_before_anything_else(config_file, calls, monkeypatch):
    from stvdm.train import supervisor

    monkeypatch.setattr(supervisor, "join", lambda: calls.append("join"))
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == 0
    assert calls[0] == "join" and calls[1][0] == "dit"


def test_supervise_passes_everything_on_and_leaves_with_its_status(stand_in):
    noted = []
    stand_in("stvdm.train.supervisor", supervise=lambda *args, **kwargs: noted.append((args, kwargs)) or 75)
    command = ["stvdm", "train", "dit", "--config=c.py", "--config.a.b=1", "--", "x"]
    assert cli.main([*"supervise --processes=2 --timeout-s 60 --max-failures=3 --".split(), *command]) == 75
    assert noted == [
        ((command,), {"processes": 2, "chip": None, "timeout": 60, "grace": 120, "max_failures": 3}),
    ]


def test_train_autoencoder_goes_to_its_trainer(config_file, calls):
    assert cli.main(["train", "autoencoder", f"--config={config_file}:autoencoder", "--workdir=w"]) == 0
    assert calls[0][0] == "autoencoder"


def test_a_config_of_the_other_kind_is_refused(config_file, calls, capsys):
    error = failure(capsys, "train", "autoencoder", f"--config={config_file}:dit", "--workdir=w")
    assert "this config is for 'dit': expected one for 'autoencoder'" in error and "stvdm train dit" in error
    assert not calls


@pytest.mark.parametrize(
    "override, said",
    [
        ("--config.model.widht=128", "has no such key; did you mean model.width?"),
        ("--config.learning_rate=1", "has no such key; did you mean optimizer.learning_rate?"),
        ("--config.model.width=wide", "--config.model.width"),
        ("--config.model.width", "expected --config.model.width=VALUE"),
        ("--workdri=x", "did you mean --workdir?"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(config_file, calls, capsys, override, said):
    assert said in failure(capsys, "train", "dit", f"--config={config_file}", "--workdir=w", override)
    assert not calls


def test_an_unknown_variant_is_refused_in_the_words_of_the_config(config_file, calls, capsys):
    error = failure(capsys, "train", "dit", f"--config={config_file}:huge", "--workdir=w")
    assert "variant='huge': expected dit or autoencoder" in error and "File" not in error


def test_a_missing_config_file_is_named(calls, capsys):
    assert "there is no file configs/nope.py" in failure(
        capsys, "train", "dit", "--config=configs/nope.py", "--workdir=w"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such thing"), 2),
        (FileNotFoundError("no such file"), 2),
        (OSError("no route to the disk"), 1),
        (FloatingPointError("not finite"), 65),
    ],
)
def test_the_status_says_whether_it_is_worth_another_try(config_file, stand_in, capsys, error, status):
    def main(config, workdir):
        raise error

    stand_in("stvdm.train.dit", main=main)
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == status
    assert str(error) in capsys.readouterr().err


def test_a_config_that_cannot_run_says_so_without_a_traceback(config_file, stand_in, capsys):
    def main(config, workdir):
        raise ValueError("this config cannot run:\n  - a\n  - b")

    stand_in("stvdm.train.dit", main=main)
    error = failure(capsys, "train", "dit", f"--config={config_file}", "--workdir=w")
    assert error.startswith("stvdm: error: this config cannot run:\n  - a\n  - b\n")


def test_interrupting_is_not_an_error(config_file, stand_in, capsys):
    def main(config, workdir):
        raise KeyboardInterrupt

    stand_in("stvdm.train.dit", main=main)
    assert cli.main(["train", "dit", f"--config={config_file}", "--workdir=w"]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- preprocess


def test_preprocess_writes_the_latents_that_the_autoencoder_makes(tmp_path, capsys):
    import jax

    from stvdm import checkpoint
    from stvdm.data import loader, records
    from stvdm.models.autoencoder3d import Autoencoder

    (tmp_path / "config.py").write_text(
        "from stvdm import config as base\n"
        "def get_config():\n"
        "    config = base.dit()\n"
        "    config.data.num_clips = 3\n"
        "    config.data.buckets = ((5, 16, 16, 8, 1.0),)\n"
        "    return config\n"
    )
    settings = {
        "latent_channels": 4,
        "width": 8,
        "multipliers": [1, 1],
        "num_res_blocks": 1,
        "spatial_down": [True],
        "temporal_down": [True],
        "middle_attention": False,
    }
    model = Autoencoder(**settings)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 5, 16, 16, 3), np.float32)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    checkpoint.save_model(
        tmp_path / "run" / "model", {"autoencoder": params}, {"kind": "autoencoder", "autoencoder": settings}
    )
    words = ["preprocess", f"--config={tmp_path}/config.py", f"--out={tmp_path}/latents", "--batch=2"]
    assert cli.main([*words, f"--checkpoint={tmp_path}/run", "--config.seed=3"]) == 0
    assert "encoding 3/3" in capsys.readouterr().err

    source = loader.open_source("kinetic_shapes", num_clips=3, seed=3)
    written = records.RecordSource(tmp_path / "latents")
    assert len(written) == 3
    latents = {written.read(i)["caption"]: written.read(i)["latent"] for i in range(3)}
    clips = [source.read(i, num_frames=5, height=16, width=16, rng=np.random.default_rng(0)) for i in range(3)]
    videos = np.stack([clip["video"] for clip in clips]).astype(np.float32) / 127.5 - 1
    means, _ = jax.jit(lambda video: model.apply({"params": params}, video, method="encode"))(videos)
    for clip, mean in zip(clips, means, strict=True):
        np.testing.assert_allclose(latents[clip["caption"]], mean, rtol=1e-2, atol=1e-2)


def test_preprocess_without_an_autoencoder_is_refused(config_file, capsys):
    error = failure(capsys, "preprocess", f"--config={config_file}:autoencoder", "--out=latents")
    assert "expected the folder of a trained autoencoder" in error


def test_preprocess_takes_the_autoencoder_of_the_config(config_file, capsys):
    assert "runs/ae: expected an exported model" in failure(
        capsys, "preprocess", f"--config={config_file}", "--out=latents"
    )


def test_hosts_are_counted_from_0(config_file, capsys):
    for said in ("2/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            cli.main(["preprocess", f"--config={config_file}", "--out=latents", f"--host={said}"])
        assert f"{said!r}: expected I/N with I from 0 to N - 1, e.g. 0/4" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- lora


def test_generate_takes_several_adapters_with_weights_and_a_tower(generated, tmp_path):
    words = ["generate", "x", f"--output={tmp_path}", "--lora=runs/a:0.5", "--lora=gs://b/c", "--tower=umt5"]
    assert cli.main(words) == 0
    assert generated["more"] == {"adapters": [("runs/a", 0.5), ("gs://b/c", 1.0)], "tower": "umt5"}


def test_adapters_go_out_and_come_in_and_melt_into_weights(tiny_model, tmp_path, capsys):
    import jax

    from stvdm import checkpoint
    from stvdm.models import lora

    base, description = checkpoint.load_model(tiny_model)
    kernel = base["dit"]["layers"]["block_0"]["mlp_in"]["kernel"]
    rng = np.random.default_rng(0)
    halves = {
        "down": rng.normal(size=(*kernel.shape[:2], 3)).astype(np.float32),
        "up": rng.normal(size=(kernel.shape[0], 3, kernel.shape[2])).astype(np.float32),
    }
    trained = {"dit": {"layers": {"block_0": {"mlp_in": halves}}}}
    about = {name: description[name] for name in ("autoencoder", "config")}
    about |= {"kind": "lora", "base": str(tiny_model), "base_sha256": description["sha256"]}
    checkpoint.save_model(tmp_path / "run" / "model", trained, about)
    assert cli.main(["lora", "export", f"--from={tmp_path}/run", f"--to={tmp_path}/style.safetensors"]) == 0
    words = ["lora", "import", f"--from={tmp_path}/style.safetensors", f"--base={tiny_model}", f"--to={tmp_path}/back"]
    assert cli.main(words) == 0
    read, said = checkpoint.load_model(tmp_path / "back")
    assert said == about | {"sha256": said["sha256"]}
    jax.tree.map(np.testing.assert_array_equal, read, trained)
    words = ["lora", "merge", f"--base={tiny_model}", f"--lora={tmp_path}/back:0.5", f"--to={tmp_path}/merged"]
    assert cli.main(words) == 0
    merged, said = checkpoint.load_model(tmp_path / "merged")
    assert said["kind"] == "dit"
    expected = lora.merged({"dit": base["dit"]}, [(trained, 0.5)])
    jax.tree.map(np.testing.assert_array_equal, merged["dit"], expected["dit"])
    jax.tree.map(np.testing.assert_array_equal, merged["autoencoder"], base["autoencoder"])
    assert "expected adapters, 'lora'" in failure(capsys, "lora", "export", f"--from={tiny_model}", "--to=x")
    assert "--base and --lora missing" in failure(capsys, "lora", "merge", "--to=x")


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_passes_everything_on(calls):
    assert cli.main(shlex.split("evaluate --checkpoint bundled --num 20 --seed 3 --steps 4 --output r.json")) == 0
    ((_, args, kwargs),) = calls
    assert args == (None,)
    assert kwargs == {
        "num": 20,
        "seed": 3,
        "steps": 4,
        "guidance": None,
        "sampler": None,
        "batch": 16,
        "output": "r.json",
        "features": None,
    }


@pytest.mark.parametrize(
    ("offered", "given", "begins"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, False),
        (None, {}, False),
    ],
)
def test_memory_in_large_pages_is_asked_for_once(offered, given, begins, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")  # and whatever is set is taken back
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if offered:
        (tmp_path / "enabled").write_text(offered + "\n")
    begun = []
    monkeypatch.setattr(cli.os, "execv", lambda *command: begun.append(command))
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setattr(cli.sys, "orig_argv", ["python3", "-X", "dev", "stvdm", "--version"])
    for _ in range(2):  # the second time as the process that was begun
        cli._begin_with_huge_pages(str(tmp_path / "enabled"))
    assert begun == [(sys.executable, [sys.executable, "-X", "dev", "stvdm", "--version"])] * begins


def test_the_process_that_begins_once_more_runs_the_command():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    made = subprocess.run(
        [sys.executable, "-m", "stvdm.cli", "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert made.stdout.startswith("stvdm ")


def test_evaluate_writes_where_it_always_did(calls):
    assert cli.main(["evaluate"]) == 0
    assert calls[0][2]["output"] == "results.json" and calls[0][2]["num"] == 200


def test_evaluate_damage_goes_to_the_metrics(calls):
    words = ["evaluate", "--damage", "--num=20", "--seed=3", "--output=a folder"]
    assert cli.main(words) == 0
    command = "stvdm evaluate --damage --num=20 --seed=3 '--output=a folder'"
    assert calls == [("damage", (), {"num": 20, "seed": 3, "output": "a folder", "command": command})]


def test_evaluate_compare_sets_results_side_by_side(calls, stand_in):
    stand_in("stvdm.evaluation.comparison", main=lambda *args, **kwargs: calls.append((args, kwargs)))
    assert cli.main(["evaluate", "--compare", "a.json", "b.json", "--mixed", "--output=t.md"]) == 0
    assert calls == [((["a.json", "b.json"],), {"mixed": True, "output": "t.md"})]


def test_evaluate_compare_refuses_what_means_nothing_beside_it(calls, capsys):
    said = failure(capsys, "evaluate", "--compare", "a.json", "b.json", "--num=8", "--steps=5")
    assert "--steps=5 --num=8: without effect beside --compare" in said
    assert "--mixed: without effect but for --compare" in failure(capsys, "evaluate", "--mixed")
    assert "a.json" in failure(capsys, "evaluate", "--compare", "nowhere/a.json", "b.json")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--damage", "--compare", "a.json", "b.json"])
    assert not calls


def test_evaluate_damage_refuses_options_of_sampling(calls, capsys):
    said = failure(capsys, "evaluate", "--damage", "--steps=5", "--guidance=2")
    assert "--steps=5 --guidance=2.0: without effect beside --damage" in said and not calls


# -------------------------------------------------------------------------------------------------------------- ablate


@pytest.fixture
def ablated(stand_in, monkeypatch):
    """What `cells.main` was called with, and the folders of which a report was written."""
    from stvdm.ablations import report

    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    noted = types.SimpleNamespace(calls=[], reports=[])

    def main(question, bases, **options):
        noted.calls.append((question.name, bases, options))
        return pathlib.Path("results")

    def write(question, folder, *, mixed):
        noted.reports.append((str(folder), mixed))
        return "report.md"

    stand_in("stvdm.ablations.cells", main=main)
    monkeypatch.setattr(report, "write", write)
    monkeypatch.setattr(report, "check_matplotlib", lambda: None)
    return noted


def test_ablate_runs_the_grid_from_the_bases_of_a_size_and_writes_the_report(ablated, capsys):
    words = "ablate attention --size=small --seeds=5 --num=16 --config.total_steps=70 --results=r --workdir=w"
    assert cli.main(words.split()) == 0
    ((name, bases, options),) = ablated.calls
    assert (name, bases.dit.total_steps, bases.dit.model.width) == ("attention", 70, 256)
    assert bases.autoencoder.kind == "autoencoder" and bases.autoencoder.model.width == 64
    assert options == {
        "size": "small",
        "num_seeds": 5,
        "cell": None,
        "num": 16,
        "batch": 32,
        "workdir": "w",
        "folder": "r",
        "mixed": False,
        "options": ["--num=16", "--config.total_steps=70"],
    }
    assert ablated.reports == [("results", False)] and capsys.readouterr().out == "report.md\n"


def test_ablate_of_one_cell_leaves_the_report(ablated):
    assert cli.main("ablate attention --cell=full:1".split()) == 0
    assert ablated.calls[0][2]["cell"] == "full:1" and ablated.calls[0][2]["options"] == []
    assert ablated.reports == []


def test_ablate_can_write_the_report_alone(ablated):
    assert cli.main("ablate attention --report --mixed --results=r".split()) == 0
    assert ablated.calls == [] and ablated.reports == [("r/attention/tiny", True)]


def test_ablate_lists_what_there_is(tmp_path, capsys):
    assert cli.main(["ablate", "--list", f"--results={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "attention: Does attention over time remove flicker" in said and "not run" in said


def test_ablate_refuses_names_that_are_none(ablated, capsys):
    assert "did you mean 'attention'?" in failure(capsys, "ablate", "atention")
    assert "NAME is missing: expected one of attention, objective" in failure(capsys, "ablate")
    assert "did you mean total_steps?" in failure(capsys, "ablate", "attention", "--config.total_step=3")


def test_data_kinetic_shapes_writes_the_splits(stand_in):
    written = []
    stand_in(
        "stvdm.data.kinetic_shapes_tfds",
        KineticShapesConfig=dict,
        write=lambda folder, config: written.append((folder, config)),
    )
    assert cli.main(shlex.split("data kinetic_shapes --out d --num 100 --seed 4 --width 32")) == 0
    ((folder, config),) = written
    assert folder == "d"
    assert config["num_clips"] == {"train": 100, "validation": 5, "test": 5}
    assert (config["seed"], config["height"], config["width"], config["num_frames"]) == (4, 64, 32, 17)


def test_data_check_prints_what_would_be_skipped(tmp_path, capsys):
    from stvdm.data import video

    for name, num_frames in (("long", 12), ("short", 3), ("silent", 12)):
        video.write_mp4(tmp_path / f"{name}.mp4", np.zeros((num_frames, 32, 32, 3), np.uint8), fps=8, min_side=32)
    (tmp_path / "long.txt").write_text("nothing moves")
    (tmp_path / "short.txt").write_text("nothing moves")
    assert cli.main(["data", "check", str(tmp_path), "--frames=9", "--fps=8"]) == 0
    report = capsys.readouterr().out
    assert "1 of 3 clips are used" in report
    assert "short.mp4: too short" in report and "silent.mp4: no caption" in report


def test_help_of_every_command_has_an_example_that_parses(capsys):
    plain = ("generate", "train", "supervise", "preprocess", "lora", "evaluate", "ablate", "plan")
    for command in (*plain, "data kinetic_shapes", "data check"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), "--help"])
        assert stopped.value.code == 0
        (example,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  stvdm "))
        _, rest = cli.parser().parse_known_args(shlex.split(example)[1:])
        assert all(argument.startswith("--config.") for argument in rest)
