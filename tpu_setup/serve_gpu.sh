#!/usr/bin/env bash
# Starts an SGLang server in the background on a machine with GPUs that ssh reaches. The machine
# needs its driver, and a network that the slice reaches.
#
#   tpu_setup/serve_gpu.sh --host=me@gpu-0 --share=10.1.2.3:/oapl --gpus=8 \
#     --model=/mnt/oapl/models/Qwen3-4B -- --context-length=17408
#
# --host=                              ssh destination
# --share=                             NFS export, ADDRESS:/oapl, mounted as /mnt/oapl
# --model=                             a checkpoint or a published version, on the share
# --gpus=1                             number of GPUs to split the model over
# --port=30000                         port for requests of the run
# --servers-file=/mnt/oapl/servers.txt list of URLs that the server adds itself to
# --dry-run                            print the commands, do nothing
# -- ...                               further flags of sglang.launch_server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) # scp copies the directory under its name
. "$here/flags.sh"

run ssh "$host" mkdir -p oapl_jax
run scp -r "$here" "$host:oapl_jax/"
run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/mount.sh --share="$share")"
run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/job.sh start \
  oapl_jax/tpu_setup/on_worker/serve_gpu.sh --model="$model" --gpus="$gpus" --port="$port" \
  --servers-file="$servers_file" -- "${rest[@]}")"
