#!/usr/bin/env bash
# Starts an SGLang server in the background on a machine with GPUs that ssh reaches. The machine
# needs its driver, and a network that the slice reaches. Beside it runs a fetcher of versions, at
# port + 200 (fleet.fetch_port).
#
#   tpu_setup/serve_gpu.sh --host=me@gpu-0 --gpus=8 --model=gs://BUCKET/models/Qwen3-4B \
#     --versions=gs://BUCKET/run/versions --servers-file=gs://BUCKET/servers.txt \
#     -- --context-length=17408
#
# --host=                              ssh destination
# --share=''                           NFS export to mount as /mnt/oapl, ADDRESS:/oapl
# --model=                             a checkpoint or a version, in a bucket or on the share
# --versions=''                        versions/ of a run in a bucket, to be fetched from there
# --gpus=1                             number of GPUs to split the model over
# --port=30000                         port for requests of the run
# --servers-file=/mnt/oapl/servers.txt list of URLs that it adds itself to, or gs://
# --commit=HEAD                        commit of this checkout, for the fetcher
# --dry-run                            print the commands, do nothing
# -- ...                               further flags of sglang.launch_server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) # scp copies the directory under its name
. "$here/flags.sh"

find_commit
archive=${TMPDIR:-/tmp}/oapl_jax-$commit.tar.gz
run git -C "$root" archive --prefix=oapl_jax/ --output="$archive" "$commit"
run scp "$archive" "$host:oapl_jax.tar.gz"
run ssh "$host" tar -xzf oapl_jax.tar.gz
[[ ! $share ]] || run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/mount.sh --share="$share")"
run ssh "$host" "$(quoted oapl_jax/tpu_setup/on_worker/job.sh start \
  oapl_jax/tpu_setup/on_worker/serve_gpu.sh --model="$model" --gpus="$gpus" --port="$port" \
  ${versions:+--versions="$versions"} \
  --servers-file="$servers_file" -- "${rest[@]}")"
