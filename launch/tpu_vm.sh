#!/usr/bin/env bash
# A training run on Google Cloud TPUs, from nothing to done: bash launch/tpu_vm.sh COMMAND [flags of train]
#   create    asks for the TPUs (a queued resource) and waits until they are there
#   install   copies this checkout to every host and installs it; mounts the disks
#   run       starts training on every host, detached; flags of train follow
#   logs      follows host WORKER's log (default 0; "all" for every host)
#   status    state of the queued resource, and which hosts train
#   stop      asks training to save and end (SIGTERM); the TPUs stay
#   keep      create, install and run, and all again after a preemption, until training is done
#   delete    gives the TPUs back
# Settings, by environment variables:
#   NAME, PROJECT, ZONE      required
#   TYPE                     accelerator type, e.g. v5litepod-64, v5p-128, v6e-64; required to create
#   SLICES                   slices of that type (default 1), joined over the data-centre network
#   SPOT=1                   preemptible
#   VERSION                  runtime image (default: the TYPE's)
#   NFS=HOST:/SHARE          Filestore share, mounted at /mnt/st4vla on every host: workdir and data
#   DATA_DISK=DISK           persistent disk with the data, read-only at /mnt/data on every host
#   CACHE=gs://BUCKET/DIR    bucket for compiled programs, so that a restart need not compile
#   WORKER                   host whose log to follow
#   DRY_RUN=1                prints every command and runs none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

POLL_S=${POLL_S:-60}
REMOTE=st4vla_jax # below the home folder of every host
# run.status is written when training ends, run.pid when it is started
TRAINING="[ ! -e $REMOTE/run.status ] && kill -0 \$(cat $REMOTE/run.pid 2>/dev/null) 2>/dev/null"
STOP_IF_TRAINING="if $TRAINING; then
    echo 'training runs here: stop it first' >&2; exit 1
fi"

fail() {
    echo "error: $1" >&2
    exit 2
}

# Prints a command, and runs it unless DRY_RUN=1: execute COMMAND
execute() {
    printf '+' >&2
    printf ' %q' "$@" >&2
    printf '\n' >&2
    [[ ${DRY_RUN:-0} == 1 ]] || "$@"
}

require() {
    local missing=() name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || missing+=("$name")
    done
    [[ ${#missing[@]} -eq 0 ]] || fail "not set: ${missing[*]} (bash launch/tpu_vm.sh prints what they are)"
}

runtime_image() {
    case $TYPE in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "TYPE=$TYPE: need v4-N, v5litepod-N, v5p-N or v6e-N, or set VERSION" ;;
    esac
}

gcloud_tpu() {
    local group=$1 verb=$2
    shift 2
    execute gcloud compute tpus "$group" "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

nodes() {
    local slices=${SLICES:-1} i
    if [[ $slices -eq 1 ]]; then
        echo "${NAME:?}"
    else
        for ((i = 0; i < slices; i++)); do echo "$NAME-$i"; done
    fi
}

# Runs a shell command on hosts of every slice: on_hosts WORKER COMMAND
on_hosts() {
    local node
    for node in $(nodes); do
        gcloud_tpu tpu-vm ssh "$node" --worker="$1" --command="$2"
    done
}

state() {
    gcloud_tpu queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

# Asks for the TPUs.
request() {
    require TYPE
    local image=${VERSION:-} args
    [[ -n $image ]] || image=$(runtime_image)
    args=("$NAME" --accelerator-type="$TYPE" --runtime-version="$image")
    if [[ ${SLICES:-1} -gt 1 ]]; then
        args+=(--node-count="$SLICES" --node-prefix="$NAME")
    else
        args+=(--node-id="$NAME")
    fi
    [[ ${SPOT:-0} != 1 ]] || args+=(--spot)
    [[ -z ${DATA_DISK:-} ]] ||
        args+=(--data-disk="source=projects/$PROJECT/zones/$ZONE/disks/$DATA_DISK,mode=read-only")
    gcloud_tpu queued-resources create "${args[@]}"
}

# Fails if the request has come to an end without TPUs.
wait_until_active() {
    local found
    [[ ${DRY_RUN:-0} != 1 ]] || return 0
    while found=$(state) && [[ $found != ACTIVE ]]; do
        echo "$(date -u +%FT%TZ) $NAME: $found" >&2
        case $found in FAILED | SUSPENDED | SUSPENDING | DELETING) return 1 ;; esac
        sleep "$POLL_S"
    done
}

create() {
    request
    wait_until_active || fail "no TPUs for $NAME: bash launch/tpu_vm.sh status, then delete and create"
}

install() {
    local bundle mounts='' node
    bundle=$(mktemp -d)/st4vla_jax.bundle
    # A bundle keeps the revision, which checkpoints record and hosts compare, and needs no login.
    execute git bundle create --quiet "$bundle" HEAD
    for node in $(nodes); do
        gcloud_tpu tpu-vm scp "$bundle" "$node:st4vla_jax.bundle" --worker=all
    done
    if [[ -n ${NFS:-} ]]; then
        mounts+="
sudo apt-get install -qq -y nfs-common
sudo mkdir -p /mnt/st4vla
mountpoint -q /mnt/st4vla || sudo mount -t nfs '$NFS' /mnt/st4vla"
    fi
    if [[ -n ${DATA_DISK:-} ]]; then
        mounts+="
sudo mkdir -p /mnt/data
mountpoint -q /mnt/data || sudo mount -o ro,noload /dev/disk/by-id/google-persistent-disk-1 /mnt/data"
    fi
    # Huge pages: without them the TPU runtime takes minutes to start and to end (jax warns of it).
    # uv brings a Python, since the images have 3.10.
    on_hosts all "set -e
$STOP_IF_TRAINING
sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
sudo apt-get update -qq
sudo apt-get install -qq -y git curl$mounts
command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
rm -rf $REMOTE
git clone --quiet st4vla_jax.bundle $REMOTE
cd $REMOTE
~/.local/bin/uv venv --quiet --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python '.[tpu]'"
}

start() {
    [[ $# -gt 0 ]] || fail "run needs the flags of train: --config=configs/NAME.py --workdir=DIR"
    local flags
    [[ -z ${CACHE:-} ]] || set -- "$@" "--config.log.cache_dir=$CACHE"
    flags=$(printf ' %q' "$@")
    on_hosts all "set -e
$STOP_IF_TRAINING
cd $REMOTE
rm -f run.status
PLATFORM=tpu STATUS_FILE=run.status nohup setsid bash launch/run_forever.sh$flags >> train.log 2>&1 < /dev/null &
echo \$! > run.pid"
}

logs() {
    on_hosts "${WORKER:-0}" "tail -n 100 -F $REMOTE/train.log"
}

status() {
    gcloud_tpu queued-resources describe "$NAME"
    on_hosts all "if $TRAINING; then
    echo \"\$(hostname): training\"
else
    echo \"\$(hostname): ended with \$(cat $REMOTE/run.status 2>/dev/null || echo nothing)\"
fi
tail -n 1 $REMOTE/train.log"
}

stop() {
    # The loop passes it on to training, and then starts nothing again.
    on_hosts all "cd $REMOTE && kill -TERM \$(cat run.pid)"
}

delete() {
    gcloud_tpu queued-resources delete "$NAME" --force --quiet
}

# Prints how training on host 0 ended, or "running".
training() {
    on_hosts 0 "cat $REMOTE/run.status 2>/dev/null || echo running" 2>/dev/null | head -n 1 || true
}

keep() {
    local found now
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        create
        install
        start "$@"
        return
    fi
    while true; do
        found=$(state)
        if [[ $found != ACTIVE ]]; then
            # After a preemption the resource is SUSPENDED and cannot be used again.
            [[ $found == ABSENT ]] || delete
            request
            wait_until_active || continue
            install
            start "$@"
        fi
        while [[ $(state) == ACTIVE ]]; do
            now=$(training)
            case $now in
                running | 75 | '') sleep "$POLL_S" ;;
                0)
                    echo "training is done; the TPUs are still there: bash launch/tpu_vm.sh delete" >&2
                    return 0
                    ;;
                *) fail "training ended with $now: bash launch/tpu_vm.sh logs" ;;
            esac
        done
        echo "$(date -u +%FT%TZ) $NAME is gone: asking for new TPUs" >&2
    done
}

command=${1:-}
case $command in
    create | install | logs | status | stop | delete)
        require NAME PROJECT ZONE
        [[ $# -eq 1 ]] || fail "$command takes no flags"
        "$command"
        ;;
    run | keep)
        require NAME PROJECT ZONE
        shift
        if [[ $command == run ]]; then start "$@"; else keep "$@"; fi
        ;;
    *)
        sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "launch/$(basename "${BASH_SOURCE[0]}")" >&2
        exit 2
        ;;
esac
