#!/usr/bin/env bash
# Make a virtual environment, install AsymCheck, and train, kill and resume a small GPT-2.
# Arguments go to examples/train_gpt2.py (see its --help). PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[torch,plot]'
exec .venv/bin/python examples/train_gpt2.py "$@"
