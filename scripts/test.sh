#!/usr/bin/env bash
# Runs the tests in the environment that setup.sh makes, in as many processes as there are cores.
# Their networks are so small that a second thread costs more than it gives.
# usage: bash scripts/test.sh [arguments of pytest]     (VENV: another environment than .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${VENV:-.venv}
bash scripts/setup.sh "$folder" >&2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$folder/bin/python" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
