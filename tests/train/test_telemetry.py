# SPDX-License-Identifier: Apache-2.0
"""What a trainer writes can be read again, by people and by strict JSON readers, after any kind of end."""

import errno
import io
import json
import math
import os
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from stvdm.train import telemetry as telemetry_module
from stvdm.train.telemetry import Telemetry, read_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def time(self):
            return 1e9 + self.now

    clock = Clock()
    monkeypatch.setattr(telemetry_module, "time", clock)
    return clock


def strict_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_record_is_one_strict_json_line(tmp_path):
    with Telemetry(tmp_path, num_steps=10, stream=None) as telemetry:
        telemetry.record(1, {"loss": jnp.float32(0.5), "skipped": 3})
        telemetry.record(2, {"loss": jnp.nan, "grad_norm": -jnp.inf})
    first, second = strict_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["skipped"]) == (1, 0.5, 3)
    assert second["loss"] is None and second["grad_norm"] is None


def test_metrics_survive_a_restart(tmp_path):
    for first, last in ((0, 3), (2, 5)):  # the first process died after step 3, its last checkpoint was of step 2
        with Telemetry(tmp_path, num_steps=5, first_step=first, stream=None) as telemetry:
            for step in range(first + 1, last + 1):
                telemetry.record(step, {"loss": 10 * first + step})
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 6
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_every_process_beats_whatever_it_does(tmp_path, monkeypatch):
    heartbeat = tmp_path / "beat"
    monkeypatch.setenv("STVDM_HEARTBEAT", str(heartbeat))
    monkeypatch.setattr(telemetry_module.jax, "process_index", lambda: 1)
    with Telemetry(tmp_path, num_steps=9, first_step=4) as telemetry:
        assert heartbeat.read_text() == "4"
        os.utime(heartbeat, (0, 0))
        with telemetry.timed("save"):
            assert heartbeat.stat().st_mtime == 0
        assert heartbeat.stat().st_mtime > 0


def test_training_and_evaluation_of_one_step_are_both_kept(tmp_path):
    with Telemetry(tmp_path, num_steps=5, stream=None) as telemetry:
        telemetry.record(1, {"loss": 1.0})
        telemetry.record(1, {"psnr": 30.0}, prefix="eval/")
    assert [sorted(r.keys() & {"loss", "eval/psnr"}) for r in read_metrics(tmp_path)] == [["loss"], ["eval/psnr"]]


def test_a_torn_line_costs_only_itself(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with Telemetry(tmp_path, num_steps=5, first_step=1, stream=None) as telemetry:
        telemetry.record(2, {"loss": 2.0})
    with pytest.warns(UserWarning, match=r"metrics.jsonl:2 is not a whole record"):
        assert [r["loss"] for r in read_metrics(tmp_path)] == [1.0, 2.0]


def test_time_is_split_and_compiling_is_not_part_of_the_rate(tmp_path, clock):
    stream = io.StringIO()
    telemetry = Telemetry(tmp_path, num_steps=110, first_step=0, stream=stream)
    with telemetry.timed("compile"):
        clock.now += 40
    with telemetry.timed("data"):
        clock.now += 1
    with telemetry.timed("step"):
        clock.now += 4
        with telemetry.timed("save"):
            clock.now += 5
    record = telemetry.record(10, {"loss": 0.25})
    assert {what: record[f"seconds/{what}"] for what in ("compile", "data", "step", "save")} == {
        "compile": 40,
        "data": 1,
        "step": 4,  # without the saving inside it
        "save": 5,
    }
    assert record["steps_per_second"] == pytest.approx(10 / 10)
    line = stream.getvalue()
    assert line.startswith("step  10/110  loss 0.25  1 steps/s  ETA 1:40  [")
    assert "compile 80%" in line and "data 2%" in line

    clock.now += 2  # the next interval starts from nothing
    record = telemetry.record(12, {"loss": 0.25})
    assert record["steps_per_second"] == pytest.approx(1.0) and "seconds/compile" not in record
    telemetry.close()
    telemetry.close()


def _work(batch):
    clips, frames = batch["video"].shape[:2]
    return {"clips": clips, "tokens": clips * frames * 10, "flops": clips * 8e12}


def test_rates_are_of_training_alone_and_each_shape_counts_its_own_work(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(telemetry_module, "peak_flops", {"cpu": 2e12}.get)
    video, image = {"video": np.zeros((4, 5))}, {"video": np.zeros((16, 1))}
    stream = io.StringIO()
    telemetry = Telemetry(tmp_path, num_steps=10, stream=stream)
    for batch in (video, image, video, video, image):  # the first of a shape compiles
        with telemetry.step(batch, _work):
            clock.now += 2
    for what in ("data", "evaluate", "save"):
        with telemetry.timed(what):
            clock.now += 6
    record = telemetry.record(5, {"loss": 1.0})
    assert (record["seconds/compile"], record["seconds/step"]) == (4, 6)
    assert record["step_seconds"] == (6 + 6) / 3  # with the wait for data, without saving and evaluating
    assert record["clips_per_second"] == (4 + 4 + 16) / 12
    assert record["tokens_per_second"] == pytest.approx((2 * 4 * 5 * 10 + 16 * 10) / 12, rel=1e-3)
    assert record["tflops_per_device"] == 24 * 8 / 12 / 8  # of eight devices
    assert record["mfu"] == record["tflops_per_device"] / 2
    assert "2 TFLOP/s a device  MFU 100%" in stream.getvalue()
    said = [line for line in stream.getvalue().splitlines() if "compiling" in line]
    assert said == ["compiling the step for video (4, 5)", "compiling the step for video (16, 1)"]
    with telemetry.step(video, _work):
        clock.now += 2
    assert telemetry.record(6, {"loss": 1.0})["clips_per_second"] == 2  # the next interval starts from nothing


def test_the_first_run_of_a_program_is_no_part_of_a_rate(tmp_path):
    """It is dispatched, and goes on after the call has returned."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ x), x))
    with Telemetry(tmp_path, num_steps=2, stream=None) as telemetry:
        with telemetry.step({"x": np.zeros(1)}, lambda batch: {}):
            x = slow(jnp.ones((400, 400)))
            assert not x.is_ready()
        assert x.is_ready()
        first = telemetry.record(1, {"x": x[0, 0]})
        with telemetry.step({"x": np.zeros(1)}, lambda batch: {}):
            x = slow(x)
        second = telemetry.record(2, {"x": x[0, 0]})
    assert "step_seconds" not in first and "steps_per_second" not in first
    assert second["steps_per_second"] > 0


def test_a_device_whose_peak_is_not_known_has_no_mfu(tmp_path, clock):
    with Telemetry(tmp_path, num_steps=10, stream=None) as telemetry:
        for _ in range(2):
            with telemetry.step({"video": np.zeros((4, 5))}, _work):
                clock.now += 2
        record = telemetry.record(2, {"loss": 1.0})
    assert record["tflops_per_device"] == 2 and "mfu" not in record


def test_what_restarts_lost_is_told_over_the_whole_run(tmp_path, clock):
    def run(first, last):
        with Telemetry(tmp_path, num_steps=9, first_step=first, stream=None) as telemetry:
            for step in range(first + 1, last + 1):
                with telemetry.timed("data"):
                    clock.now += 1
                with telemetry.timed("step"):
                    clock.now += 3
                record = telemetry.record(step, {"loss": 0.0})
        return record

    record = run(0, 3)
    assert (record["goodput"], record["share/data"], record["share/lost"]) == (0.75, 0.25, 0)
    clock.now += 20  # dead
    record = run(1, 5)  # makes steps 2 and 3 again
    assert clock.now - 100 == 48
    assert record["share/lost"] == pytest.approx((20 + 8) / 48, abs=1e-4)
    assert (record["goodput"], record["share/data"]) == pytest.approx((15 / 48, 5 / 48), rel=1e-3)
    record = run(5, 6)  # a restart without a loss
    assert record["share/lost"] == pytest.approx(28 / 52, abs=1e-4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_the_processes_agree_on_means_and_on_the_slowest(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak * 2**30, "bytes_in_use": 2**29}

    def gather(mine):  # the other process waited two seconds more for data, and needed less memory
        return np.stack([mine, mine + np.array([2, 2, -1, 0, 2, 0], np.float32)])

    monkeypatch.setattr(telemetry_module.jax, "local_devices", lambda: [Device(3), Device(5)])
    monkeypatch.setattr(telemetry_module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(telemetry_module.multihost_utils, "process_allgather", gather)
    elapsed, seconds, data_max, memory = telemetry_module._agreed(10.0, {"step": 7.0, "data": 1.0})
    assert (elapsed, seconds, data_max) == (11, {"data": 2, "step": 7}, 3)
    assert memory == {"memory/peak_gib": 5, "memory/in_use_gib": 0.5}


def test_the_steps_that_are_asked_for_are_profiled(tmp_path):
    with Telemetry(tmp_path, num_steps=5, stream=None, profile=(2, 2)) as telemetry:
        for step in range(5):
            assert telemetry._is_profiling == (step == 3)  # between the two
            with telemetry.step({"video": jnp.zeros((4, 5))}, _work):
                jnp.ones(3).sum()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_wait_for_device_arrays_is_charged_to_the_step(tmp_path, clock):
    class Slow:
        def __array__(self, dtype=None, copy=None):
            clock.now += 3
            return np.float32(1)

    with Telemetry(tmp_path, num_steps=5, stream=None) as telemetry:
        assert telemetry.record(1, {"loss": Slow()})["seconds/step"] >= 3


def test_a_metric_must_be_a_scalar(tmp_path):
    with (
        Telemetry(tmp_path, num_steps=5, stream=None) as telemetry,
        pytest.raises(ValueError, match=r"metric 'loss' has shape \(4,\): expected a scalar, so reduce it"),
    ):
        telemetry.record(1, {"loss": jnp.zeros(4)})


def test_non_finite_is_said_in_words(tmp_path):
    stream = io.StringIO()
    with Telemetry(tmp_path, num_steps=5, stream=stream) as telemetry:
        telemetry.record(1, {"loss": math.nan})
        telemetry.say("resumed at step 1")
    assert "loss not finite" in stream.getvalue() and "resumed at step 1\n" in stream.getvalue()


@pytest.mark.parametrize("as_float", [False, True])
def test_preview_shows_every_clip_from_its_first_to_its_last_frame(tmp_path, as_float):
    video = np.zeros((2, 17, 4, 6, 3), np.uint8)
    video[0, 0], video[0, -1], video[1, -1] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    shown = video.astype(np.float32) / 127.5 - 1 if as_float else video
    with Telemetry(tmp_path, num_steps=5, stream=None) as telemetry:
        telemetry.preview(3, "samples", shown)
        telemetry.preview(4, "samples", shown, captions=["a", "b"])
    picture = np.asarray(Image.open(tmp_path / "previews" / "samples-00000003.png"))

    def place(colour):
        rows, columns = np.nonzero((picture == colour).all(-1))
        return rows.mean(), columns.mean()

    first, last, below = place((255, 0, 0)), place((0, 255, 0)), place((0, 0, 255))
    assert first[0] == last[0] < below[0]
    assert first[1] < last[1] == below[1]
    assert (tmp_path / "previews" / "samples-00000004.png").read_bytes() != (
        tmp_path / "previews" / "samples-00000003.png"
    ).read_bytes()


def test_a_single_clip_without_batch_axis_is_refused(tmp_path):
    with (
        Telemetry(tmp_path, num_steps=5, stream=None) as telemetry,
        pytest.raises(ValueError, match=r"add the batch axis with video\[None\]"),
    ):
        telemetry.preview(1, "samples", np.zeros((17, 4, 4, 3), np.uint8))


def test_tensorboard_holds_the_scalars(tmp_path):
    with Telemetry(tmp_path, num_steps=5, stream=None) as telemetry:
        telemetry.record(1, {"a_name_to_find": 1.0})
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"a_name_to_find" in events


def test_steps_that_are_done_again_hide_what_was_said_of_them(tmp_path):
    from tensorboardX.proto import event_pb2

    with Telemetry(tmp_path, num_steps=5, first_step=3, stream=None) as telemetry:
        telemetry.record(4, {"loss": 1.0, "none": math.nan})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (3, event_pb2.SessionLog.START)
    values = {event.summary.value[0].tag: event.summary.value[0].simple_value for event in events[2:]}
    assert values["loss"] == 1.0 and math.isnan(values["none"]) and {event.step for event in events[2:]} == {4}


def test_staging_ends_up_in_the_workdir_and_continues_it(tmp_path, clock):
    """What an object store gets: whole files, no appending."""
    workdir = tmp_path / "bucket"
    for run, (first, last) in enumerate(((0, 2), (2, 4))):
        with Telemetry(
            workdir, num_steps=4, first_step=first, stream=None, staging=tmp_path / f"local{run}", copy_seconds=60
        ) as telemetry:
            for step in range(first + 1, last + 1):
                telemetry.record(step, {"loss": step})
            telemetry.preview(last, "samples", np.zeros((1, 2, 4, 4, 3), np.uint8))
            assert not (workdir / "previews" / f"samples-{last:08d}.png").exists()
            clock.now += 61
            telemetry.record(last, {"psnr": 1.0}, prefix="eval/")
            assert (workdir / "previews" / f"samples-{last:08d}.png").exists()
    assert [r["loss"] for r in read_metrics(workdir) if "loss" in r] == [1, 2, 3, 4]
    assert list((workdir / "tensorboard").iterdir())


def test_what_led_to_a_checkpoint_is_brought_with_it(tmp_path):
    with Telemetry(tmp_path / "bucket", num_steps=4, stream=None, staging=tmp_path / "local") as telemetry:
        telemetry.record(1, {"loss": 1.0})
        telemetry.record(2, {"loss": 2.0})
        telemetry.bring()
        assert [record["loss"] for record in read_metrics(tmp_path / "bucket")] == [1.0, 2.0]


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    telemetry = Telemetry(tmp_path, num_steps=4, stream=None)
    telemetry._metrics.close()
    telemetry._metrics = open("/dev/full", "w")  # noqa: SIM115
    said = re.escape(str(tmp_path)) + ": No space left on device; .* MiB are free there. Make room"
    with pytest.raises(OSError, match=said), telemetry:
        telemetry.record(1, {"loss": 1.0})


def test_a_disk_that_is_full_for_tensorboard_alone_is_named_too(tmp_path, monkeypatch):
    """The thread of tensorboardX's own writer died of it, and then the run waited for ever."""
    from tensorboardX import record_writer

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    telemetry = Telemetry(tmp_path, num_steps=4, stream=None)
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    with pytest.raises(OSError, match=r"No space left on device; .* Make room"), telemetry:
        telemetry.record(1, {"loss": 1.0})


def test_a_failed_copy_warns_and_training_goes_on(tmp_path, monkeypatch):
    telemetry = Telemetry(tmp_path / "bucket", num_steps=4, stream=None, staging=tmp_path / "local", copy_seconds=0)
    monkeypatch.setattr(
        type(telemetry.workdir), "write_bytes", lambda *_, **__: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.warns(UserWarning, match=r"could not be copied to .*bucket and stay in .*local: no route"):
        telemetry.record(1, {"loss": 1.0})
    monkeypatch.undo()
    telemetry.close()
    assert len(read_metrics(tmp_path / "bucket")) == 1


def test_a_temporary_folder_goes_if_everything_in_it_was_copied(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Telemetry("gs://bucket/run", num_steps=4, stream=None) as telemetry:
        telemetry.record(1, {"loss": 1.0})
        assert (next(tmp_path.glob("stvdm-telemetry-*")) / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("stvdm-telemetry-*"))
    assert len(read_metrics(bucket / "run")) == 1
    telemetry = Telemetry("gs://bucket/run", num_steps=4, first_step=1, stream=None)
    telemetry.record(2, {"loss": 0.5})
    shutil.rmtree(bucket)
    bucket.touch()
    with pytest.warns(UserWarning, match="could not be copied"):
        telemetry.close()
    (left,) = tmp_path.glob("stvdm-telemetry-*")
    assert len(read_metrics(left)) == 2


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry_module.jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with Telemetry(tmp_path / "run", num_steps=4, stream=stream) as telemetry:
        assert telemetry.record(1, {"loss": 1.0})["loss"] == 1.0
        telemetry.preview(1, "samples", np.zeros((1, 2, 4, 4, 3), np.uint8))
    assert not (tmp_path / "run").exists() and stream.getvalue() == ""
