# SPDX-License-Identifier: Apache-2.0
"""One process of a run, for tests that end it badly: worker.py RUN.json PROCESS_ID.

RUN.json: {"kind", "config" (all of it), "workdir", "num_processes", "port", "devices" (of each process),
"seconds" (that each batch takes, so that there is time to interfere), "anywhere" (start from random weights), "broken"
(numbers of clips that can't be read)}.
"""

import json
import os
import sys
import time

run = json.loads(open(sys.argv[1]).read())  # noqa: SIM115
os.environ["JAX_PLATFORMS"] = "cpu"
patience = "--xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={run['devices']} {patience}"

import jax  # noqa: E402

if run["num_processes"] > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{run['port']}",
        num_processes=run["num_processes"],
        process_id=int(sys.argv[2]),
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=20,
    )

import runs  # noqa: E402

from stvdm import config as base  # noqa: E402
from stvdm.data.loader import KineticShapes, Loader  # noqa: E402
from stvdm.data.video import BadVideo  # noqa: E402
from stvdm.train import autoencoder, dit  # noqa: E402

config = {"autoencoder": base.autoencoder, "dit": base.dit}[run["kind"]]().unlock()
config.update(run["config"])

draw, read = Loader.__next__, KineticShapes.read


def slow_draw(self):
    time.sleep(run.get("seconds", 0.0))
    return draw(self)


def read_whole(self, index, **how):
    if index in run.get("broken", ()):
        raise BadVideo("broken", f"clip {index}")
    return read(self, index, **how)


Loader.__next__, KineticShapes.read = slow_draw, read_whole
if run.get("anywhere"):
    program = dit.program
    dit.program = lambda config, coder: runs.anywhere(program(config, coder))
{"autoencoder": autoencoder, "dit": dit}[run["kind"]].main(config.lock(), run["workdir"])
