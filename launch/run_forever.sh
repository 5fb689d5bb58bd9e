#!/usr/bin/env bash
# Trains on this host until it is done, starting again whenever that is all it takes (status 75, or
# killed):
#   bash launch/run_forever.sh --config=configs/NAME.py --workdir=DIR [more flags of train]
# The same line on every host of a run. PYTHON: interpreter (default .venv/bin/python, else python3).
# PLATFORM: tpu, gpu or cpu (default: what the host has). STATUS_FILE: where the last status is
# written. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/env.sh

if [[ $# -eq 0 ]]; then
    echo "usage: bash launch/run_forever.sh --config=configs/NAME.py --workdir=DIR [flags of train]" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
set_compiler_flags "${PLATFORM:-$(detect_platform)}"
command=("$python" -m st4vla_jax.train "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
    echo "XLA_FLAGS=${XLA_FLAGS:-}"
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
status=0
run_until_done "${command[@]}" || status=$?
[[ -z ${STATUS_FILE:-} ]] || echo "$status" >"$STATUS_FILE"
exit "$status"
