#!/usr/bin/env bash
# On a worker or in a container: runs the training together with the other workers.
#
# --config=    a file of configs/
# --workdir=   workdir of the run, in a bucket or on the share
# --libtpu=''  flags of the TPU compiler
# -- ...       further flags of oapl_jax.train
#
# Exits with the run's code (2: an invalid setting), or 75 if it was stopped before its end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../flags.sh"

[[ $workdir == gs://* ]] || mkdir -p "$workdir"
[[ $workdir == gs://* || $(df --output=target "$workdir" | tail -n 1) != / ]] ||
  refuse "--workdir=$workdir is on the disk of the slice, deleted with it; name a bucket (gs://)"

# Explicit, so that a missing TPU is an error instead of a run on the CPU.
export JAX_PLATFORMS=tpu,cpu
[[ ! $libtpu ]] || export LIBTPU_INIT_ARGS=$libtpu
cd "$here/../.."
exec .venv/bin/python tpu_setup/on_worker/train.py --config="$config" --workdir="$workdir" \
  --pod "${rest[@]}"
