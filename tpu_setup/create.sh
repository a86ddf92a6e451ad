#!/usr/bin/env bash
# Requests a slice as a queued resource, and returns at once; it may wait in the queue for days.
#
#   tpu_setup/create.sh --project=P --zone=us-east5-a --name=learner --topology=v6e:8x8 --spot
#
# --project=               project that is billed
# --zone=                  zone with such chips
# --name=                  name of the request and of its slice
# --topology=              as for oapl_jax.plan: v5e:8x8, v5p:4x4x4, v6e:16x16, ...
# --spot                   cheaper, and may be preempted at any time
# --reserved               use a reservation of the project
# --network=default        network of the slice, the share and the servers
# --subnetwork=''          subnetwork of a network in custom mode
# --queue-deadline=86400   seconds in the queue, after which the request expires
# --dry-run                print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/slices.sh"
. "$here/tpus.sh"

find_slice
[[ ! $spot || ! $reserved ]] || refuse "--spot and --reserved exclude each other"
say "requesting $accelerator; it is billed from ACTIVE until delete.sh"
tpus queued-resources create "$name" --node-id="$name" \
  --accelerator-type="$accelerator" --runtime-version="$runtime" \
  ${spot:+--spot} ${reserved:+--reserved} \
  --network="$network" ${subnetwork:+--subnetwork="$subnetwork"} \
  --valid-until-duration="${queue_deadline}s"
