# SPDX-License-Identifier: Apache-2.0
"""What a running trainer says: a progress line, metrics as JSONL and TensorBoard, preview pictures.

    telemetry = Telemetry(workdir, num_steps=config.num_steps)
    with telemetry.timed("data"):
        batch = next(batches)
    with telemetry.timed("step"):
        state, metrics = train_step(state, batch)
    telemetry.record(step, metrics)          # step 300/5000  loss 0.412  9.81 steps/s  ETA 7:59  [data 2% step 97%]
    telemetry.preview(step, "samples", video_BTHWC, captions=prompts)
    telemetry.close()

In `workdir`: `metrics.jsonl` (one record a line, appended over restarts), `tensorboard/`, `previews/NAME-STEP.png`.
Only process 0 writes; on the others every method still reads its arrays, so that all processes compute the same.

Object stores (gs://, s3://) know no appending, and tensorboardX cannot write there: with such a `workdir` the files are
written to a local folder and copied at most once in `copy_seconds`, and by `close()`.
"""

import contextlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

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
    ) -> None:
        self.workdir = epath.Path(workdir)
        self.num_steps = num_steps
        self._writes = jax.process_index() == 0
        self._stream = stream if self._writes else None
        self._copy_seconds = copy_seconds
        self._seconds: dict[str, float] = {}
        self._charged = 0.0  # all seconds charged so far, never reset: what a `timed` subtracts for those inside it
        self._last_step = first_step
        self._last_time = self._last_copy = time.monotonic()
        if not self._writes:
            return

        import tensorboardX

        if staging is None and "://" in str(workdir):
            staging = tempfile.mkdtemp(prefix="stvdm-telemetry-")
        self._local = Path(staging if staging is not None else workdir)
        self._local.mkdir(parents=True, exist_ok=True)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._staged = staging is not None
        earlier = self.workdir / METRICS_FILE
        if self._staged and earlier.exists():
            (self._local / METRICS_FILE).write_text(earlier.read_text())
        self._metrics = open(self._local / METRICS_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        _end_torn_line(self._metrics)
        self._board = tensorboardX.SummaryWriter(str(self._local / "tensorboard"), purge_step=first_step or None)

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
        busy = max(elapsed - self._seconds.get("compile", 0.0), 1e-9)  # compiling happens once: it is no rate
        record: dict[str, Any] = {"step": int(step), "wall": round(time.time(), 3), **values}
        if num_done > 0:
            record["steps_per_second"] = float(f"{num_done / busy:.4g}")
            record |= {f"seconds/{what}": round(spent, 4) for what, spent in self._seconds.items()}
        if self._writes:
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            self._metrics.flush()
            for name, value in record.items():
                if name not in ("step", "wall"):
                    self._board.add_scalar(name, math.nan if value is None else value, step)
        if self._stream is not None:
            print(self._progress_line(record, values, elapsed), file=self._stream, flush=True)
        if num_done > 0:
            self._last_step, self._last_time, self._seconds = step, now, {}
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
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        self._board.add_image(f"previews/{name}", np.asarray(sheet), step, dataformats="HWC")
        self._copy()

    def say(self, text: str) -> None:
        """Print a line among the progress, e.g. what is compiling or where a run resumed."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flush, copy if the workdir is remote, and let go of the files. Closing twice is fine."""
        if self._writes and not self._metrics.closed:
            self._metrics.close()
            self._board.close()
            self._copy(now=True)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _progress_line(self, record: Mapping[str, Any], values: Mapping[str, float | None], elapsed: float) -> str:
        step = record["step"]
        parts = [f"step {step:{len(str(self.num_steps))}d}/{self.num_steps}"]
        parts += [f"{name} {'not finite' if value is None else format(value, '.4g')}" for name, value in values.items()]
        if rate := record.get("steps_per_second"):
            parts += [f"{rate:.3g} steps/s", f"ETA {_clock((self.num_steps - step) / rate)}"]
            shares = [f"{what} {100 * spent / max(elapsed, 1e-9):.0f}%" for what, spent in self._seconds.items()]
            parts.append(f"[{' '.join(shares)}]")
        return "  ".join(parts)

    def _copy(self, *, now: bool = False) -> None:
        """Bring the staged files to the workdir; a failed copy warns and is tried again, for it must not end a run."""
        if not self._writes or not self._staged:
            return
        if not now and time.monotonic() - self._last_copy < self._copy_seconds:
            return
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
            names = tuple(sorted(name for name in record if not name.startswith(("seconds/", "steps_per"))))
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
