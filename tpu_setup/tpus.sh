# shellcheck shell=bash
# Sourced by the scripts for queued resources: what they ask gcloud for.

tpus() { run gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet; }

# on_workers all|0 COMMAND: code 0 if it is 0 on each of them.
on_workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# ACTIVE, WAITING_FOR_RESOURCES, ..., or nothing if there is no such request.
queue_state() {
  tpus queued-resources list --filter="name~\"/$name\$\"" --format="value(state.state)"
}

# What each worker's job does, one line a worker: "WORKER STATE LAST-LINE-OF-ITS-LOG".
job_states() {
  local job=oapl_jax/tpu_setup/on_worker/job.sh
  on_workers all "if test -e $job; then $job status; else echo \$(hostname) absent; fi"
}
