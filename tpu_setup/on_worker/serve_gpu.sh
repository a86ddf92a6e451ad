#!/usr/bin/env bash
# On a machine with GPUs: runs an SGLang server, which loads new weights without a restart.
#
# --model=          a checkpoint or a published version
# --gpus=           number of GPUs to split the model over
# --port=           port for requests of the run
# --servers-file=   list of URLs that the server adds itself to
# -- ...            further flags of sglang.launch_server
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/fleet.sh"

PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.11 ~/sglang
python3 -m uv pip install --quiet --python="$HOME/sglang" 'sglang>=0.5'

enter "$servers_file" "http://$(address):$port"
exec ~/sglang/bin/python -m sglang.launch_server --model-path="$model" --host="$(address)" \
  --port="$port" --tp-size="$gpus" --dtype=bfloat16 "${rest[@]}"
