# SPDX-License-Identifier: Apache-2.0
"""Two processes train; one is killed, frozen or asked to stop, or the disk is full: the losses go on as if nothing was.

Every fault is a real one. The trainers are the real ones, at the smallest size.
"""

import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from runs import Run, losses, saved, steps_written
from runs import finish as finish_any

from stvdm.train.preemption import RESUME
from stvdm.train.telemetry import read_metrics

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture
def config(dit_config):
    """Weights, averages and moments are split over both processes: each has shards to save that no other has."""
    return dit_config(total_steps=STEPS, checkpoint_every=2, mesh__fsdp=4)


def finish(workdir, config, **settings):
    return finish_any(workdir, config, kind="dit", **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the losses are when nothing happens; made by the first test that asks."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}

    def make(config):
        if not found:
            found.update(finish(folder / "run", config))
        return found

    return make


def test_a_killed_worker(config, undisturbed, tmp_path):
    expected = undisturbed(config)
    assert sorted(expected) == list(range(1, STEPS + 1))
    with Run(tmp_path / "run", config, kind="dit", seconds=0.3) as run:
        run.wait_for_step(3)
        run.processes[1].kill()
        codes = run.exit_codes()  # the other one does not hang
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, RESUME), run.said()
    assert len(losses(tmp_path / "run")) < STEPS
    assert finish(tmp_path / "run", config) == expected


def test_a_frozen_worker(config, undisturbed, tmp_path):
    expected = undisturbed(config)
    with Run(tmp_path / "run", config, kind="dit", seconds=0.3) as run:
        run.wait_for_step(3)
        run.processes[1].send_signal(signal.SIGSTOP)
        assert run.processes[0].wait(300) not in (0, RESUME), run.said()  # gives up on the other
        assert run.processes[1].poll() is None
    assert len(losses(tmp_path / "run")) < STEPS
    assert finish(tmp_path / "run", config) == expected


def test_killed_while_saving(config, undisturbed, tmp_path):
    expected = undisturbed(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    with Run(tmp_path / "run", config, kind="dit", seconds=0.3) as run:
        run.wait_for(lambda: checkpoints.exists() and any(path.name.startswith("4") for path in checkpoints.iterdir()))
        for process in run.processes:
            process.kill()
        assert not (checkpoints / "4" / "manifest" / "1-of-2.json").exists()  # it was in the middle of it
    assert finish(tmp_path / "run", config) == expected


def test_a_flipped_byte_a_truncated_file_and_a_missing_shard(config, undisturbed, tmp_path):
    """Both processes agree that a step is damaged, whichever of them reads the file, and take the one before."""
    expected = undisturbed(config)
    config.total_steps, config.checkpoint_every, config.keep_checkpoints = 4, 1, 4
    finish(tmp_path / "run", config)
    assert saved(tmp_path / "run") == [1, 2, 3, 4]
    checkpoints = tmp_path / "run" / "checkpoints"
    missing, cut, flipped = (sorted((checkpoints / step / "state").rglob("d/*"))[-1] for step in "234")
    missing.unlink()
    os.truncate(cut, cut.stat().st_size - 1)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    config.total_steps, config.checkpoint_every = STEPS, STEPS
    with Run(tmp_path / "run", config, kind="dit") as run:
        assert run.exit_codes() == [0, 0], run.said()
    for log in run.logs:
        said = log.read_text()
        assert f"{missing.name} is missing" in said and f"{flipped.name} was changed" in said
        assert f"{cut.name} has " in said  # fewer bytes than were written
    assert losses(tmp_path / "run") == expected


def test_a_worker_asked_to_stop(config, undisturbed, tmp_path):
    """All save the same step and leave with the status that says so. It goes on on two, or on one with another mesh."""
    config.checkpoint_every = 100
    expected = undisturbed(config)
    with Run(tmp_path / "run", config, kind="dit", seconds=0.5) as run:
        run.wait_for_step(2)
        run.processes[1].terminate()
        assert run.exit_codes() == [RESUME, RESUME], run.said()
    (step,) = saved(tmp_path / "run")
    assert 2 <= step < STEPS
    assert steps_written(tmp_path / "run")[-1] == step  # none is lost
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert finish(tmp_path / "run", config) == expected
    assert steps_written(tmp_path / "run") == list(range(1, STEPS + 1))  # none is redone, and there is one log
    assert all("seconds/data_max" in record for record in read_metrics(tmp_path / "run"))  # of both processes
    config.mesh.update(dict(data=2, fsdp=1, tensor=2))
    alone = finish(tmp_path / "alone", config, num_processes=1)
    np.testing.assert_allclose(list(alone.values()), list(expected.values()), rtol=1e-4)


@pytest.fixture
def autoencoder(autoencoder_config):
    one_stage = dict(model__multipliers=(1,), model__spatial_down=(), model__temporal_down=())
    return autoencoder_config(total_steps=100, checkpoint_every=100, **one_stage)


def test_the_other_trainer_is_asked_to_stop_too(autoencoder, tmp_path):
    with Run(tmp_path / "run", autoencoder, kind="autoencoder", seconds=0.3) as run:
        run.wait_for_step(1)
        run.processes[0].terminate()
        assert run.exit_codes() == [RESUME, RESUME], run.said()
    assert saved(tmp_path / "run") == steps_written(tmp_path / "run")[-1:]


def test_one_process_without_jax_distributed_asked_to_stop(autoencoder, tmp_path):
    autoencoder.checkpoint_every = 2
    with Run(tmp_path / "run", autoencoder, kind="autoencoder", num_processes=1, seconds=0.3) as run:
        run.wait_for_step(3)
        run.processes[0].terminate()
        assert run.exit_codes() == [RESUME], run.said()
    assert "asked to stop: step" in run.logs[0].read_text()
    assert saved(tmp_path / "run")[-1] == steps_written(tmp_path / "run")[-1] < 100


def test_a_full_disk(config, undisturbed, tmp_path):
    expected = undisturbed(config)
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with Run(tmp_path / "run", config, kind="dit", seconds=0.3) as run:
            run.wait_for(lambda: (disk / "2" / "manifest" / "1-of-2.json").exists())
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "somebody_elses").write_bytes(bytes(room - 8192))
            codes = run.exit_codes()
        assert all(code not in (0, RESUME) for code in codes), run.said()
        assert "was not saved in" in run.said() and "step 2 is whole and untouched" in run.said(), run.said()
        assert saved(tmp_path / "run") == [2]
        (disk / "somebody_elses").unlink()
        assert finish(tmp_path / "run", config) == expected
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_gradients_that_stay_non_finite_name_their_examples(autoencoder, tmp_path):
    autoencoder.loss.kl = 1e39  # which is infinite in float32
    autoencoder.max_skipped = 2
    autoencoder.log_every = 2
    with Run(tmp_path / "run", autoencoder, kind="autoencoder") as run:
        codes = run.exit_codes()
    assert all(code not in (0, RESUME) for code in codes), run.said()
    for log in run.logs:
        (line,) = (line for line in log.read_text().splitlines() if line.startswith("  step 3: "))
        assert line.count("example ") == 8  # of both processes
