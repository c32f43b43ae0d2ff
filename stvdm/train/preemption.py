# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, which comes before a machine is taken away: all processes agree on a step, save it and leave.

    with preemption.watch() as must_leave:
        for step in range(first_step, total_steps):
            ...
            leaving = must_leave(step + 1)        # on every process, after every step
            if leaving or is_due(...):
                checkpoints.save(...)
            if leaving:
                preemption.leave(checkpoints)     # exit status 75: give the same command again

With `jax.distributed` a signal to any process counts: its coordination service names a step that none has reached yet.
A process that is alone leaves at once if it has not made a step yet, as there is nothing to save: not even the
compiler, which keeps Python's handlers waiting for minutes, holds it up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from stvdm.checkpoint import Checkpoints
from stvdm.train.supervisor import RESUME


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Gives `must_leave(step)`: whether to save this step and leave, for the same step on all processes."""
    if jax.distributed.is_initialized():  # which handles the signal
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python gives no signals
        yield lambda step: False
        return

    def handle(*_: Any) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with _nothing_made_yet() as made_some:

            def must_leave(step: int) -> bool:
                made_some()
                return asked.is_set()

            yield must_leave
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(checkpoints: Checkpoints) -> NoReturn:
    """Ends the program with status 75 once the save under way is whole.

    Raises:
      OSError: if it could not be finished, so that the run would lose steps.
    """
    checkpoints.wait()
    raise SystemExit(RESUME)


@contextlib.contextmanager
def _nothing_made_yet() -> Iterator[Callable[[], None]]:
    """Has SIGTERM end the process with status 75 at once, until the function that it gives is called.

    A handler of Python's runs in the main thread between two of its own instructions, so not in the compiler. What the
    interpreter does as the signal comes is to write its number to the wake-up file; another thread reads that.
    """
    heard, tell = socket.socketpair()
    tell.setblocking(False)
    over = threading.Lock()  # held from then on

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGTERM and over.acquire(blocking=False):
                print("asked to stop before the first step: there is nothing to save", file=sys.stderr, flush=True)
                for worker in multiprocessing.active_children():  # which reads clips
                    worker.kill()
                os._exit(RESUME)

    def made_some() -> None:
        over.acquire(blocking=False)

    listener = threading.Thread(target=listen, name="before the first step", daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    try:
        yield made_some
    finally:
        signal.set_wakeup_fd(before)
        tell.shutdown(socket.SHUT_WR)  # closing is not enough where a forked child has it, too
        tell.close()
        listener.join()
        heard.close()
