#!/usr/bin/env bash
# On a worker or in a container: installs Python, the package and libtpu into .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."

# uv brings a Python if the machine's is too old.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.11 .venv
python3 -m uv pip install --quiet --python=.venv --constraint=requirements/run.lock \
  --editable '.[tpu,gcs]'
