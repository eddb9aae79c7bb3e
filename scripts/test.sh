#!/usr/bin/env bash
# Environment, then lint, types and tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test

ruff format --check .
ruff check .
mypy
# A test computes with one thread, so each core has tests of its own; four at most, each taking about 1 GiB.
python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
