#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trainings on Cloud TPU VMs, from a single one to several slices, by queued resources.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/tpu_vm.sh ACTION NAME --zone=ZONE [--dry-run] [...]

  create   --accelerator=TYPE [--slices=N] [--spot | --reserved] [--runtime-version=V] [-- MORE GCLOUD FLAGS]
           ask for TPUs: v5litepod-16, v5p-8, v6e-64, ...; without --spot and --reserved they are on-demand
  wait     until they are there
  install  put the commit that is checked out here on all workers, with its packages
  mount    --data=gs://BUCKET[/FOLDER] [--writable]
           on all workers, to be read as the folder /mnt/data, or with --writable written to as well;
           in place of what was mounted there
  start    --chip=v5e|v5p|v6e [--timeout-s=900] -- stvdm train ... --workdir=gs://BUCKET/FOLDER
           on all workers; each has a supervisor that restarts what dies, or is silent for so long, and resumes it;
           or -- stvdm preprocess --host=auto ... --out=/mnt/data/FOLDER
  logs     of the first worker, as they come
  stop     on all workers: the training saves and leaves; the same start goes on from there
  delete   give the TPUs back

--dry-run prints the commands, quoted so that they can be pasted, and runs none.
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/commands.sh
. "$here/commands.sh"

if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    create | wait | install | mount | start | logs | stop | delete) action=$1 ;;
    *) die "ACTION='${1:-}': expected create, wait, install, mount, start, logs, stop or delete; --help explains them" ;;
esac
name=${2:-}
check_name "$name" 60
shift 2

zone="" accelerator="" slices=1 tier="" runtime="" chip="" data="" writable=no timeout=900
while [ $# -gt 0 ]; do
    case "$action $1" in
        *" --zone="*) zone=${1#*=} ;;
        *" --dry-run") dry_run=yes ;;
        "create --accelerator="*) accelerator=${1#*=} ;;
        "create --slices="*) slices=${1#*=} ;;
        "create --runtime-version="*) runtime=${1#*=} ;;
        "create --spot" | "create --reserved")
            [ -z "$tier" ] || die "$tier and $1: expected one of them at most, so leave one out"
            tier=$1
            ;;
        "mount --data="*) data=${1#*=} ;;
        "mount --writable") writable=yes ;;
        "start --chip="*) chip=${1#*=} ;;
        "start --timeout-s="*) timeout=${1#*=} ;;
        "create --" | "start --")
            shift
            break
            ;;
        *) die "'$1': $action takes no such argument; --help lists what it takes" ;;
    esac
    shift
done
[ -n "$zone" ] || die "--zone is missing: expected the zone of the TPUs; e.g. --zone=us-east5-b"

qr() { # qr VERB ARGUMENT...: of gcloud's queued resources
    run gcloud compute tpus queued-resources "$@" --zone="$zone"
}

everywhere() { # everywhere COMMAND: a line of shell, on all workers of all slices
    qr ssh "$name" --node=all --worker=all --command="$1"
}

case "$action" in
    create)
        check_count --slices "$slices"
        # https://docs.cloud.google.com/tpu/docs/runtimes
        case "$accelerator" in
            v5litepod-[1-9]*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
            v5p-[1-9]*) runtime=${runtime:-v2-alpha-tpuv5} ;;
            v6e-[1-9]*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
            tpu7x*) die "--accelerator=$accelerator: TPU7x is only to be had in GKE, so use launch/gke.sh" ;;
            *) die "--accelerator='$accelerator': expected v5litepod-N, v5p-N or v6e-N; e.g. --accelerator=v6e-16" ;;
        esac
        nodes=(--node-id="$name")
        if [ "$slices" -gt 1 ]; then nodes=(--node-count="$slices" --node-prefix="$name"); fi
        qr create "$name" --accelerator-type="$accelerator" --runtime-version="$runtime" "${nodes[@]}" \
            ${tier:+"$tier"} "$@"
        ;;
    wait)
        while true; do
            state=$(qr describe "$name" --format="value(state.state)")
            echo "$state"
            if [ "$dry_run" = yes ]; then break; fi
            case "$state" in
                ACTIVE) break ;;
                FAILED | SUSPENDING | SUSPENDED | DELETING)
                    die "$name is $state: expected that it becomes ACTIVE; delete it and create it anew" ;;
            esac
            sleep 30
        done
        ;;
    install)
        archive=stvdm-install-$(id -u).tar.gz
        if [ -n "$(git -C "$here/.." status --porcelain)" ]; then
            echo "${0##*/}: what is not committed stays here" >&2
        fi
        run git -C "$here/.." archive --format=tar.gz --output="${TMPDIR:-/tmp}/$archive" HEAD
        qr scp "${TMPDIR:-/tmp}/$archive" "$name:$archive" --node=all --worker=all
        run rm -f "${TMPDIR:-/tmp}/$archive"
        # The image's own Python is older than 3.11; uv brings one.
        everywhere "rm -rf stvdm && mkdir stvdm && tar -xzf $archive -C stvdm && cd stvdm \
&& python3 -m pip install --user --quiet --upgrade uv && ~/.local/bin/uv venv --quiet --python 3.11 .venv \
&& ~/.local/bin/uv pip install --quiet --python .venv -e '.[tpu]' && .venv/bin/stvdm --version"
        ;;
    mount)
        check_data --data "$data"
        # https://docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
        # shellcheck disable=SC2016 # the release's name is the worker's
        repository='deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main'
        # On a machine that has just booted, unattended upgrades hold the lock.
        fuse="command -v gcsfuse || { curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg \
| sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && echo \"$repository\" \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list && sudo apt-get update -qq \
&& sudo apt-get install -qq -y -o DPkg::Lock::Timeout=600 gcsfuse; }"
        options=(--implicit-dirs)
        if [ "$writable" = no ]; then options+=(-o ro); fi
        if [ -n "$folder" ]; then options+=(--only-dir="$folder"); fi
        # What was mounted goes first: of one whose gcsfuse has died all but that fails.
        everywhere "{ $fuse; } && { ! grep -q ' /mnt/data ' /proc/mounts || fusermount -u /mnt/data; } \
&& sudo mkdir -p /mnt/data && sudo chown \"\$(id -u)\" /mnt/data && gcsfuse $(quoted "${options[@]}" "$bucket") /mnt/data"
        ;;
    start)
        case "$chip" in
            v5e | v5p | v6e) ;;
            *) die "--chip='$chip': expected v5e, v5p or v6e, for the compiler's flags; v5litepod is v5e" ;;
        esac
        check_count --timeout-s "$timeout"
        check_command "$@"
        # A file, since systemd has its own ideas about $ and % in arguments. The unit keeps the run when ssh ends, lets
        # the supervisor alone be asked to stop, when the machine is taken away too, cannot be started twice, and may pin
        # the memory that libtpu sends from.
        # shellcheck disable=SC2016 # $HOME and $PATH are the worker's
        script='export PATH="$HOME/stvdm/.venv/bin:$PATH"; exec stvdm supervise --grace-s=120'
        script="$script $(quoted --timeout-s="$timeout" --chip="$chip" -- "$@")"
        # A machine that booted again has no mount, but still the empty folder, which takes what is written to it.
        mounted=""
        case "$*" in */mnt/data*)
            mounted='{ mountpoint -q /mnt/data || { echo "/mnt/data is not mounted: expected the bucket, so mount it first" >&2; exit 1; }; } && '
            ;;
        esac
        everywhere "${mounted}cd stvdm && printf '%s\\n' $(quoted "$script") > start.sh && sudo systemd-run --unit=stvdm --collect \
--uid=\"\$(id -u)\" --working-directory=\"\$PWD\" --property=KillMode=mixed --property=TimeoutStopSec=150 \
--property=LimitMEMLOCK=infinity /bin/bash \"\$PWD/start.sh\""
        ;;
    logs) qr ssh "$name" --node=0 --worker=0 --command="sudo journalctl --unit=stvdm --lines=100 --follow" ;;
    stop) everywhere "sudo systemctl stop stvdm" ;;
    delete) qr delete "$name" --force --quiet ;;
esac
