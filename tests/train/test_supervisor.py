# SPDX-License-Identifier: Apache-2.0
"""The supervisor with real processes: they exit, are killed, freeze, are told to stop, or never get anywhere."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stvdm.train import supervisor
from stvdm.train.compiler_flags import COMPILER_FLAGS
from stvdm.train.telemetry import read_metrics

# A training in small: each start is noted; `step` is what has been "saved", and survives.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
from stvdm.train import supervisor

folder = Path(sys.argv[1])
me = os.environ.get("STVDM_PROCESS_ID", "0")
environment = {name: value for name, value in os.environ.items() if name.startswith(("STVDM_", "LIBTPU"))}
attempt = len(list(folder.glob(f"start-{me}-*"))) + 1
(folder / f"start-{me}-{attempt}").write_text(json.dumps({"pid": os.getpid(), "at": time.time(), **environment}))

def saved():
    return int((folder / "step").read_text()) if (folder / "step").exists() else 0

def save(step):
    (folder / "step").write_text(str(step))

def wait_forever():
    while True:
        supervisor.beat(saved())
        time.sleep(0.02)

supervisor.beat(saved())
"""


@pytest.fixture
def training(tmp_path):
    """Makes the command of a small training from the lines that follow the prelude."""

    def make(body):
        path = tmp_path / "training.py"
        path.write_text(PRELUDE + textwrap.dedent(body))
        return [sys.executable, str(path), str(tmp_path)]

    return make


@pytest.fixture
def supervise(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("STVDM_", "LIBTPU"))]:
        monkeypatch.delenv(name)

    def run(command, **settings):
        return supervisor.supervise(command, **{"first_delay": 0.01, "timeout": 30.0, "grace": 30.0, **settings})

    return run


def starts(folder, process=0):
    """What each start of a process noted, in order."""
    paths = sorted(folder.glob(f"start-{process}-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return [json.loads(path.read_text()) for path in paths]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


LONG = 120.0  # seconds: a limit that is reached if something hangs, and not if the machine is busy


def wait_until(condition, seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_what_finishes_is_not_started_again(training, supervise, tmp_path, capsys):
    assert supervise(training("")) == 0
    assert len(starts(tmp_path)) == 1
    assert capsys.readouterr().err == "stvdm supervise: finished\n"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("sys.exit(1)", "died (1)"),
        ("os.abort()", "was killed by SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("sys.exit(75)", "saved, to go on from there (75)"),
    ],
)
def test_what_dies_or_left_with_75_goes_on(training, supervise, tmp_path, capsys, end, said):
    command = training(f"""
        if attempt < 3:
            save(saved() + 10)
            {end}
    """)
    assert supervise(command, max_failures=2) == 0
    assert len(starts(tmp_path)) == 3
    assert capsys.readouterr().err.count(said) == 2


def test_saving_further_is_progress_and_dying_at_the_same_place_is_not(training, supervise, tmp_path, capsys):
    command = training("""
        save(min(4, attempt))  # the first starts from 0 and saves 1, the second 2, 3, 4, 4, ...
        sys.exit(9)
    """)
    assert supervise(command, max_failures=3) == 9
    assert [start["STVDM_HEARTBEAT"] for start in starts(tmp_path)] != []
    assert len(starts(tmp_path)) == 4 + 3  # from 0, 1, 2, 3; and three times from 4
    assert "3 times without progress past step 4: giving up" in capsys.readouterr().err


def test_75_without_progress_ends_too(training, supervise, tmp_path):
    assert supervise(training("sys.exit(75)"), max_failures=3) == 75
    assert len(starts(tmp_path)) == 3


def test_delays_double_and_75_has_none(training, supervise, tmp_path, capsys):
    assert supervise(training("sys.exit(75 if attempt == 2 else 1)"), max_failures=4, first_delay=0.2) == 1
    assert re.findall(r"starting again in (\S+) s", capsys.readouterr().err) == ["0.2", "0", "0.8"]
    at = [start["at"] for start in starts(tmp_path)]
    assert at[1] - at[0] > 0.2 and at[3] - at[2] > 0.8


def test_a_refusal_is_not_repeated(supervise, tmp_path, capsys):
    note = tmp_path / "note"
    code = f"import sys; open({str(note)!r}, 'a').write('x'); sys.exit(2)"
    assert supervise([sys.executable, "-c", code]) == 2
    assert note.read_text() == "x"
    assert "not restarted" in capsys.readouterr().err


def test_a_refusal_after_a_long_way_there_is_not_repeated_either(training, supervise, tmp_path, capsys):
    code = "from stvdm.train import supervisor; supervisor.beat(); supervisor.beat(); raise SystemExit(2)"
    assert supervise([sys.executable, "-c", code]) == 2
    assert "before it began: it would do so again" in capsys.readouterr().err


def test_losses_that_are_not_finite_are_not_made_again(training, supervise, tmp_path, capsys):
    assert supervise(training("sys.exit(65)")) == 65
    assert len(starts(tmp_path)) == 1
    assert "its losses not finite" in capsys.readouterr().err


def test_status_2_after_it_began_is_a_death(training, supervise, tmp_path):
    assert supervise(training("sys.exit(2 if attempt == 1 else 0)")) == 0
    assert len(starts(tmp_path)) == 2


def test_a_frozen_process_is_killed_and_started_again(training, supervise, tmp_path, capsys):
    command = training("""
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
    """)
    assert supervise(command, timeout=3.0) == 0
    first, second = starts(tmp_path)
    assert 3.0 < second["at"] - first["at"] < 20
    assert not is_running(first["pid"])
    assert "the process has been silent for 3 s" in capsys.readouterr().err


def test_one_that_beats_is_not_frozen_however_long_it_takes(training, supervise, tmp_path):
    command = training("""
        end = time.monotonic() + 5.0
        while time.monotonic() < end:
            supervisor.beat(0)
            time.sleep(0.05)
    """)
    assert supervise(command, timeout=3.0) == 0
    assert len(starts(tmp_path)) == 1


def test_one_that_never_beats_counts_as_frozen(supervise, capsys):
    assert supervise(["sleep", "60"], timeout=0.5, max_failures=1) == supervisor.FROZEN
    assert "silent for 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_all_are_restarted_when_one_of_them_dies_or_freezes(training, supervise, tmp_path, end):
    command = training(f"""
        if attempt == 1:
            while not all((folder / f"start-{{i}}-1").exists() for i in range(3)):
                time.sleep(0.01)
            if me == "1":
                os.kill(os.getpid(), signal.{end})
            wait_forever()
    """)
    assert supervise(command, processes=3, timeout=3.0) == 0
    for process in range(3):
        first, second = starts(tmp_path, process)
        assert not is_running(first["pid"])
        assert second["STVDM_PROCESS_ID"] == str(process)
        assert second["STVDM_NUM_PROCESSES"] == "3"
        assert second["STVDM_TIMEOUT"] == "3.0"
    coordinators = {tuple(s["STVDM_COORDINATOR"] for s in starts(tmp_path, process)) for process in range(3)}
    assert len(coordinators) == 1  # each attempt has one, the same for all


def test_those_still_busy_are_waited_for_when_one_has_finished(training, supervise, tmp_path):
    command = training("""
        if me == "1":
            time.sleep(1.0)
            save(7)
    """)
    assert supervise(command, processes=2) == 0
    assert (tmp_path / "step").read_text() == "7"


def test_what_a_dead_process_had_started_is_gone_too(training, supervise, tmp_path):
    command = training("""
        import subprocess
        worker = subprocess.Popen(["sleep", "60"])
        (folder / f"worker-{attempt}").write_text(str(worker.pid))
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert supervise(command) == 0
    workers = [int((tmp_path / f"worker-{attempt}").read_text()) for attempt in (1, 2)]
    wait_until(lambda: not any(is_running(pid) for pid in workers))


# ------------------------------------------------------------------------------------------------------ told to stop


@pytest.fixture
def supervised(training, tmp_path):
    """Runs the command line, and waits for the processes to begin; ends it whatever happens."""
    running = []

    def run(body, *options, processes=1):
        argv = [sys.executable, "-m", "stvdm.cli", "supervise", *options, f"--processes={processes}", "--"]
        running.append(subprocess.Popen([*argv, *training(body)], stderr=subprocess.PIPE, text=True))
        wait_until(lambda: all((tmp_path / f"ready-{i}").exists() for i in range(processes)))
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            for path in tmp_path.glob("start-*"):  # what it would have ended
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
        process.stderr.close()


SAVES_WHEN_TOLD = """
    def leave(*_):
        time.sleep(0.3)
        save(3)
        sys.exit(75)
    signal.signal(signal.SIGTERM, leave)
    (folder / f"ready-{me}").write_text("")
    wait_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_lets_all_save_and_says_resume(supervised, tmp_path, number):
    ours = signal.signal(number, signal.SIG_DFL)  # one that is ignored, as under nohup, a supervisor would ignore too
    try:
        process = supervised(SAVES_WHEN_TOLD, processes=2)
    finally:
        signal.signal(number, ours)
    process.send_signal(number)
    assert process.wait(LONG) == supervisor.RESUME
    assert (tmp_path / "step").read_text() == "3"
    assert "saved, to go on from there (75); stopped, as asked" in process.stderr.read()
    assert [len(starts(tmp_path, i)) for i in range(2)] == [1, 1]


def test_one_that_does_not_leave_is_killed_after_the_grace(supervised, tmp_path):
    process = supervised(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"ready-{me}").write_text("")
        wait_forever()
        """,
        "--grace-s=1",
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 128 + signal.SIGKILL
    assert not is_running(starts(tmp_path)[0]["pid"])
    assert "had not left 1 s later" in process.stderr.read()


def test_asked_twice_it_does_not_wait(supervised, tmp_path):
    process = supervised(
        """
        signal.signal(signal.SIGTERM, lambda *_: (folder / "told").write_text(""))
        (folder / f"ready-{me}").write_text("")
        wait_forever()
        """
    )
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "told").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 128 + signal.SIGKILL
    assert not is_running(starts(tmp_path)[0]["pid"])


def test_it_stops_while_it_waits_to_start_again():
    script = (
        "import sys; from stvdm.train.supervisor import supervise; sys.exit(supervise(['false'], first_delay=60.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        assert "starting again in 60 s" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.stderr.close()


# ------------------------------------------------------------------------------------------------- what a child is told


def test_a_worker_of_a_slice_has_the_flags_of_its_chip_and_its_own_win(training, supervise, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_mine=1")
    assert supervise(training(""), chip="v5p") == 0
    (start,) = starts(tmp_path)
    assert start["STVDM_COORDINATOR"] == "auto" and "STVDM_PROCESS_ID" not in start
    *flags, last = start["LIBTPU_INIT_ARGS"].split(" ")
    assert flags == [f"--{flag}={value}" for flag, value in COMPILER_FLAGS["v5p"].items()]
    assert last == "--xla_mine=1"


def test_alone_on_a_machine_there_is_nobody_to_join(training, supervise, tmp_path):
    assert supervise(training("")) == 0
    assert {name for name in starts(tmp_path)[0] if name.isupper()} == {"STVDM_HEARTBEAT"}


def test_a_beat_says_once_where_it_started_from(tmp_path, monkeypatch):
    supervisor.beat(3)  # without a supervisor: nothing
    monkeypatch.setenv("STVDM_HEARTBEAT", str(tmp_path / "beat"))
    supervisor.beat()
    assert (tmp_path / "beat").read_text() == str(supervisor.NOT_BEGUN)
    supervisor.beat(3)
    first = (tmp_path / "beat").stat().st_mtime_ns
    time.sleep(0.02)
    supervisor.beat()
    assert (tmp_path / "beat").read_text() == "3"
    assert (tmp_path / "beat").stat().st_mtime_ns > first
    assert os.listdir(tmp_path) == ["beat"]


@pytest.mark.parametrize(
    ("environment", "called_with"),
    [
        ({}, None),
        ({"STVDM_COORDINATOR": "auto"}, ((), {})),
        ({"STVDM_COORDINATOR": "auto", "STVDM_TIMEOUT": "1800"}, ((), {"initialization_timeout": 2400})),
        (
            {"STVDM_COORDINATOR": "h:1", "STVDM_NUM_PROCESSES": "4", "STVDM_PROCESS_ID": "3"},
            (("h:1",), {"num_processes": 4, "process_id": 3}),
        ),
    ],
)
def test_joining_is_what_the_environment_says(environment, called_with, monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    supervisor.join()
    assert calls == ([called_with] if called_with else [])


def test_one_of_several_that_fails_leaves_at_once_and_says_why():
    code = """
import atexit, time
from stvdm.train import supervisor
import jax
jax.distributed.initialize = lambda: atexit.register(time.sleep, 60)  # as JAX waits for the others
supervisor.join()
raise RuntimeError("no such luck")
"""
    environment = {**os.environ, "STVDM_COORDINATOR": "auto"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50)
    assert run.returncode == 1
    assert run.stderr.endswith("RuntimeError: no such luck\n")


def test_the_time_that_others_took_to_come_is_not_the_time_of_what_comes_next(supervise, capsys):
    """A worker may wait for one that froze nearly as long as it may be silent itself."""
    code = """
import os, sys, time, types
from stvdm.train import supervisor
supervisor.beat()
initialize = lambda **_: time.sleep(4)  # in place of JAX, whose import may take seconds
sys.modules["jax"] = types.SimpleNamespace(distributed=types.SimpleNamespace(initialize=initialize))
os.environ["STVDM_COORDINATOR"] = "auto"
supervisor.join()
time.sleep(4)  # reads the list of clips
"""
    assert supervise([sys.executable, "-c", code], timeout=7.0, max_failures=1) == 0, capsys.readouterr().err


def test_half_a_description_of_the_job_is_refused(monkeypatch):
    monkeypatch.setenv("STVDM_COORDINATOR", "h:1")
    monkeypatch.setenv("STVDM_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="STVDM_PROCESS_ID='': expected a whole number"):
        supervisor.join()


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ([], {}, "nothing to run: expected a command"),
        (["no-such-program-here"], {}, "there is no such program"),
        (["true"], {"processes": 2, "chip": "v5e"}, "give only one"),
        (["true"], {"chip": "v9"}, "there are flags for v5e, v5p, v6e, tpu7x"),
    ],
)
def test_what_cannot_be_run_is_refused(supervise, command, settings, said):
    with pytest.raises(ValueError, match=said):
        supervise(command, **settings)


def test_it_needs_nothing_but_the_standard_library():
    code = "import sys, stvdm.train.supervisor; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in run.stdout.split()} - {"stvdm"}
    assert not {name for name in packages - set(sys.stdlib_module_names) if not name.startswith("_")}


# ---------------------------------------------------------------------------------------------------- a real training

CONFIG = """
from stvdm import config as base

def get_config():
    config = base.autoencoder()
    config.model.update(dict(latent_channels=4, width=4, multipliers=(1, 2), num_res_blocks=1, spatial_down=(True,),
        temporal_down=(True,), unshuffle=2, convolution="separable", middle_attention=False))
    config.data.buckets = ((5, 16, 16, 8, 1.0),)
    config.data.num_clips = 64
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.statistics_batches = 1
    config.total_steps = 30
    config.log_every = 1
    config.eval_every = 30
    config.eval_batches = 1
    config.checkpoint_every = 4
    return config.lock()
"""


@pytest.mark.slow
def test_a_training_whose_losses_are_not_finite_is_not_started_again(tmp_path):
    infinite = "config.loss.kl, config.max_skipped = 1e39, 2"
    (tmp_path / "config.py").write_text(CONFIG.replace("config.log_every", f"{infinite}\n    config.log_every"))
    python = [sys.executable, "-m", "stvdm.cli"]
    train = [*python, "train", "autoencoder", "--config=config.py", "--workdir=run"]
    run = subprocess.run([*python, "supervise", "--", *train], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == supervisor.DIVERGED
    assert "3 steps were skipped" in run.stderr and "starting again" not in run.stderr
    assert not (tmp_path / "run" / "model").exists()


def run_of(workdir):
    """(steps written, their losses, the model's bytes) of a finished training."""
    losses = [record["loss"] for record in read_metrics(workdir) if "loss" in record]
    return len(losses), losses, (workdir / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two processes come to when nothing happens; made by the first test that asks."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.py").write_text(CONFIG)
    supervise = [sys.executable, "-m", "stvdm.cli", "supervise", "--processes=2", "--"]
    train = [sys.executable, "-m", "stvdm.cli", "train", "autoencoder", "--config=config.py", "--workdir=run"]
    subprocess.run([*supervise, *train], cwd=folder, env=TWO_DEVICES, check=True)
    return run_of(folder / "run")


PATIENCE = "--xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
TWO_DEVICES = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {PATIENCE}"}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_every_worker_has_a_supervisor_of_its_own_and_one_of_them_is_killed(tmp_path, whole, killed):
    """As on a pod: no supervisor sees the worker of the other; they find each other by the same address again."""
    (tmp_path / "config.py").write_text(CONFIG)
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        job = {"STVDM_COORDINATOR": f"127.0.0.1:{probe.getsockname()[1]}", "STVDM_NUM_PROCESSES": "2"}
    supervise = [sys.executable, "-m", "stvdm.cli", "supervise", "--timeout-s=300", "--grace-s=20", "--"]
    train = [sys.executable, "-m", "stvdm.cli", "train", "autoencoder", "--config=config.py", "--workdir=run"]
    logs = [tmp_path / f"supervisor-{i}.log" for i in range(2)]
    supervisors = [
        subprocess.Popen(
            [*supervise, *train],
            cwd=tmp_path,
            env={**TWO_DEVICES, **job, "STVDM_PROCESS_ID": str(i)},
            stderr=log.open("w"),
        )
        for i, log in enumerate(logs)
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10, seconds=900)
        pid = supervisors[killed].pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert [process.wait(900) for process in supervisors] == [0, 0]
    finally:
        for process in supervisors:
            for _ in range(2 * (process.poll() is None)):  # asked twice, it leaves nothing behind
                process.terminate()
                time.sleep(1)
    said = [log.read_text() for log in logs]
    assert "the process was killed by SIGKILL" in said[killed], said[killed]
    assert [text.count("starting again in") for text in said] == [1, 1], said
    assert run_of(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, said",
    [
        (signal.SIGKILL, "process 1 was killed by SIGKILL"),
        (signal.SIGSTOP, "process 0 was killed by SIGABRT"),  # by JAX, which waits 100 s for the heart of the other
    ],
    ids=["killed", "frozen"],
)
def test_two_processes_train_one_is_lost_and_the_losses_go_on_as_if_nothing_had_happened(tmp_path, capfd, fault, said):
    (tmp_path / "config.py").write_text(CONFIG)
    patience = "--xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {patience}"}

    def start(workdir):
        python = [sys.executable, "-m", "stvdm.cli"]
        train = [*python, "train", "autoencoder", "--config=config.py", f"--workdir={workdir}"]
        supervise = [*python, "supervise", "--processes=2", "--timeout-s=180", "--grace-s=20", "--"]
        return subprocess.Popen([*supervise, *train], cwd=tmp_path, env=environment)

    def lines(workdir):
        path = tmp_path / workdir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    parts, whole = start("parts"), None
    try:
        wait_until(lambda: lines("parts") >= 10, seconds=900)
        killed_at = lines("parts")
        _, child = Path(f"/proc/{parts.pid}/task/{parts.pid}/children").read_text().split()
        os.kill(int(child), fault)
        assert parts.wait(900) == 0
        whole = start("whole")
        assert whole.wait(900) == 0
    finally:
        for process in filter(None, (whole, parts)):
            if process.poll() is None:
                for _ in range(2):  # asked twice, it leaves nothing behind
                    process.terminate()
                    time.sleep(1)
    assert said in capfd.readouterr().err
    assert 31 < lines("parts") < 31 + killed_at  # some steps again, but not from the first; one line is an evaluation
    losses = {name: [r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("whole", "parts")}
    assert len(losses["whole"]) == 30
    assert losses["parts"] == losses["whole"]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
