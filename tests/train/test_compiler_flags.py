# SPDX-License-Identifier: Apache-2.0
"""Each flag of the table is one that libtpu knows, with a value it takes: asked of its compiler, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from stvdm.planning.chips import CHIPS
from stvdm.train.compiler_flags import COMPILER_FLAGS, QUICK_FLAGS, libtpu_init_args

SMALLEST = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}

# In a process of its own: libtpu reads LIBTPU_INIT_ARGS once, and ends the process when it does not understand it.
CHECK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

where, flags = sys.argv[1], json.loads(sys.argv[2])
devices = topologies.get_topology_desc(platform="tpu", topology_name=where).devices
split = NamedSharding(Mesh(np.array(devices), "x"), PartitionSpec("x"))
x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=split)
lowered = jax.jit(lambda a, b: a @ b).lower(x, x)  # b is gathered: there is a transfer to compile
lowered.compile()
for name, value in flags.items():
    try:
        lowered.compile(compiler_options={name: value})
        print("known", name)
    except jax.errors.JaxRuntimeError as error:
        print("refused", name, str(error).splitlines()[0])
"""


def check(chip, flags, libtpu_init_args=""):
    environment = {"LIBTPU_INIT_ARGS": libtpu_init_args, "JAX_COMPILATION_CACHE_DIR": ""}
    return subprocess.run(
        [sys.executable, "-c", CHECK, f"{chip}:{SMALLEST[chip]}", json.dumps(flags)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_every_chip_has_its_table():
    assert COMPILER_FLAGS.keys() == CHIPS.keys() == SMALLEST.keys()


def test_given_flags_come_last():
    assert libtpu_init_args("tpu7x", "--xla_a=1 --xla_b=2").endswith("=true --xla_a=1 --xla_b=2")
    with pytest.raises(ValueError, match="chip='v4': there are flags for v5e, v5p, v6e, tpu7x"):
        libtpu_init_args("v4")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install -e '.[tpu]'"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", COMPILER_FLAGS)
def test_the_compiler_knows_every_flag_and_takes_its_value(chip):
    flags = {**COMPILER_FLAGS[chip], **QUICK_FLAGS.get(chip, {})}
    run = check(chip, flags, libtpu_init_args(chip))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == [f"known {flag}" for flag in flags]


@pytest.mark.slow
@needs_libtpu
def test_the_check_would_see_a_wrong_flag():
    run = check("v5e", {"xla_tpu_no_such_flag": "true", "xla_tpu_scoped_vmem_limit_kib": "many"})
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [
        ["refused", "xla_tpu_no_such_flag"],
        ["refused", "xla_tpu_scoped_vmem_limit_kib"],
    ]
    run = check("v5e", {}, "--xla_tpu_no_such_flag=true")
    assert run.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in run.stderr
