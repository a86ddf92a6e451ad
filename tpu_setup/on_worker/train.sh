#!/usr/bin/env bash
# On a worker, or in a container: the run, together with the other workers.
#
# --config=    a file of configs/
# --workdir=   of the run, on the share
# --libtpu=''  flags of the TPU compiler
# -- ...       further flags of oapl_jax.train
#
# The code is that of the run (2: a mistake in a setting), or 75 if it was stopped before its end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../flags.sh"

mkdir -p "$workdir"
[[ $(df --output=target "$workdir" | tail -n 1) != / ]] ||
  refuse "--workdir=$workdir is on the slice's own disk, which is lost with it; mount a share there"

# Named, so that a TPU that can't be had is an error, and not a run on the CPU.
export JAX_PLATFORMS=tpu,cpu
[[ ! $libtpu ]] || export LIBTPU_INIT_ARGS=$libtpu
cd "$here/../.."
exec .venv/bin/python tpu_setup/on_worker/train.py --config="$config" --workdir="$workdir" \
  --pod "${rest[@]}"
