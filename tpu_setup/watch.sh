#!/usr/bin/env bash
# Keeps a job running on a slice until it ends: requests the slice, installs, starts the job; after
# a preemption deletes the request, makes a new one and restarts the job, which resumes. The same
# command resumes the watch after Ctrl-C. A run needs no other command; keep this one in tmux.
#
#   tpu_setup/watch.sh --project=P --zone=us-east5-a --name=learner --topology=v6e:8x8 --spot \
#     --delete-at-end -- \
#     tpu_setup/train.sh --config=configs/competition_math.py --workdir=gs://BUCKET/run
#
# --project=                 project that is billed
# --zone=                    zone with such chips
# --name=                    name of the request and of its slice
# --topology=                as for create.sh, as are the next four
# --spot                     ...
# --reserved                 ...
# --network=default          ...
# --subnetwork=''            ...
# --share=''                 as for install.sh
# --commit=HEAD              as for install.sh, also of the slices that follow
# --delete-at-end            delete the slice when the watch ends, except by Ctrl-C
# --restarts=5               restarts in a row of a failed job, see --calm
# --calm=3600                seconds of work after which restarts count from 0
# --poll=60                  seconds between two polls
# --queue-deadline=86400     seconds that a request may wait for capacity
# --service-deadline=1800    seconds for gcloud, ssh or a deletion, with retries
# --deadline=604800          seconds for the whole watch
# --dry-run                  print the commands, do nothing
# -- ...                     train.sh or serve.sh, with its flags but --project, --zone and --name
#
# Exit codes: 0 the job is done; 2 an invalid flag or setting, or a refusal that no wait mends
# (quota, permission, login, zone, a name that is taken); 1 any other failure.
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

((${#rest[@]})) || refuse "no job is given; write train.sh or serve.sh with its flags after --"
find_commit
slice=(--project="$project" --zone="$zone" --name="$name" ${dry_run:+--dry-run})
create=("$here/create.sh" "${slice[@]}" --topology="$topology" ${spot:+--spot}
  ${reserved:+--reserved} --network="$network" ${subnetwork:+--subnetwork="$subnetwork"}
  --queue-deadline="$queue_deadline")
delete=("$here/delete.sh" "${slice[@]}")
install=("$here/install.sh" "${slice[@]}" ${share:+--share="$share"} --commit="$commit")
start=("${rest[0]}" "${slice[@]}" "${rest[@]:1}")
stop=(on_workers all "oapl_jax/tpu_setup/on_worker/job.sh stop")

end() {
  say "${*:2}"
  if [[ $delete_at_end ]]; then
    "${delete[@]}" || say "the slice may still be billed: delete it by hand"
  elif [[ ${state-unknown} ]]; then # a request exists, or may
    say "the slice is billed until you run: $(quoted "${delete[@]}")"
  fi
  exit "$1"
}

# wait_for WHAT SECONDS [STATE]: sleeps until the next poll; ends the watch if WHAT has been missing
# for SECONDS.
waited_for='' since=0 told=''
wait_for() {
  [[ $1 == "$waited_for" ]] || since=$SECONDS
  [[ "$1 ${3-}" == "$told" ]] || say "$(date +%H:%M:%S) waiting for the $1, at most $2 s. ${3-}"
  waited_for=$1 told="$1 ${3-}"
  ((SECONDS - since < $2)) || end 1 "timed out after $2 s waiting for the $1"
  sleep "$poll"
}

# try WHAT COMMAND...: returns 0, or 1 after a wait, for a retry at the next poll; ends the watch
# after a refusal.
try() {
  local code=0
  "${@:2}" || code=$?
  case $code in
    0) return ;;
    2) end 2 "the $1 was refused; no wait mends that" ;;
    *) wait_for "$1" "$service_deadline" "It failed; see above." ;;
  esac
  return 1
}

# Commands that print an answer, for `try`.
see_request() { state=$(queue_state); }
see_jobs() { jobs=$(job_states); }

# Like create.sh, but accepts that the request exists: an answer may have been lost.
request() {
  local code=0
  "${create[@]}" || code=$?
  ((code != 2)) || [[ ! $(queue_state) ]] || code=0
  return "$code"
}

if [[ $dry_run ]]; then
  echo "# every $poll s" && queue_state && job_states
  echo "# after SUSPENDED or FAILED" && "${delete[@]}"
  echo "# without a request" && "${create[@]}"
  echo "# if the slice is ACTIVE and has no job" && "${install[@]}" && "${start[@]}"
  echo "# if the job failed on a worker, before a restart" && "${stop[@]}"
  exit
fi

trap 'say "stopped watching; the slice and its job keep running and are billed"; exit 130' INT TERM
# Checks all flags now, not when the slice exists and is billed.
"${create[@]}" --dry-run >/dev/null
"${rest[0]}" "${slice[@]}" --dry-run "${rest[@]:1}" >/dev/null

restarted=0 requests=0 begun='' started=0
while true; do
  ((SECONDS < deadline)) || end 1 "not done after $deadline s"
  try "answer of gcloud" see_request || continue
  case $state in
    ACTIVE) requests=0 ;;
    SUSPENDED | FAILED)
      say "the slice is gone ($state): deleting the request and making a new one"
      try "deletion" "${delete[@]}" || true
      continue
      ;;
    SUSPENDING | DELETING)
      wait_for "end of the deletion" "$service_deadline" "$state"
      continue
      ;;
    "")
      ((requests < 3)) || end 1 "$requests requests in a row ended without a slice"
      try "request" request && requests=$((requests + 1))
      continue
      ;;
    *)
      wait_for "capacity" "$queue_deadline" "$state"
      continue
      ;;
  esac

  try "connection to every worker" see_jobs || continue
  states=$(awk '{print $2}' <<<"$jobs" | sort -u | xargs)
  [[ $begun || $states == *running* ]] || states=absent # ignores jobs that ended before
  case $states in
    *exited-2 | *"exited-2 "*) end 2 "invalid setting: $(grep -m 1 exited-2 <<<"$jobs")" ;;
    absent)
      try "installation" "${install[@]}" || continue
      try "start of the job" "${start[@]}" && begun=yes started=$SECONDS
      ;;
    running | "exited-0 running")
      [[ $begun ]] || try "job of this slice" "${start[@]}" || continue
      [[ $begun ]] || started=$SECONDS
      begun=yes
      ((SECONDS - started < calm)) || restarted=0
      wait_for "end of the job" "$deadline" "$(sort <<<"$jobs" | sed -n 1p)"
      ;;
    exited-0) end 0 "the job is done" ;;
    *)
      say "the job is not running on every worker:" && sort <<<"$jobs" >&2
      ((restarted < restarts)) || end 1 "the job failed again after $restarts restarts"
      try "stop of the other workers" "${stop[@]}" && ((++restarted))
      ;;
  esac
done
