#!/usr/bin/env bash
# Creates a Filestore instance, the directory that learner and servers share, and prints its
# address. It keeps models, data and runs when slices are deleted.
#
#   tpu_setup/create_share.sh --project=P --zone=us-east5-a --name=share
#
# --project=         project that is billed by the hour, in use or not
# --zone=            zone of the slices
# --name=            name of the instance
# --capacity=1TB     capacity; this is the smallest of a zonal instance
# --network=default  network of the slices
# --dry-run          print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/cloud.sh"

cloud gcloud filestore instances create "$name" --project="$project" --zone="$zone" --quiet \
  --tier=ZONAL --file-share=name=oapl,capacity="$capacity" --network=name="$network"
cloud gcloud filestore instances describe "$name" --project="$project" --zone="$zone" \
  --format="value(networks[0].ipAddresses[0])"
say "pass it to the other scripts as --share=ADDRESS:/oapl"
