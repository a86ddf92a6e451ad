#!/usr/bin/env bash
# Starts a run on a cluster: a commit of this checkout, installed in each container at its start.
# Kubernetes starts it again when a node is taken away or a worker dies, and the run resumes.
#
#   tpu_setup/gke/create_workload.sh --project=P --zone=us-east5-a --cluster=learner \
#     --workload=run-1 --topology=v6e:8x8 --config=configs/competition_math.py \
#     --workdir=/mnt/oapl/run-1 -- --config.lag.steps=50
#
# --project=           that pays
# --zone=              of the cluster
# --cluster=           its name
# --workload=          a name for the run
# --topology=          of the cluster
# --config=            a file of configs/
# --workdir=           of the run, on the share: /mnt/oapl/...
# --commit=HEAD        of this checkout
# --max-restarts=100   by Kubernetes; a preemption costs one
# --libtpu=''          flags of the TPU compiler, in one word: LIBTPU_INIT_ARGS, as for the plan
# --image=python:3.11  with Python, which the source is added to
# --dry-run            print the commands, do nothing
# -- ...               further flags of oapl_jax.train
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../slices.sh"

find_slice
[[ $workdir == /* ]] || refuse "--workdir=$workdir is not absolute; name one in /mnt/oapl"
find_commit
source=${TMPDIR:-/tmp}/oapl_jax-$commit
run git -C "$root" archive --prefix="${source##*/}/" --output="$source.tar" "$commit"
run tar -xf "$source.tar" -C "${source%/*}"

# Exit code 2, a mistake in a setting, is the one that no new start can mend. The container's own
# shell signals the command's process, which `exec` makes the run's.
run xpk workload create --project="$project" --zone="$zone" --cluster="$cluster" \
  --workload="$workload" --tpu-type="$accelerator" --num-slices=1 \
  --base-docker-image="$image" --script-dir="$source" \
  --max-restarts="$max_restarts" --restart-on-exit-codes=1,3,4,75 \
  --termination-grace-period-seconds=120 \
  --command="tpu_setup/on_worker/install.sh && exec $(quoted tpu_setup/on_worker/train.sh \
    --config="$config" --workdir="$workdir" ${libtpu:+--libtpu="$libtpu"} -- "${rest[@]}")"
