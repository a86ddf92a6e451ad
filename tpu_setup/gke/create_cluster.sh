#!/usr/bin/env bash
# Creates a GKE cluster with one slice, and mounts a share in its workloads if one is named. The
# nodes are billed until delete_cluster.sh, idle or not.
#
#   tpu_setup/gke/create_cluster.sh --project=P --zone=us-east5-a --cluster=learner \
#     --topology=v6e:8x8 --spot
#
# --project=         project that is billed
# --zone=            zone with such chips
# --cluster=         name of the cluster
# --topology=        as for oapl_jax.plan: v5e:8x8, v5p:4x4x4, v6e:16x16, ...
# --spot             cheaper, and may be preempted at any time
# --reservation=''   reservation of the project, instead of chips on demand
# --share=''         a Filestore instance, the --name of create_share.sh
# --dry-run          print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../cloud.sh"
. "$here/../slices.sh"

find_slice
[[ ! $spot || ! $reservation ]] || refuse "--spot and --reservation exclude each other"
[[ $topology != v5e:1x1 && $topology != v5e:2x2 ]] || refuse "xpk has no v5e slices below v5e:2x4"
capacity=--on-demand
[[ ! $spot ]] || capacity=--spot
[[ ! $reservation ]] || capacity=--reservation=$reservation
cloud xpk cluster create --project="$project" --zone="$zone" --cluster="$cluster" \
  --tpu-type="$accelerator" --num-slices=1 "$capacity" \
  ${share:+--enable-gcpfilestore-csi-driver}
[[ $share ]] || exit 0
cloud xpk storage attach oapl --project="$project" --zone="$zone" --cluster="$cluster" \
  --type=gcpfilestore --instance="$share" --vol=oapl --mount-point=/mnt/oapl \
  --readonly=false --auto-mount=true
