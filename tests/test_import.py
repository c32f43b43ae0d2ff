# SPDX-License-Identifier: Apache-2.0
"""`import stvdm` is light: it loads nothing heavy and wakes no accelerator. Each test has a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "tensorflow_datasets", "av", "matplotlib", "orbax", "grain", "flax", "jax", "torch")


def loaded_after(code: str) -> list[str]:
    """The heavy packages in sys.modules after `code`; "backend" among them if JAX has started one."""
    probe = f"""
import sys
{code}
bridge = sys.modules.get("jax._src.xla_bridge")
started = ["backend"] if bridge and bridge._backends else []
print("LOADED", *[name for name in {HEAVY} if name in sys.modules], *started)
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return run.stdout.split("LOADED")[-1].split()


def test_the_probe_sees_what_it_should_not_find():
    assert loaded_after("import jax, tensorflow_datasets; jax.devices()") == ["tensorflow_datasets", "jax", "backend"]


def test_importing_the_library_loads_nothing_heavy():
    assert loaded_after("import stvdm; stvdm.__version__; dir(stvdm)") == []


def test_parsing_a_command_loads_nothing_heavy():
    assert loaded_after("from stvdm import cli; cli.parser().parse_args(['generate', 'a red ball'])") == []


def test_public_names_arrive_when_used_and_start_no_backend():
    loaded = loaded_after("import stvdm; [getattr(stvdm, name) for name in dir(stvdm)]")
    assert "jax" in loaded
    assert not {"matplotlib", "tensorflow", "tensorflow_datasets", "torch", "backend"} & set(loaded)


def test_a_folder_of_its_name_does_not_hide_it(tmp_path):
    """As beside a clone: what is in no package would be taken for one, before what an editable install finds."""
    (tmp_path / "stvdm").mkdir()
    subprocess.run([sys.executable, "-c", "import stvdm; stvdm.Pipeline"], cwd=tmp_path, check=True)


def test_an_unknown_name_says_what_there_is():
    import stvdm

    with pytest.raises(AttributeError, match=r"module 'stvdm' has no attribute 'DIT'; it has .*DiT"):
        stvdm.DIT  # noqa: B018


def test_every_public_name_is_there():
    import stvdm

    assert set(stvdm.__all__) <= set(dir(stvdm))
    for name in stvdm.__all__:
        assert getattr(stvdm, name) is not None
