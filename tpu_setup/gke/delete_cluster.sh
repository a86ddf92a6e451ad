#!/usr/bin/env bash
# Deletes a cluster with its nodes and whatever runs there. It ends the billing; the share stays.
#
#   tpu_setup/gke/delete_cluster.sh --project=P --zone=us-east5-a --cluster=learner
#
# --project=   that pays
# --zone=      of the cluster
# --cluster=   its name
# --dry-run    print the command, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"

run xpk cluster delete --project="$project" --zone="$zone" --cluster="$cluster" --force --quiet
