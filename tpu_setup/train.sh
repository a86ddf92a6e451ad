#!/usr/bin/env bash
# Starts a run in the background on every worker of a slice. The same command resumes a run.
#
#   tpu_setup/train.sh --project=P --zone=us-east5-a --name=learner \
#     --config=configs/competition_math.py --workdir=gs://BUCKET/run -- --config.lag.steps=50
#
# --project=   project that is billed
# --zone=      zone of the slice
# --name=      name of the slice
# --config=    a file of configs/
# --workdir=   workdir of the run: gs://BUCKET/... or on the share, /mnt/oapl/...
# --libtpu=''  LIBTPU_INIT_ARGS, flags of the TPU compiler as one word; use those of the plan
# --dry-run    print the command, do nothing
# -- ...       further flags of oapl_jax.train
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

[[ $workdir == /* || $workdir == gs://* ]] ||
  refuse "--workdir=$workdir is not absolute; name one in a bucket (gs://) or in /mnt/oapl"
on_workers all "$(quoted oapl_jax/tpu_setup/on_worker/job.sh start \
  oapl_jax/tpu_setup/on_worker/train.sh --config="$config" --workdir="$workdir" \
  ${libtpu:+--libtpu="$libtpu"} -- "${rest[@]}")"
