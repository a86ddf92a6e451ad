#!/usr/bin/env bash
# Starts an SGLang server on a machine with GPUs, wherever ssh reaches it, in the background, and
# returns. The machine must be in a network that the slice reaches, and have its driver.
#
#   tpu_setup/serve_gpu.sh --host=me@gpu-0 --share=10.1.2.3:/oapl --gpus=8 \
#     --model=/mnt/oapl/models/Qwen3-4B -- --context-length=17408
#
# --host=                              as ssh takes it
# --share=                             NFS, mounted as /mnt/oapl: what create_share.sh printed
# --model=                             a checkpoint or a published version, on the share
# --gpus=1                             over which the model is split
# --port=30000                         that the run calls
# --servers-file=/mnt/oapl/servers.txt that the server enters itself into
# --dry-run                            print the commands, do nothing
# -- ...                               further flags of sglang.launch_server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) # scp names the copy after it
. "$here/flags.sh"

run ssh "$host" mkdir -p oapl_jax
run scp -r "$here" "$host:oapl_jax/"
run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/mount.sh --share="$share")"
run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/job.sh start \
  oapl_jax/tpu_setup/on_worker/serve_gpu.sh --model="$model" --gpus="$gpus" --port="$port" \
  --servers-file="$servers_file" -- "${rest[@]}")"
