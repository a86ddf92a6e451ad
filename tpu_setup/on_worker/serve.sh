#!/usr/bin/env bash
# On a worker: runs a sglang-jax server behind the proxy that restarts it with new weights.
#
# --model=          a checkpoint or a published version
# --chips=          chips of this machine, to split the model over
# --port=           port for requests of the run
# --versions=''     versions/ of a run in a bucket, to be fetched from there
# --servers-file=   list of URLs that the server adds itself to
# --sglang-jax=     branch, tag or commit of sglang-jax
# -- ...            further flags of sgl_jax.launch_server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../flags.sh"
. "$here/fleet.sh"

cd "$here/../.."
source=https://github.com/sgl-project/sglang-jax.git@$sglang_jax
python3 -m uv venv --quiet --allow-existing --python=3.12 ~/sglang-jax
python3 -m uv pip install --quiet --python="$HOME/sglang-jax" \
  "sglang-jax[tpu] @ git+$source#subdirectory=python"

bring "$model"
fetch_beside "$versions" $((port + 200))
enter "$servers_file" "http://$(address):$port"
# The server has the chips, so the proxy runs on the CPU. The compile cache shortens restarts.
exec env JAX_PLATFORMS=cpu .venv/bin/python -m oapl_jax.fleet.restart_proxy \
  --host="$(address)" --port="$port" --server_port=$((port + 100)) --model="$model" \
  --deadline=900 -- \
  env JAX_PLATFORMS=tpu JAX_COMPILATION_CACHE_DIR="$HOME/compile-cache" \
  ~/sglang-jax/bin/python -m sgl_jax.launch_server --model-path='{model}' --host=127.0.0.1 \
  --port='{port}' --device=tpu --tp-size="$chips" --dtype=bfloat16 --skip-server-warmup \
  "${rest[@]}"
