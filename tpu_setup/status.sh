#!/usr/bin/env bash
# Prints the state of a slice's request, and each worker's job with the last line of its log.
#
#   tpu_setup/status.sh --project=P --zone=us-east5-a --name=learner
#
# --project=   project that is billed
# --zone=      zone of the slice
# --name=      name of the slice
# --dry-run    print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

queue_state
job_states
