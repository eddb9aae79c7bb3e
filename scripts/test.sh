#!/usr/bin/env bash
# Environment, then lint, types and tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test

ruff format --check .
ruff check .
mypy
python -m pytest "$@"
