#!/usr/bin/env bash
# Deletes a cluster, its nodes and its workloads. This ends its billing; the share stays.
#
#   tpu_setup/gke/delete_cluster.sh --project=P --zone=us-east5-a --cluster=learner
#
# --project=   project that is billed
# --zone=      zone of the cluster
# --cluster=   name of the cluster
# --dry-run    print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../cloud.sh"

cloud xpk cluster delete --project="$project" --zone="$zone" --cluster="$cluster" --force --quiet
