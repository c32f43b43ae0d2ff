# SPDX-License-Identifier: Apache-2.0
"""What a running trainer says: a progress line, metrics as JSONL and TensorBoard, preview pictures, a profile.

    telemetry = Telemetry(workdir, num_steps=config.total_steps)
    with telemetry.timed("data"):
        batch = next(batches)
    with telemetry.step(batch, run.work):    # charged to "compile" for the first batch of a shape, then to "step"
        state, metrics = train_step(state, batch)
    telemetry.record(step, metrics)          # step 300/5000  loss 0.412  9.81 steps/s  ETA 7:59  [data 2% step 97%]
    telemetry.preview(step, "samples", video_BTHWC, captions=prompts)
    telemetry.close()

A record holds, beside its metrics,

    seconds/WHAT        of the interval since the record before: data, step, save, compile, evaluate
    step_seconds, clips_per_second, tokens_per_second, tflops_per_device, mfu
                        of its training: without compiling, saving and evaluating. FLOPs are those of the model, the
                        peak is the chip's; on devices whose peak is not known there is no mfu
    share/WHAT          of all time since the run first started, restarts included; share/lost is what steps that had to
                        be made again took, and the time between a death and the step after; goodput is share/step
    memory/peak_gib, memory/in_use_gib
                        of a device, where devices tell

In `workdir`: `metrics.jsonl` (one record a line, appended over restarts), `tensorboard/`, `previews/NAME-STEP.png`,
`profile/` (of the steps that the config names, for TensorBoard's profiler or Perfetto).
Only process 0 writes; on the others every method still reads its arrays, so that all processes compute the same. Times
are means over the processes, the wait for data also the slowest's, memory the fullest device's. All tell their
supervisor, if there is one, that they get on.

Object stores (gs://, s3://) know no appending, and tensorboardX cannot write there: with such a `workdir` the files are
written to a local folder and copied at most once in `copy_seconds`, by `bring()` and by `close()`.
"""

import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from stvdm.planning.chips import peak_flops
from stvdm.train import supervisor

METRICS_FILE = "metrics.jsonl"


class Telemetry:
    """Metrics, pictures and progress of one run; a context manager that closes itself.

    Args:
      workdir: the run's folder, local or an object store.
      num_steps: the step at which training ends, for the progress line and the ETA.
      first_step: the step training starts or resumes from, so that the first record already has a rate.
      stream: where the progress line goes; None keeps quiet.
      staging: local folder to write to before copying to `workdir`; by default a temporary one if `workdir` is an
        object store, and none otherwise.
      copy_seconds: with staging, the least time between two copies.
      profile: (steps before it, number of steps) of the window that process 0 profiles; no steps: none.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        num_steps: int,
        first_step: int = 0,
        stream: TextIO | None = sys.stderr,
        staging: epath.PathLike | None = None,
        copy_seconds: float = 60.0,
        profile: tuple[int, int] = (0, 0),
    ) -> None:
        self.workdir = epath.Path(workdir)
        self.num_steps = num_steps
        self._writes = jax.process_index() == 0
        self._stream = stream if self._writes else None
        self._copy_seconds = copy_seconds
        self._seconds: dict[str, float] = {}
        self._charged = 0.0  # all seconds charged so far, never reset: what a `timed` subtracts for those inside it
        self._first_step = self._last_step = self._step = first_step
        self._work: dict[Any, Mapping[str, float]] = {}  # of a step, for each shape of batch
        self._done: dict[str, float] = {}  # since the last record: steps that were not compiled, and their work
        self._num_new = 0  # and how many were
        self._profile = range(profile[0], sum(profile)) if self._writes else range(0)
        self._is_profiling = False
        self._last_time = self._last_copy = time.monotonic()
        supervisor.beat(first_step)
        if not self._writes:
            return

        self._is_temporary = staging is None and "://" in str(workdir)
        if self._is_temporary:
            staging = tempfile.mkdtemp(prefix="stvdm-telemetry-")
        self._local = Path(staging if staging is not None else workdir)
        self._local.mkdir(parents=True, exist_ok=True)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._staged = staging is not None
        earlier = self.workdir / METRICS_FILE
        if self._staged and earlier.exists():
            (self._local / METRICS_FILE).write_text(earlier.read_text())
        self._past = _Past()
        self._metrics = open(self._local / METRICS_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        _end_torn_line(self._metrics)
        self._metrics.seek(0)
        for line in self._metrics:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn
                record = json.loads(line)
                self._past.add(record["step"], record["wall"], _seconds_of(record))
        self._past.forget_after(first_step)
        self._board = _Board(self._local / "tensorboard", first_step)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Charge the time inside to `what`, e.g. "data", "step", "save", "compile"; an inner `timed` keeps its own."""
        began, before = time.monotonic(), self._charged
        try:
            yield
        finally:
            own = time.monotonic() - began - (self._charged - before)
            self._charged += own
            self._seconds[what] = self._seconds.get(what, 0.0) + own
            supervisor.beat(self._first_step)

    @contextlib.contextmanager
    def step(self, batch: Mapping[str, jax.Array], work: Callable[[Any], Mapping[str, float]]) -> Iterator[None]:
        """Around one optimiser step: takes its time, counts its work, and profiles it if it is in the window.

        Args:
          batch: what the step is made of; of its shapes the first step compiles.
          work: batch -> {"clips": ..., "tokens": ..., "flops": ...}, whatever there is to count, of all processes
            together; asked once for each shape.
        """
        if self._step == self._profile.start and self._profile:
            self._is_profiling = True
            jax.profiler.start_trace(str(self._local / "profile"))
        shapes = tuple(sorted((name, rows.shape) for name, rows in batch.items()))
        is_new = shapes not in self._work
        with (
            self.timed("compile" if is_new else "step"),
            jax.profiler.StepTraceAnnotation("train", step_num=self._step),
        ):
            if is_new:
                self.say(f"compiling the step for {', '.join(f'{name} {shape}' for name, shape in shapes)}")
                self._work[shapes] = work(batch)
            yield
            if is_new:  # a step is only dispatched by now; its first run waits for the compilers of other processes
                jax.block_until_ready(jax.live_arrays())
        self._step += 1
        self._num_new += is_new
        if not is_new:
            for name, amount in {"steps": 1.0, **self._work[shapes]}.items():
                self._done[name] = self._done.get(name, 0.0) + amount
        if self._step == self._profile.stop:
            self._end_profile()

    def record(self, step: int, metrics: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
        """Write one line of metrics, and say how far along the run is.

        Args:
          step: optimiser steps done.
          metrics: name -> number or scalar array. Reading device arrays waits for them; the wait is charged to "step".
          prefix: put before every name, e.g. "eval/".

        Returns:
          the record as written: {"step", "wall", the metrics, "steps_per_second", "seconds/data", ...}. A value that is
          not finite is None here and null in the file, since NaN is not JSON.
        """
        with self.timed("step"):
            values = {prefix + name: _number(value, name) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.monotonic()
        elapsed, num_done = now - self._last_time, step - self._last_step
        record: dict[str, Any] = {"step": int(step), "wall": round(time.time(), 3), **values}
        if num_done > 0:
            elapsed, seconds, data_max, memory = _agreed(elapsed, self._seconds)
            busy = max(elapsed - seconds.get("compile", 0.0), 1e-9)  # compiling happens once: it is no rate
            if num_done > self._num_new:
                record["steps_per_second"] = _short((num_done - self._num_new) / busy)
            record |= self._rates(elapsed - sum(seconds.get(what, 0.0) for what in ("compile", "save", "evaluate")))
            record |= {f"seconds/{what}": round(spent, 4) for what, spent in seconds.items()}
            if data_max is not None:
                record["seconds/data_max"] = round(data_max, 4)
            record |= memory
            if self._writes:
                self._past.add(step, record["wall"], seconds)
                record |= self._past.shares()
        if self._writes:
            with self._explained():
                self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
                self._metrics.flush()
                self._board.scalars(step, {name: record[name] for name in record if name not in ("step", "wall")})
        if self._stream is not None:
            print(self._progress_line(record, values, elapsed), file=self._stream, flush=True)
        if num_done > 0:
            self._last_step, self._last_time, self._seconds, self._done, self._num_new = step, now, {}, {}, 0
        self._copy()
        return record

    def preview(self, step: int, name: str, video_BTHWC: Any, *, captions: Sequence[str] | None = None) -> None:
        """Save clips as one picture (a clip a row, its caption above), as PNG and for TensorBoard.

        Args:
          step: optimiser steps done.
          name: what is shown, e.g. "samples" or "reconstruction"; part of the file's name.
          video_BTHWC: uint8, or float in [-1, 1].
          captions: one a clip.
        """
        video_BTHWC = np.asarray(jax.device_get(video_BTHWC))
        if video_BTHWC.ndim != 5:
            got = video_BTHWC.shape
            raise ValueError(f"video_BTHWC.shape={got}: expected 5 axes, so add the batch axis with video[None]")
        if not self._writes:
            return
        from stvdm.data import video
        from stvdm.sampling.pipeline import to_uint8

        if video_BTHWC.dtype != np.uint8:
            video_BTHWC = to_uint8(np.nan_to_num(video_BTHWC))
        sheet = video.contact_sheet(list(video_BTHWC), captions or [""] * len(video_BTHWC))
        path = self._local / "previews" / f"{name}-{step:08d}.png"
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            self._board.image(step, f"previews/{name}", np.asarray(sheet))
        self._copy()

    def bring(self) -> None:
        """Copy now, if the workdir is remote: with a checkpoint, so that what led to it lies beside it."""
        self._copy(now=True)

    def say(self, text: str) -> None:
        """Print a line among the progress, e.g. what is compiling or where a run resumed."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flush, copy if the workdir is remote, and let go of the files. Closing twice is fine.

        A temporary folder is removed if everything in it was copied.
        """
        self._end_profile()
        if self._writes and not self._metrics.closed:
            try:
                with self._explained():
                    self._metrics.close()
                    self._board.close()
            finally:
                if self._copy(now=True) and self._is_temporary:
                    shutil.rmtree(self._local)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A write that fails says where, and what to do."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self._local).free >> 20
            raise OSError(
                f"metrics and previews can't be written in {self._local}: {error.strerror or error}; {free:,} MiB are "
                "free there. Make room, or see to what is said above, and give the same command again: it goes on from "
                "the newest checkpoint."
            ) from error

    def _progress_line(self, record: Mapping[str, Any], values: Mapping[str, float | None], elapsed: float) -> str:
        step = record["step"]
        parts = [f"step {step:{len(str(self.num_steps))}d}/{self.num_steps}"]
        parts += [f"{name} {'not finite' if value is None else format(value, '.4g')}" for name, value in values.items()]
        if rate := record.get("steps_per_second"):
            parts += [f"{rate:.3g} steps/s", f"ETA {_clock((self.num_steps - step) / rate)}"]
            shares = [f"{what} {100 * spent / max(elapsed, 1e-9):.0f}%" for what, spent in self._seconds.items()]
            parts += [f"{record['tflops_per_device']:.3g} TFLOP/s a device"] if "tflops_per_device" in record else []
            parts += [f"MFU {record['mfu']:.0%}"] if "mfu" in record else []
            parts.append(f"[{' '.join(shares)}]")
            parts += [f"goodput {record['goodput']:.0%}"] if "goodput" in record else []
        return "  ".join(parts)

    def _rates(self, training: float) -> dict[str, float]:
        """Of the steps that were not compiled, from the seconds of the interval that were training."""
        done, training = dict(self._done), max(training, 1e-9)
        if not (steps := done.pop("steps", 0.0)):
            return {}
        flops = done.pop("flops", 0.0) / jax.device_count()
        rates = {"step_seconds": _short(training / steps)}
        rates |= {f"{name}_per_second": _short(amount / training) for name, amount in done.items()}
        if flops:
            rates["tflops_per_device"] = _short(flops / training / 1e12)
            if peak := peak_flops(jax.devices()[0].device_kind):
                rates["mfu"] = _short(flops / training / peak)
        return rates

    def _end_profile(self) -> None:
        if self._is_profiling:
            self._is_profiling = False
            jax.block_until_ready(jax.live_arrays())  # steps are only dispatched by now
            jax.profiler.stop_trace()
            self.say(f"the profile is in {self.workdir / 'profile'}")

    def _copy(self, *, now: bool = False) -> bool:
        """Bring the staged files to the workdir; a failed copy warns and is tried again, for it must not end a run.

        Returns whether all of them are there.
        """
        if not self._writes or not self._staged:
            return True
        if not now and time.monotonic() - self._last_copy < self._copy_seconds:
            return False
        self._last_copy = time.monotonic()
        try:
            for source in sorted(self._local.rglob("*")):
                if source.is_dir():
                    continue
                target = self.workdir / source.relative_to(self._local)
                if source.suffix == ".png" and target.exists():
                    continue  # pictures never change
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        except Exception as error:  # whatever the store's client raises
            warnings.warn(
                f"metrics could not be copied to {self.workdir} and stay in {self._local}: {error}", stacklevel=3
            )
            return False
        return True


class _Board:
    """Events for TensorBoard, each in its file before the call ends.

    tensorboardX's SummaryWriter has a thread for that. Where a disk is full the thread dies, nobody hears of it, and
    the eleventh event after it waits for ever for room in the queue.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        if first_step:  # what an earlier run wrote of later steps is hidden
            self._write(first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, math.nan if value is None else value))
        self._file.flush()

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, picture_HWC, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto import event_pb2

        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))


class _Past:
    """Where the time of a run went since it first started, deaths included; made again from `metrics.jsonl`."""

    def __init__(self) -> None:
        self._kept: list[
            tuple[int, dict[str, float]]
        ] = []  # (step, seconds of the interval before), of steps that stay
        self._began: float | None = None
        self._now = 0.0
        self._spent: dict[str, float] = {}

    def add(self, step: int, wall: float, seconds: Mapping[str, float]) -> None:
        """One interval; if its steps were made before, those were lost."""
        if not seconds:  # an evaluation's record
            return
        self.forget_after(step - 1)
        if self._began is None:
            self._began = wall - sum(seconds.values())
        self._now = wall
        self._kept.append((step, dict(seconds)))
        self._charge(seconds, +1)

    def forget_after(self, step: int) -> None:
        """A checkpoint of this step is what the run goes on from."""
        while self._kept and self._kept[-1][0] > step:
            self._charge(self._kept.pop()[1], -1)

    def shares(self) -> dict[str, float]:
        """Of the time since the start: by purpose, of the steps that stay; the rest is lost."""
        if self._began is None:
            return {}
        total = max(self._now - self._began, 1e-9)
        shares = {f"share/{what}": _short(spent / total) for what, spent in self._spent.items()}
        lost = max(0.0, 1 - sum(self._spent.values()) / total)
        return {**shares, "share/lost": round(lost, 4), "goodput": shares.get("share/step", 0.0)}

    def _charge(self, seconds: Mapping[str, float], sign: int) -> None:
        for what, spent in seconds.items():
            self._spent[what] = max(0.0, self._spent.get(what, 0.0) + sign * spent)


def _agreed(
    elapsed: float, seconds: Mapping[str, float]
) -> tuple[float, dict[str, float], float | None, dict[str, float]]:
    """(interval, its seconds by purpose, the longest wait for data, memory), equal on all processes.

    Times are means; the longest wait is None on a single process, memory empty where devices don't tell.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak, in_use = (
        max(float(device.get(name, 0)) / 2**30 for device in stats) for name in ("peak_bytes_in_use", "bytes_in_use")
    )
    data_max = None
    seconds = dict(sorted(seconds.items()))  # all processes have the same purposes, perhaps in another order
    if jax.process_count() > 1:
        mine = np.asarray([elapsed, seconds.get("data", 0.0), peak, in_use, *seconds.values()], np.float32)
        rows = np.asarray(multihost_utils.process_allgather(mine), np.float64)
        (elapsed, _, _, _, *means), (_, data_max, peak, in_use, *_) = rows.mean(0).tolist(), rows.max(0).tolist()
        seconds = dict(zip(seconds, means, strict=True))
    memory = {"memory/peak_gib": _short(peak), "memory/in_use_gib": _short(in_use)} if peak else {}
    return elapsed, seconds, data_max, memory


def _seconds_of(record: Mapping[str, Any]) -> dict[str, float]:
    prefix = "seconds/"
    return {
        name.removeprefix(prefix): float(spent)
        for name, spent in record.items()
        if name.startswith(prefix) and name != "seconds/data_max"
    }


def _is_metric(name: str) -> bool:
    """Whether a name in a record is the trainer's, and not one that depends on when and where the step was made."""
    ours = ("step_seconds", "tflops_per_device", "mfu", "goodput")
    return name not in ours and not name.startswith(("seconds/", "share/", "memory/")) and "_per_second" not in name


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps.

    A run killed after its last checkpoint repeats some steps when it resumes: of records with the same step
    and the same metrics the later one counts. A line torn by a crash is left out with a warning.
    """
    path = epath.Path(workdir) / METRICS_FILE
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            names = tuple(sorted(filter(_is_metric, record)))
            records[record["step"], names] = record
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path}:{number} is not a whole record and was left out", stacklevel=2)
    return sorted(records.values(), key=lambda record: record["step"])


def _end_torn_line(file: TextIO) -> None:
    """Start on a new line if the process before died in the middle of one."""
    file.seek(0)
    text = file.read()
    if text and not text.endswith("\n"):
        file.write("\n")


def _number(value: Any, name: str) -> float | None:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(
            f"metric {name!r} has shape {array.shape}: expected a scalar, so reduce it first, e.g. jnp.mean"
        )
    number = float(array.reshape(()))
    return number if math.isfinite(number) else None


def _clock(seconds: float) -> str:
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
