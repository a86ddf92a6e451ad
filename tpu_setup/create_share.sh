#!/usr/bin/env bash
# Creates a Filestore instance, the directory that learner and servers share, and prints its
# address. Slices come and go; models, data and runs stay on it.
#
#   tpu_setup/create_share.sh --project=P --zone=us-east5-a --name=share
#
# --project=         that pays, by the hour, also when nothing uses it
# --zone=            of the slices, so that it is near
# --name=            of the instance
# --capacity=1TB     the least that a zonal instance can have
# --network=default  of the slices
# --dry-run          print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"

run gcloud filestore instances create "$name" --project="$project" --zone="$zone" --quiet \
  --tier=ZONAL --file-share=name=oapl,capacity="$capacity" --network=name="$network"
run gcloud filestore instances describe "$name" --project="$project" --zone="$zone" \
  --format="value(networks[0].ipAddresses[0])"
say "the other scripts take it as --share=ADDRESS:/oapl"
