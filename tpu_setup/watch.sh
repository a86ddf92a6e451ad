#!/usr/bin/env bash
# Keeps a job running on a slice until the job has ended: requests the slice if there is none,
# installs, starts the job; after a preemption deletes what is left, requests the slice anew and
# starts the same command, which resumes. Ctrl-C and the same command again do no harm. It is all
# that a run needs, also for the first time; keep it in tmux.
#
#   tpu_setup/watch.sh --project=P --zone=us-east5-a --name=learner --topology=v6e:8x8 --spot \
#     --share=10.1.2.3:/oapl --delete-at-end -- \
#     tpu_setup/train.sh --config=configs/competition_math.py --workdir=/mnt/oapl/run
#
# --project=                 that pays
# --zone=                    that has such chips
# --name=                    of the request and of its slice
# --topology=                as for create.sh, as are the next four
# --spot                     ...
# --reserved                 ...
# --network=default          ...
# --subnetwork=''            ...
# --share=                   as for install.sh
# --commit=HEAD              as for install.sh, also of the slices that follow
# --delete-at-end            delete the slice when this ends by itself, for whatever reason
# --restarts=5               in a row of a job that failed, each before it was calm
# --calm=3600                seconds of work of one start that make the restarts anew
# --poll=60                  seconds between two looks
# --queue-deadline=86400     seconds that a request may wait for capacity
# --service-deadline=1800    seconds for gcloud, ssh or a deletion to succeed, with retries
# --deadline=604800          seconds for everything
# --dry-run                  print the commands, do nothing
# -- ...                     train.sh or serve.sh, with its flags but --project, --zone and --name
#
# Codes: 0 the job is done, 2 a mistake in a flag or a setting, 1 anything else.
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

((${#rest[@]})) || refuse "names no job; after -- comes train.sh or serve.sh with its flags"
find_commit
slice=(--project="$project" --zone="$zone" --name="$name" ${dry_run:+--dry-run})
create=("$here/create.sh" "${slice[@]}" --topology="$topology" ${spot:+--spot}
  ${reserved:+--reserved} --network="$network" ${subnetwork:+--subnetwork="$subnetwork"}
  --queue-deadline="$queue_deadline")
delete=("$here/delete.sh" "${slice[@]}")
install=("$here/install.sh" "${slice[@]}" --share="$share" --commit="$commit")
start=("${rest[0]}" "${slice[@]}" "${rest[@]:1}")
stop=(on_workers all "oapl_jax/tpu_setup/on_worker/job.sh stop")

end() {
  say "${*:2}"
  if [[ $delete_at_end ]]; then
    "${delete[@]}" || say "the slice may be billed still: delete it by hand"
  else
    say "the slice is billed until: $(quoted "${delete[@]}")"
  fi
  exit "$1"
}

# wait_for WHAT SECONDS [NEWS]: until the next look, at most SECONDS since WHAT was first missing.
waited_for='' since=0 told=''
wait_for() {
  [[ $1 == "$waited_for" ]] || since=$SECONDS
  [[ "$1 ${3-}" == "$told" ]] || say "$(date +%H:%M:%S) waits for the $1, at most $2 s. ${3-}"
  waited_for=$1 told="$1 ${3-}"
  ((SECONDS - since < $2)) || end 1 "the $1 did not come within $2 s"
  sleep "$poll"
}

# try WHAT COMMAND...: 0, or 1 after a wait, so that it is tried again at the next look.
try() {
  "${@:2}" && return
  wait_for "$1" "$service_deadline" "It failed, as said above."
  return 1
}

if [[ $dry_run ]]; then
  echo "# each $poll s" && queue_state && job_states
  echo "# after SUSPENDED or FAILED" && "${delete[@]}"
  echo "# where there is no request" && "${create[@]}"
  echo "# where the slice is ACTIVE and has no job" && "${install[@]}" && "${start[@]}"
  echo "# where the job failed on a worker, before it is started again" && "${stop[@]}"
  exit
fi

trap 'say "stopped watching; the slice and its job go on, and are billed"; exit 130' INT TERM
# A mistake in a flag shows now, and not when the slice has come and is billed.
"${create[@]}" --dry-run >/dev/null
"${rest[0]}" "${slice[@]}" --dry-run "${rest[@]:1}" >/dev/null

restarted=0 requests=0 begun='' started=0
while true; do
  ((SECONDS < deadline)) || end 1 "not done within $deadline s"
  if ! state=$(queue_state); then
    wait_for "answer of gcloud" "$service_deadline"
    continue
  fi
  case $state in
    ACTIVE) requests=0 ;;
    SUSPENDED | FAILED)
      say "the slice is gone ($state): deletes what is left, and requests it anew"
      try "deletion" "${delete[@]}" || true
      continue
      ;;
    SUSPENDING | DELETING)
      wait_for "end of the deletion" "$service_deadline" "$state"
      continue
      ;;
    "")
      ((requests < 3)) || end 1 "$requests requests in a row ended without a slice"
      try "request" "${create[@]}" && requests=$((requests + 1))
      continue
      ;;
    *)
      wait_for "capacity" "$queue_deadline" "$state"
      continue
      ;;
  esac

  if ! jobs=$(job_states); then
    wait_for "connection to every worker" "$service_deadline"
    continue
  fi
  states=$(awk '{print $2}' <<<"$jobs" | sort -u | xargs)
  [[ $begun || $states == *running* ]] || states=absent # what ended before is another matter
  case $states in
    *exited-2 | *"exited-2 "*) end 2 "the job found a mistake: $(grep -m 1 exited-2 <<<"$jobs")" ;;
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
      say "the job does not run on every worker:" && sort <<<"$jobs" >&2
      ((restarted < restarts)) || end 1 "the job was started anew $restarts times"
      try "end of the job's rest" "${stop[@]}" && ((++restarted))
      ;;
  esac
done
