#!/usr/bin/env bash
# Ends a run on a cluster. The cluster stays, and is billed.
#
#   tpu_setup/gke/delete_workload.sh --project=P --zone=us-east5-a --cluster=learner \
#     --workload=run-1
#
# --project=    that pays
# --zone=       of the cluster
# --cluster=    its name
# --workload=   the name of the run
# --dry-run     print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"

run xpk workload delete --project="$project" --zone="$zone" --cluster="$cluster" \
  --workload="$workload" --force --quiet
