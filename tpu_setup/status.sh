#!/usr/bin/env bash
# What a slice does: the state of its request, and of each worker's job with its log's last line.
#
#   tpu_setup/status.sh --project=P --zone=us-east5-a --name=learner
#
# --project=   that pays
# --zone=      of the slice
# --name=      of the slice
# --dry-run    print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

queue_state
job_states
