#!/usr/bin/env bash
# Creates a GKE cluster with one slice, and mounts the share in whatever will run there. The nodes
# are billed until delete_cluster.sh, whether something runs or not.
#
#   tpu_setup/gke/create_cluster.sh --project=P --zone=us-east5-a --cluster=learner \
#     --topology=v6e:8x8 --spot --share=share
#
# --project=         that pays
# --zone=            that has such chips
# --cluster=         its name
# --topology=        as for oapl_jax.plan: v5e:8x8, v5p:4x4x4, v6e:16x16, ...
# --spot             cheaper, and can be taken away at any time
# --reservation=''   of the project, instead of chips on demand
# --share=           the Filestore instance, the --name of create_share.sh
# --dry-run          print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../slices.sh"

find_slice
[[ ! $spot || ! $reservation ]] || refuse "--spot and --reservation exclude each other"
[[ $topology != v5e:1x1 && $topology != v5e:2x2 ]] || refuse "xpk has v5e from v5e:2x4 on"
capacity=--on-demand
[[ ! $spot ]] || capacity=--spot
[[ ! $reservation ]] || capacity=--reservation=$reservation
run xpk cluster create --project="$project" --zone="$zone" --cluster="$cluster" \
  --tpu-type="$accelerator" --num-slices=1 "$capacity" --enable-gcpfilestore-csi-driver
run xpk storage attach oapl --project="$project" --zone="$zone" --cluster="$cluster" \
  --type=gcpfilestore --instance="$share" --vol=oapl --mount-point=/mnt/oapl \
  --readonly=false --auto-mount=true
