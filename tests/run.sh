#!/usr/bin/env bash
# Make a virtual environment, install AsymCheck with its tools, and run every check.
# Arguments go to pytest (for instance: -k crash, or -m long). PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu # DeepSpeed compiles nothing, and looks for no device
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
pyright
lint-imports
# Half of the time tests wait, for servers and for each other: three files at a time on two cores.
pytest -n 3 --dist loadfile --cov=asymcheck --cov-report=term --cov-fail-under=90 "$@"
