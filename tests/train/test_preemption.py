# SPDX-License-Identifier: Apache-2.0
"""SIGTERM while nothing has been made, even inside the compiler; and after a step. Real signals, a process each."""

import os
import signal
import subprocess
import sys
import time

import pytest

from stvdm.train import preemption, supervisor

# Folding this constant takes the compiler minutes, in which no handler of Python's runs.
CHILD = """
import multiprocessing, sys, time
import numpy as np, jax
from stvdm.train import preemption

def compile():
    ones = np.random.default_rng(0).normal(size=(2000, 2000)).astype(np.float32)
    jax.jit(lambda: jax.lax.reduce_window(ones, 0.0, jax.lax.add, (99, 99), (1, 1), "SAME")).lower().compile()

if __name__ == "__main__":
    reader = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    with preemption.watch():
        reader.start()
        print("compiling", flush=True)
        compile()
        print("compiled", flush=True)
"""


def test_it_leaves_at_once_while_the_first_step_compiles(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "compiling\n"
            time.sleep(1)  # to be in the compiler; before it the same holds
            child.terminate()
            said, error = child.communicate(timeout=60)  # till nobody has its output: what read clips for it went too
        finally:
            child.kill()
    assert (child.returncode, said) == (supervisor.RESUME, ""), error
    assert "nothing to save" in error


def test_after_a_step_it_is_asked_to_save():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as must_leave:
        assert not must_leave(1)
        signal.raise_signal(signal.SIGTERM)
        assert must_leave(2)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_lives_on_keeps_nobody_waiting():
    with preemption.watch():
        child = os.fork()
        if child == 0:
            try:
                time.sleep(60)
            finally:  # whatever comes, it does not go on with these tests
                os._exit(0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it does live on
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_leaving_waits_for_the_save_and_says_what_to_do():
    class Checkpoints:
        waited = False

        def wait(self):
            self.waited = True

    checkpoints = Checkpoints()
    with pytest.raises(SystemExit) as left:
        preemption.leave(checkpoints)
    assert left.value.code == supervisor.RESUME == 75 and checkpoints.waited
