# SPDX-License-Identifier: Apache-2.0
"""Trainings in several processes of this machine, four devices together, for tests."""

import itertools
import json
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax

from stvdm import checkpoint, sharding
from stvdm import config as base
from stvdm.sampling import pipeline
from stvdm.train import dit
from stvdm.train import state as state_lib
from stvdm.train.telemetry import METRICS_FILE, read_metrics

WORKER = pathlib.Path(__file__).parent / "worker.py"
NUM_DEVICES = 4


class Run:
    """The processes of a run; they are killed if the test leaves them behind."""

    def __init__(self, workdir, config, *, kind="autoencoder", num_processes=2, num_devices=NUM_DEVICES, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        settings = {
            "kind": kind,
            "config": config.to_dict(),
            "workdir": str(workdir),
            "num_processes": num_processes,
            "port": port,
            "devices": num_devices // num_processes,
            **more,
        }
        description = workdir.parent / f"{workdir.name}.json"
        description.write_text(json.dumps(settings))
        self.logs = [workdir.parent / f"{workdir.name}-{index}.log" for index in range(num_processes)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(description), str(index)], stdout=log.open("w"), stderr=log.open("a")
            )
            for index, log in enumerate(self.logs)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # a frozen one too
            process.wait()

    def wait_for(self, condition, *, seconds=600):
        """Until the condition holds, while all processes are alive."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until and all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.002)

    def wait_for_step(self, step):
        self.wait_for(lambda: step in steps_written(self.workdir))

    def exit_codes(self, *, seconds=600):
        """Of all processes, when they have ended by themselves."""
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def said(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs)


def anywhere(program):
    """The program with every weight random: fresh ones are zero where it matters, and much would not show."""

    def init():
        boxed, count = jax.eval_shape(program.init), itertools.count()
        draw = lambda leaf: np.random.default_rng(next(count)).normal(0, 0.2, leaf.shape).astype(leaf.dtype)  # noqa: E731
        return jax.tree.map(draw, boxed)

    return program._replace(init=init)


def steps_written(workdir):
    path = workdir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def losses(workdir):
    return {record["step"]: record["loss"] for record in read_metrics(workdir) if "loss" in record}


def losses_and_gradients(workdir):
    """Of every step its loss and the norm of its gradients."""
    return np.array([(record["loss"], record["grad_norm"]) for record in read_metrics(workdir) if "loss" in record])


def moments(workdir):
    """Of every parameter of a transformer the first moments of its last step: the gradients of all steps, weighted."""
    with checkpoint.Checkpoints(workdir) as checkpoints:
        config = base.dit().unlock()
        config.update(checkpoints.config())
        _, description = dit.load_autoencoder(config.autoencoder)
        program = dit.program(config, pipeline.autoencoder_of(description["autoencoder"]))
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        state = checkpoints.restore(state_lib.abstract_state(program, mesh))
    leaves, _ = jax.tree_util.tree_flatten_with_path(optax.tree.get(state.opt_state, "mu"))
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def finish(workdir, config, **settings):
    with Run(workdir, config, **settings) as run:
        assert run.exit_codes() == [0] * len(run.processes), run.said()
    return losses(workdir)
