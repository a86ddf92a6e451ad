#!/usr/bin/env bash
# Ends a run on a cluster. The cluster stays and is billed.
#
#   tpu_setup/gke/delete_workload.sh --project=P --zone=us-east5-a --cluster=learner \
#     --workload=run-1
#
# --project=    project that is billed
# --zone=       zone of the cluster
# --cluster=    name of the cluster
# --workload=   name of the run
# --dry-run     print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../cloud.sh"

cloud xpk workload delete --project="$project" --zone="$zone" --cluster="$cluster" \
  --workload="$workload" --force --quiet
