#!/usr/bin/env bash
# Makes a virtual environment (default: .venv) with quantforge and its tools, once.
# usage: bash scripts/setup.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv}
stamp=$folder/.quantforge-ready

# Done before, from the same pyproject.toml and at the same place: nothing to do.
ready=$(cat "$stamp" 2>/dev/null || true)
wanted=$PWD:$(cksum <pyproject.toml)
[ "$ready" = "$wanted" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: quantforge needs Python 3.11 or newer; set PYTHON to one" >&2
  exit 2
}
"$python" -m venv "$folder"
# Modules are compiled when they are first imported: most of them never are.
install=("$folder/bin/python" -m pip --disable-pip-version-check install --no-input --no-compile)

# torch first and pinned: pip then keeps a CPU build where it finds one, and the project's own
# requirement (torch>=2.6) takes nothing newer. Linux wheels from PyPI bring CUDA, about 3 GB.
"${install[@]}" torch==2.13.0
"${install[@]}" --editable '.[dev]'
echo "$wanted" >"$stamp"
