# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced by the scripts beside it: a command is run, or with --dry-run printed as it would be typed.

dry_run=no

die() { # die MESSAGE...: got, expected, what to change
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

quoted() { # quoted WORD...: one line that a shell reads back as exactly these words
    local word escaped="'\\''" separator=""
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/$escaped}'"; fi
        printf '%s%s' "$separator" "$word"
        separator=" "
    done
}

run() { # run COMMAND...
    if [ "$dry_run" = yes ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

check_name() { # check_name NAME LONGEST
    if [[ ! $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || [ "${#1}" -gt "$2" ]; then
        die "NAME='$1': expected at most $2 lower-case letters, digits and hyphens, a letter first; e.g. dit-large"
    fi
}

check_count() { # check_count FLAG VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2: expected a whole number of at least 1; e.g. $1=2"
}

check_data() { # check_data FLAG VALUE: sets bucket and folder, which is empty for the whole bucket
    [[ $2 =~ ^gs://[a-z0-9][a-z0-9._-]+(/[^,]*)?$ ]] || die "$1=$2: expected gs://BUCKET or gs://BUCKET/FOLDER; e.g. $1=gs://bucket/latents"
    bucket=${2#gs://} folder=""
    case "$bucket" in */*) folder=${bucket#*/} bucket=${bucket%%/*} ;; esac
    folder=${folder%/}
}

check_command() { # check_command COMMAND...: there is one, what it writes outlives these machines, and workers share the work
    [ $# -gt 0 ] || die "start: got no command, expected one after --; e.g. -- stvdm train dit --config=... --workdir=gs://..."
    local word before="" making=no shared_out=no
    for word in "$@"; do
        case "$before$word" in
            --workdir=gs://?* | "--workdir gs://"?*) ;;
            preprocess) making=yes ;;
            --host=auto | "--host auto") shared_out=yes ;;
            --out=/mnt/data/?* | "--out /mnt/data/"?*) ;;
            --out=* | "--out "*)
                die "--out=${word#--out=}: expected a folder in /mnt/data, where all workers see the bucket and may write to it" \
                    "once it is mounted --writable"
                ;;
            --workdir=* | "--workdir "*)
                die "--workdir=${word#--workdir=}: expected gs://BUCKET/FOLDER, which all workers share and which outlives them"
                ;;
        esac
        before=""
        case "$word" in --workdir | --out | --host) before="$word " ;; esac
    done
    if [ "$making" = yes ] && [ "$shared_out" = no ]; then
        die "preprocess: got no --host=auto, without which all workers would make all latents; add it"
    fi
}
