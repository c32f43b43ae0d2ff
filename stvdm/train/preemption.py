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
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from stvdm.checkpoint import Checkpoints

RESUME = 75  # exit status: saved, not finished; EX_TEMPFAIL of sysexits.h


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
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(checkpoints: Checkpoints) -> NoReturn:
    """Ends the program with status 75 once the save under way is whole.

    Raises:
      OSError: if it could not be finished, so that the run would lose steps.
    """
    checkpoints.wait()
    raise SystemExit(RESUME)
