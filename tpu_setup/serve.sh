#!/usr/bin/env bash
# Starts a sglang-jax server in the background on a slice of one worker. A fleet is several such
# slices. The server adds itself to the servers file, which the run polls (fleet.servers_file), and
# restarts to load new weights. Beside it runs a fetcher, at port + 200 (fleet.fetch_port).
#
#   tpu_setup/serve.sh --project=P --zone=us-east5-a --name=server-0 --topology=v6e:2x4 \
#     --model=gs://BUCKET/models/Qwen3-4B --versions=gs://BUCKET/run/versions \
#     --servers-file=gs://BUCKET/servers.txt -- --context-length=17408 --max-seq-len=17408
#
# --project=                           project that is billed
# --zone=                              zone of the slice
# --name=                              name of the slice
# --topology=                          topology of the slice
# --model=                             a checkpoint or a version, in a bucket or on the share
# --versions=''                        versions/ of a run in a bucket, to be fetched from there
# --port=30000                         port for requests of the run
# --servers-file=/mnt/oapl/servers.txt list of URLs that it adds itself to, or gs://
# --sglang-jax=main                    branch, tag or commit of sglang-jax
# --dry-run                            print the command, do nothing
# -- ...                               further flags of sgl_jax.launch_server
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/slices.sh"
. "$here/tpus.sh"

find_slice
((workers == 1)) || refuse "--topology=$topology has $workers workers, but a server runs on one;" \
  "create several slices of one worker, for example v6e:2x4"
on_workers all "$(quoted oapl_jax/tpu_setup/on_worker/job.sh start \
  oapl_jax/tpu_setup/on_worker/serve.sh --model="$model" --chips="$chips" --port="$port" \
  ${versions:+--versions="$versions"} \
  --servers-file="$servers_file" --sglang-jax="$sglang_jax" -- "${rest[@]}")"
