#!/usr/bin/env bash
# Deletes a slice, its disks and its request in any state. This ends the billing.
#
#   tpu_setup/delete.sh --project=P --zone=us-east5-a --name=learner
#
# --project=   project that is billed
# --zone=      zone of the slice
# --name=      name of the slice
# --dry-run    print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

tpus queued-resources delete "$name" --force
