#!/usr/bin/env bash
# On a worker, or in a container: Python, the package and libtpu, in .venv beside tpu_setup.
set -euo pipefail
cd "$(dirname "$0")/../.."

# It brings its own Python where the machine's is too old.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.11 .venv
python3 -m uv pip install --quiet --python=.venv --constraint=requirements/run.lock \
  --editable '.[tpu,gcs]'
