#!/usr/bin/env bash
# Runs the tests in the environment that setup.sh makes.
# usage: bash scripts/test.sh [arguments of pytest]     (VENV: another environment than .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${VENV:-.venv}
bash scripts/setup.sh "$folder" >&2
exec "$folder/bin/python" -m pytest "$@"
