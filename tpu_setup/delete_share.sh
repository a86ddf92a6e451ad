#!/usr/bin/env bash
# Deletes the share and everything on it: models, data, runs. This ends the billing.
#
#   tpu_setup/delete_share.sh --project=P --zone=us-east5-a --name=share
#
# --project=   project that is billed
# --zone=      zone of the instance
# --name=      name of the instance
# --dry-run    print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/cloud.sh"

cloud gcloud filestore instances delete "$name" --project="$project" --zone="$zone" --quiet
