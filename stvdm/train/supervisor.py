# SPDX-License-Identifier: Apache-2.0
"""Keeps a training going: restarts all its processes when one dies or freezes, and gives up when that does not help.

    stvdm supervise -- stvdm train dit --config=configs/dit_kinetic.py --workdir=runs/dit
    stvdm supervise --processes=2 -- stvdm train ...     # one job of two processes on this machine
    stvdm supervise --chip=v5p -- stvdm train ...        # on every worker of a TPU slice: each keeps its own going

Supervisor and child share this file, and nothing else. The environment tells a child where to `beat` (a local file,
whatever the run's workdir is) and how to `join` the other processes. It answers with its exit status:

    0   finished
    75  told to stop: has saved, and goes on when started again (EX_TEMPFAIL of sysexits.h)
    2   before it began: refuses its command line or config, so starting it again would change nothing
    65  its losses are not finite, and would not be if it went on from the same checkpoint again (EX_DATAERR)
    any other, or a signal: died; the next start goes on from the newest checkpoint

Nothing but the standard library is imported (JAX only in `join`, by the child): this outlives what kills a child.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

from stvdm.train import compiler_flags

RESUME = 75
REFUSED = 2
DIVERGED = 65
FROZEN = 124  # as of timeout(1)

HEARTBEAT = "STVDM_HEARTBEAT"  # the file to `beat`
COORDINATOR = "STVDM_COORDINATOR"  # host:port, or AUTO
NUM_PROCESSES = "STVDM_NUM_PROCESSES"
PROCESS_ID = "STVDM_PROCESS_ID"
AUTO = "auto"  # JAX finds the others by itself: Cloud TPU, GKE, Slurm, Open MPI
TIMEOUT = "STVDM_TIMEOUT"  # seconds without a beat after which a supervisor ends what is frozen, here and elsewhere

NOT_BEGUN = -1
POLL_SECONDS = 0.1
LONGEST_DELAY = 60.0


def beat(started_from: int = NOT_BEGUN) -> None:
    """Says that this process gets on; called by trainers again and again, at the latest once in a step.

    Args:
      started_from: the step that this process resumed from, once that is known. A start from a later step than the one
        before is what counts as progress: only what was saved outlives a death.
    """
    name = os.environ.get(HEARTBEAT)
    if not name:
        return
    path = Path(name)
    if path.exists() and (started_from == NOT_BEGUN or path.read_text() == str(started_from)):
        os.utime(path)
        return
    partial = Path(f"{name}.partial")
    partial.write_text(str(started_from))
    partial.replace(path)  # never seen half written


def join() -> None:
    """Joins the other processes of the job, if the environment says that there are any; before JAX looks for devices.

    It waits for them longer than a supervisor lets a frozen one be: until that one is started again too. Once all are
    there it beats: what comes next has its own time.

    Raises:
      ValueError: if STVDM_COORDINATOR is set and what it needs is not.
    """
    coordinator = os.environ.get(COORDINATOR)
    if not coordinator:
        return
    place = []
    if coordinator != AUTO:
        for name in (NUM_PROCESSES, PROCESS_ID):
            value = os.environ.get(name, "")
            if not value.isdecimal():
                raise ValueError(
                    f"{name}={value!r}: expected a whole number, for {COORDINATOR}={coordinator}; set both "
                    f"{NUM_PROCESSES} and {PROCESS_ID}, or {COORDINATOR}={AUTO} where JAX finds out (Cloud TPU, Slurm)."
                )
            place.append(int(value))
    import jax

    sys.excepthook = _say_and_leave
    settings: dict[str, Any] = {}
    if timeout := os.environ.get(TIMEOUT):
        settings["initialization_timeout"] = int(float(timeout)) + 600
    if coordinator == AUTO:
        jax.distributed.initialize(**settings)
    else:
        jax.distributed.initialize(coordinator, num_processes=place[0], process_id=place[1], **settings)
    beat()


def leave_at_once(status: int) -> None:
    """Ends this process if it has joined others: JAX, at its exit, would wait minutes for them, who wait for it."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        _exit(status)


def supervise(
    command: Sequence[str],
    *,
    processes: int = 1,
    chip: str | None = None,
    timeout: float = 1800.0,
    grace: float = 120.0,
    max_failures: int = 5,
    first_delay: float = 1.0,
) -> int:
    """Runs ``command`` until it has finished, starting it again as often as it makes progress in between.

    Asked to stop (SIGTERM, SIGINT, SIGHUP), it asks its children with SIGTERM and waits for them; asked twice, it does
    not wait.

    Args:
      command: the program and its arguments, the same for every process.
      processes: how many to start, as one job on this machine.
      chip: of the TPU slice that this machine is a worker of; sets the compiler's flags, and lets JAX find the others.
      timeout: seconds without a beat, from the start on, after which a process counts as frozen. Reading the list of
        clips, restoring, compiling, evaluating, saving and exporting must each fit.
      grace: seconds that children have for saving once they are told to stop.
      max_failures: ends in a row without progress before giving up.
      first_delay: seconds before the first restart; doubled with each failure in a row, up to a minute.

    Returns:
      the exit status to leave with: 0, RESUME, or the status of the child that failed last (128 + N for signal N).

    Raises:
      ValueError: if the command is empty or not there, or if both ``processes`` and ``chip`` are given.
    """
    if not command:
        raise ValueError(
            "nothing to run: expected a command after --, e.g. -- stvdm train dit --config=... --workdir=..."
        )
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]!r}: there is no such program, so give its path or change PATH.")
    if chip and processes > 1:
        raise ValueError(
            f"processes={processes} and chip={chip!r}: a worker of a TPU slice runs one process, so give only one."
        )
    attempt, failures, furthest = 0, 0, -1
    with tempfile.TemporaryDirectory(prefix="stvdm-supervise-") as folder, _stop_signals() as asked:
        while True:
            attempt += 1
            children = _start(command, Path(folder) / str(attempt), processes=processes, chip=chip, timeout=timeout)
            end = _watch(children, asked, timeout=timeout, grace=grace)
            started_from = max(child.started_from() for child in children)
            if asked or end.status == 0:
                _say(f"{end.what}; stopped, as asked" if asked else end.what)
                return end.status
            if end.status == REFUSED and started_from == NOT_BEGUN:
                _say(f"{end.what} before it began: it would do so again, so it is not restarted")
                return end.status
            if end.status == DIVERGED:
                _say(f"{end.what}, its losses not finite: they would not be again, so it is not restarted")
                return end.status
            if started_from > furthest:
                furthest, failures = started_from, 0
            failures += 1
            if failures >= max_failures:
                _say(f"{end.what}; {failures} times without progress past step {max(furthest, 0)}: giving up")
                return end.status
            delay = 0.0 if end.status == RESUME else min(first_delay * 2 ** (failures - 1), LONGEST_DELAY)
            _say(f"{end.what}; starting again in {delay:g} s ({failures} of {max_failures} times without progress)")
            if _slept(delay, asked):
                return end.status


def _say_and_leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    _exit(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _End(NamedTuple):
    """How an attempt ended."""

    status: int
    what: str


class _Child:
    """One process, the file it beats, and when the last beat was seen (by our own clock, which nobody sets)."""

    def __init__(self, name: str, command: Sequence[str], heartbeat: Path, env: Mapping[str, str]) -> None:
        self.name, self.heartbeat = name, heartbeat
        self._last_beat, self._beat_seen = 0, time.monotonic()
        # A session of its own: Ctrl-C reaches us alone, and the data workers of a dead child can be found.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, env={**env, HEARTBEAT: str(heartbeat)}
        )

    def status(self) -> int | None:
        """As a shell tells it; None while running."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def silence(self) -> float:
        """Seconds since the last beat, or since the start."""
        with contextlib.suppress(FileNotFoundError):
            last_beat = self.heartbeat.stat().st_mtime_ns
            if last_beat != self._last_beat:
                self._last_beat, self._beat_seen = last_beat, time.monotonic()
        return time.monotonic() - self._beat_seen

    def started_from(self) -> int:
        """The step it resumed from, if it got so far."""
        return int(self.heartbeat.read_text()) if self.heartbeat.exists() else NOT_BEGUN

    def ask_to_stop(self) -> None:
        """SIGTERM to the process alone: the workers that feed it are needed until it has saved."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, which reaches a frozen process too, to it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _start(command: Sequence[str], folder: Path, *, processes: int, chip: str | None, timeout: float) -> list[_Child]:
    folder.mkdir()
    shared = dict(os.environ)
    if chip:
        shared["LIBTPU_INIT_ARGS"] = compiler_flags.libtpu_init_args(chip, os.environ.get("LIBTPU_INIT_ARGS", ""))
        shared[COORDINATOR] = AUTO
    if processes > 1:
        shared |= {COORDINATOR: f"127.0.0.1:{_free_port()}", NUM_PROCESSES: str(processes)}
    if COORDINATOR in shared:
        shared[TIMEOUT] = str(timeout)
    if processes == 1:
        return [_Child("the process", command, folder / "heartbeat", shared)]
    return [
        _Child(f"process {i}", command, folder / f"heartbeat-{i}", {**shared, PROCESS_ID: str(i)})
        for i in range(processes)
    ]


def _watch(children: Sequence[_Child], asked: Sequence[int], *, timeout: float, grace: float) -> _End:
    """Waits for the end of an attempt, and leaves no process behind."""
    told: float | None = None
    try:
        while True:
            statuses = {child: child.status() for child in children}
            if asked and told is None:
                told = time.monotonic()
                for child in children:
                    child.ask_to_stop()
            # The others wait in vain for one that died. Once told to stop, each is left to save what it can.
            died = [child for child, status in statuses.items() if status not in (None, 0, RESUME)]
            left = [child for child, status in statuses.items() if status is None]
            if died and (told is None or not left):
                status = statuses[died[0]] or 1
                return _End(status, f"{died[0].name} {_described(status)}")
            if not left:
                if RESUME in statuses.values():
                    return _End(RESUME, f"saved, to go on from there ({RESUME})")
                return _End(0, "finished")
            frozen = [child for child in left if child.silence() > timeout]
            if frozen:
                return _End(FROZEN, f"{frozen[0].name} has been silent for {timeout:g} s")
            if told is not None and (len(asked) > 1 or time.monotonic() - told > grace):
                return _End(128 + signal.SIGKILL, f"{left[0].name} had not left {time.monotonic() - told:.0f} s later")
            time.sleep(POLL_SECONDS)
    finally:
        for child in children:
            child.kill()


def _described(status: int) -> str:
    if status <= 128:
        return f"died ({status})"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(status - 128).name}"
    return f"died ({status})"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals to stop that have come so far. One that was ignored, as by nohup, stays ignored."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _slept(seconds: float, asked: Sequence[int]) -> bool:
    """Waits; True if asked to stop meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked:
        time.sleep(min(POLL_SECONDS, seconds))
    return bool(asked)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    print(f"stvdm supervise: {text}", file=sys.stderr, flush=True)
