# shellcheck shell=bash
# Sourced by the scripts for queued resources: calls of gcloud, see cloud.sh.

. "$here/cloud.sh"

tpus() { cloud gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet; }

# on_workers all|0 COMMAND: exits with 0 if every worker does.
on_workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# Prints ACTIVE, WAITING_FOR_RESOURCES, ..., or nothing without a request.
queue_state() {
  tpus queued-resources list --filter="name~\"/$name\$\"" --format="value(state.state)"
}

# Prints the job of each worker: "WORKER STATE LAST-LINE-OF-ITS-LOG".
job_states() {
  local job=oapl_jax/tpu_setup/on_worker/job.sh
  on_workers all "if test -e $job; then $job status; else echo \$(hostname) absent; fi"
}
