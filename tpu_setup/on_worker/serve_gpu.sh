#!/usr/bin/env bash
# On a machine with GPUs: runs an SGLang server, which loads new weights without a restart.
#
# --model=          a checkpoint or a published version
# --gpus=           number of GPUs to split the model over
# --port=           port for requests of the run
# --versions=''     versions/ of a run in a bucket, to be fetched from there
# --servers-file=   list of URLs that the server adds itself to
# -- ...            further flags of sglang.launch_server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../flags.sh"
. "$here/fleet.sh"

PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.11 ~/sglang
python3 -m uv pip install --quiet --python="$HOME/sglang" 'sglang>=0.5'

if [[ "$versions$model$servers_file" == *gs://* ]]; then # the fetcher, without a TPU's library
  cd "$here/../.."
  python3 -m uv venv --quiet --allow-existing --python=3.11 .venv
  python3 -m uv pip install --quiet --python=.venv --constraint=requirements/run.lock \
    --editable '.[gcs]'
fi
bring "$model"
fetch_beside "$versions" $((port + 200))
enter "$servers_file" "http://$(address):$port"
exec ~/sglang/bin/python -m sglang.launch_server --model-path="$model" --host="$(address)" \
  --port="$port" --tp-size="$gpus" --dtype=bfloat16 "${rest[@]}"
