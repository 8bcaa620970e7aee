#!/usr/bin/env bash
# From a fresh clone to a quantized checkpoint: sets up .venv, then runs the main job.
# usage: bash scripts/quickstart.sh [any arguments of `quantforge quantize`]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
bash "$here/scripts/setup.sh" >&2
[ $# -gt 0 ] || set -- llama --budget 3bit -o out
exec "$here/.venv/bin/quantforge" quantize "$@"
