#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trainings on TPU slices of a GKE cluster, one or many, as a JobSet; labelled as XPK does for its queue.
set -euo pipefail

usage() {
    cat <<'EOF'
launch/gke.sh ACTION NAME [--dry-run] [...]

  start    --chip=v5e|v5p|v6e|tpu7x --topology=4x4 --image=IMAGE [--slices=N] [--spot] [--chips-per-host=4]
           [--queue=multislice-queue] [--service-account=ACCOUNT] [--data=gs://BUCKET[/FOLDER] [--writable]]
           [--timeout-s=900] -- stvdm train ... --workdir=gs://BUCKET/FOLDER
           or -- stvdm preprocess --host=auto ... --out=/mnt/data/FOLDER
  status   of its pods
  logs     of the first one, as they come
  stop     the training saves and leaves; the same start goes on from there

It talks to the cluster of kubectl's context, which has JobSet and node pools of such slices: made by XPK, by Cluster
Toolkit or by hand. --data is to be read as the folder /mnt/data, or with --writable written to as well, by GKE's driver
of Cloud Storage FUSE, as --service-account; what is named gs:// goes by the service account of the node pool. What is
silent for --timeout-s is started again. --dry-run prints the commands, quoted so that they can be pasted, and runs none.
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
    start | status | logs | stop) action=$1 ;;
    *) die "ACTION='${1:-}': expected start, status, logs or stop; --help explains them" ;;
esac
name=${2:-}
check_name "$name" 40 # the names of pods, which have 63, begin with it
shift 2

chip="" topology="" image="" slices=1 per_host=4 spot="" queue="" account=default data="" bucket="" folder=""
read_only=true timeout=900
while [ $# -gt 0 ]; do
    case "$action $1" in
        *" --dry-run") dry_run=yes ;;
        "start --chip="*) chip=${1#*=} ;;
        "start --topology="*) topology=${1#*=} ;;
        "start --image="*) image=${1#*=} ;;
        "start --slices="*) slices=${1#*=} ;;
        "start --chips-per-host="*) per_host=${1#*=} ;;
        "start --spot") spot=yes ;;
        "start --queue="*) queue=${1#*=} ;;
        "start --service-account="*) account=${1#*=} ;;
        "start --data="*) data=${1#*=} ;;
        "start --writable") read_only=false ;;
        "start --timeout-s="*) timeout=${1#*=} ;;
        "start --")
            shift
            break
            ;;
        *) die "'$1': $action takes no such argument; --help lists what it takes" ;;
    esac
    shift
done

json() { # json WORD...: a list of JSON strings, which are YAML too; Kubernetes reads $$ as $
    local word separator=""
    for word in "$@"; do
        word=${word//\\/\\\\}
        word=${word//\"/\\\"}
        word=${word//$'\n'/\\n}
        word=${word//$'\t'/\\t}
        word=${word//\$/\$\$}
        printf '%s"%s"' "$separator" "$word"
        separator=", "
    done
}

manifest() { # manifest COMMAND...
    cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a slice's pods share a node pool
  labels: {$labels}
spec:
  failurePolicy:
    maxRestarts: 10
    rules:
    - action: RestartJobSetAndIgnoreMaxRestarts  # taken away, or left after saving
      onJobFailureReasons: [PodFailurePolicy]
    - action: FailJobSet  # refused, or given up by a supervisor: the same would come of it again
      onJobFailureReasons: [BackoffLimitExceeded]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: stvdm, operator: In, values: [75]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
          metadata:
            annotations: {$annotations}
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            terminationGracePeriodSeconds: 150
            serviceAccountName: $(json "$account")
            nodeSelector: {$nodes}
            containers:
            - name: stvdm
              image: $(json "$image")
              command: [$(json stvdm supervise --grace-s=120 --timeout-s="$timeout" --chip="$chip" -- "$@")]
              securityContext: {privileged: true}  # opens /dev/vfio, and pins the memory that libtpu sends from
              ports: [{containerPort: 8471}, {containerPort: 8080}]  # between chips' hosts; between slices
              resources:
                requests: {google.com/tpu: $tpus}
                limits: {google.com/tpu: $tpus}
EOF
    if [ -n "$bucket" ]; then
        local options=implicit-dirs
        if [ -n "$folder" ]; then options=$options,only-dir=$folder; fi
        cat <<EOF
              volumeMounts: [{name: data, mountPath: /mnt/data, readOnly: $read_only}]
            volumes:
            - name: data
              csi:
                driver: gcsfuse.csi.storage.gke.io
                readOnly: $read_only
                volumeAttributes: {bucketName: $(json "$bucket"), mountOptions: $(json "$options"), hostNetworkPodKSA: "true"}
EOF
    fi
}

case "$action" in
    start)
        # https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
        case "$chip" in
            v5e) accelerator=tpu-v5-lite-podslice shape='^[1-9][0-9]*x[1-9][0-9]*$' example=4x4 ;;
            v6e) accelerator=tpu-v6e-slice shape='^[1-9][0-9]*x[1-9][0-9]*$' example=4x4 ;;
            v5p) accelerator=tpu-v5p-slice shape='^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$' example=2x2x4 ;;
            tpu7x) accelerator=tpu7x shape='^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$' example=2x2x4 ;;
            *) die "--chip='$chip': expected v5e, v5p, v6e or tpu7x" ;;
        esac
        [[ $topology =~ $shape ]] || die "--topology='$topology': expected the shape of a $chip slice; e.g. --topology=$example"
        [ -n "$image" ] || die "--image is missing: expected one that has stvdm; launch/Dockerfile makes it"
        check_count --slices "$slices"
        check_count --chips-per-host "$per_host"
        check_count --timeout-s "$timeout"
        check_command "$@"
        chips=$((${topology//x/*}))
        if [ "$chips" -le "$per_host" ]; then
            hosts=1 tpus=$chips
        elif [ $((chips % per_host)) -eq 0 ]; then
            hosts=$((chips / per_host)) tpus=$per_host
        else
            die "--topology=$topology, --chips-per-host=$per_host: $chips chips do not divide over such hosts; give the N of" \
                "the node pool's machine type, ...-Nt"
        fi
        labels="" annotations=""
        if [ -n "$data" ]; then
            check_data --data "$data"
            annotations='gke-gcsfuse/volumes: "true"'
        elif [ "$read_only" = false ]; then
            die "--writable: expected --data=gs://BUCKET too, which is what would be written to; give it or leave --writable out"
        fi
        nodes="cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology"
        if [ -n "$queue" ]; then labels="kueue.x-k8s.io/queue-name: $(json "$queue")"; fi
        if [ "$spot" = yes ]; then nodes="$nodes, cloud.google.com/gke-spot: \"true\""; fi
        if [ "$dry_run" = yes ]; then
            printf "kubectl create --filename=- <<'JOBSET'\n%s\nJOBSET\n" "$(manifest "$@")"
        else
            manifest "$@" | kubectl create --filename=-
        fi
        ;;
    status) run kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide ;;
    logs) # of process 0, which alone tells of progress: of job/NAME kubectl takes the pod that was ready first
        first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
        run kubectl logs --selector="$first" --container=stvdm --follow --tail=100
        ;;
    stop) run kubectl delete jobset "$name" ;;
esac
