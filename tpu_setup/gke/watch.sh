#!/usr/bin/env bash
# Waits for a run on a cluster. Creates its workload if there is none, and recreates it when its
# restarts are used up; the run resumes. The same command resumes the watch after Ctrl-C.
#
#   tpu_setup/gke/watch.sh --project=P --zone=us-east5-a --cluster=learner --workload=run-1 \
#     --topology=v6e:8x8 --config=configs/competition_math.py --workdir=gs://BUCKET/run-1
#
# --project=                project that is billed
# --zone=                   zone of the cluster
# --cluster=                name of the cluster
# --workload=               name for the run
# --topology=               as for create_workload.sh, as are the next five
# --config=                 ...
# --workdir=                ...
# --commit=HEAD             ..., also of the runs that follow
# --max-restarts=100        ...
# --libtpu=''               ...
# --delete-cluster-at-end   delete the cluster when the watch ends, except by Ctrl-C
# --renewals=3              new workloads after one that used up its restarts
# --poll=600                seconds between two polls
# --service-deadline=1800   seconds for xpk, with retries
# --deadline=604800         seconds for the whole watch
# --dry-run                 print the commands, do nothing
# -- ...                    further flags of oapl_jax.train
#
# Exit codes: 0 the run is done; 2 an invalid flag, or a refusal that no wait mends (quota,
# permission, login, zone, a name that is taken); 1 any other failure.
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"
. "$here/../cloud.sh"

find_commit
where=(--project="$project" --zone="$zone" --cluster="$cluster")
dry=(${dry_run:+--dry-run})
create=("$here/create_workload.sh" "${where[@]}" --workload="$workload" --topology="$topology"
  --config="$config" --workdir="$workdir" --commit="$commit"
  --max-restarts="$max_restarts" ${libtpu:+--libtpu="$libtpu"})
delete=("$here/delete_workload.sh" "${where[@]}" --workload="$workload" "${dry[@]}")
delete_cluster=("$here/delete_cluster.sh" "${where[@]}" "${dry[@]}")
# Exit codes of xpk: 0 completed, 124 not finished within --timeout, 125 failed, else unknown.
finish=(cloud xpk workload list "${where[@]}" --wait-for-job-completion="$workload"
  --timeout="$poll")
# Reason of a failure: ReachedMaxRestarts, or an exit code that a restart can't fix.
reason=(cloud kubectl get jobset "$workload"
  --output='jsonpath={.status.conditions[?(@.type=="Failed")].reason}')

end() {
  say "${*:2}"
  if [[ $delete_cluster_at_end ]]; then
    "${delete_cluster[@]}" || say "the cluster may still be billed: delete it by hand"
  else
    say "the cluster is billed until you run: $(quoted "${delete_cluster[@]}")"
  fi
  exit "$1"
}

# retry WHAT CODE: sleeps until the next poll; ends the watch after a refusal, or if xpk has failed
# for too long.
failing_since=''
retry() {
  (($2 != 2)) || end 2 "the $1 was refused; no wait mends that"
  failing_since=${failing_since:-$SECONDS}
  say "$(date +%H:%M:%S) waiting for the $1, at most $service_deadline s"
  ((SECONDS - failing_since < service_deadline)) ||
    end 1 "timed out after $service_deadline s waiting for the $1"
  sleep "$((poll < 60 ? poll : 60))"
}

if [[ $dry_run ]]; then
  echo "# every $poll s" && "${finish[@]}"
  echo "# without a workload" && "${create[@]}" --dry-run -- "${rest[@]}"
  echo "# if it failed; recreated after ReachedMaxRestarts" && "${reason[@]}" && "${delete[@]}"
  exit
fi

# Creates the workload, and accepts that it exists: an answer may have been lost.
request() {
  local code=0 found=0
  "${create[@]}" -- "${rest[@]}" || code=$?
  ((code == 2)) || return "$code"
  "${finish[@]}" || found=$?
  ((found == 0 || found == 124 || found == 125)) || return 2
}

# Checks all flags before any wait.
"${create[@]}" --dry-run -- "${rest[@]}" >/dev/null
trap 'say "stopped watching; the cluster keeps running and is billed"; exit 130' INT TERM
renewed=0
while true; do
  ((SECONDS < deadline)) || end 1 "not done after $deadline s"
  code=0
  "${finish[@]}" || code=$?
  case $code in
    2) retry "answer of xpk" 2 ;;
    0) end 0 "the run is done" ;;
    124)
      failing_since=''
      say "$(date +%H:%M:%S) waiting for the end of the run, at most $deadline s"
      ;;
    125)
      why=$("${reason[@]}") || { retry "answer of kubectl" $? && continue; }
      [[ $why == ReachedMaxRestarts ]] ||
        end 1 "the run failed ($why); a restart can't fix this, see its log"
      ((renewed < renewals)) || end 1 "the workload used up its restarts $((renewals + 1)) times"
      say "the workload used up its $max_restarts restarts: recreating it"
      if "${delete[@]}"; then ((++renewed)); else retry "deletion of the workload" $?; fi
      ;;
    *)
      if request; then failing_since=''; else retry "workload" $?; fi
      ;;
  esac
done
