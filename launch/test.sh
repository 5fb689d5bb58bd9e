#!/usr/bin/env bash
# Sets up and runs the whole test suite: bash launch/test.sh [pytest arguments]
#   VENV=DIR   virtual environment to make or reuse (default .venv)
#   PYTHON=EXE interpreter to make it with (default python3; 3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
if [[ ! -x $venv/bin/python ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
python=$venv/bin/python
# torch first and pinned: any later request is then satisfied and pulls no CUDA packages.
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet --editable '.[test,torch,tpu]'

"$python" -m ruff format --check .
"$python" -m ruff check .

export JAX_PLATFORMS=cpu
# libtpu is installed for ahead-of-time compilation only: several processes may load it, no logs,
# no questions to a metadata server.
export ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled TPU_SKIP_MDS_QUERY=1
export TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_HOSTNAMES=localhost
exec "$python" -m pytest tests -n "${TEST_WORKERS:-2}" --dist=worksteal -m "not slow" "$@"
