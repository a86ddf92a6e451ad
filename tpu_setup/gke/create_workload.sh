#!/usr/bin/env bash
# Starts a run on a cluster. Each container installs a commit of this checkout when it starts.
# Kubernetes restarts it after a preemption or the death of a worker, and the run resumes.
#
#   tpu_setup/gke/create_workload.sh --project=P --zone=us-east5-a --cluster=learner \
#     --workload=run-1 --topology=v6e:8x8 --config=configs/competition_math.py \
#     --workdir=gs://BUCKET/run-1 -- --config.lag.steps=50
#
# --project=           project that is billed
# --zone=              zone of the cluster
# --cluster=           name of the cluster
# --workload=          name for the run
# --topology=          topology of the cluster
# --config=            a file of configs/
# --workdir=           workdir of the run: gs://BUCKET/... or on the share, /mnt/oapl/...
# --commit=HEAD        commit of this checkout
# --max-restarts=100   restarts by Kubernetes; a preemption costs one
# --libtpu=''          LIBTPU_INIT_ARGS, flags of the TPU compiler as one word
# --image=python:3.11  base image with Python
# --dry-run            print the commands, do nothing
# -- ...               further flags of oapl_jax.train
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../cloud.sh"
. "$here/../slices.sh"

find_slice
[[ $workdir == /* || $workdir == gs://* ]] ||
  refuse "--workdir=$workdir is not absolute; name one in a bucket (gs://) or in /mnt/oapl"
find_commit
source=${TMPDIR:-/tmp}/oapl_jax-$commit
run git -C "$root" archive --prefix="${source##*/}/" --output="$source.tar" "$commit"
run tar -xf "$source.tar" -C "${source%/*}"

# No restart fixes exit code 2, an invalid setting. The container's shell signals the command's
# process; `exec` makes that the run's.
cloud xpk workload create --project="$project" --zone="$zone" --cluster="$cluster" \
  --workload="$workload" --tpu-type="$accelerator" --num-slices=1 \
  --base-docker-image="$image" --script-dir="$source" \
  --max-restarts="$max_restarts" --restart-on-exit-codes=1,3,4,75 \
  --termination-grace-period-seconds=120 \
  --command="tpu_setup/on_worker/install.sh && exec $(quoted tpu_setup/on_worker/train.sh \
    --config="$config" --workdir="$workdir" ${libtpu:+--libtpu="$libtpu"} -- "${rest[@]}")"
