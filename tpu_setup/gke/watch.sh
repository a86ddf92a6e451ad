#!/usr/bin/env bash
# Waits for a run on a cluster, and creates its workload where there is none, or where Kubernetes
# has used up its restarts; the run resumes. Ctrl-C and the same command again do no harm.
#
#   tpu_setup/gke/watch.sh --project=P --zone=us-east5-a --cluster=learner --workload=run-1 \
#     --topology=v6e:8x8 --config=configs/competition_math.py --workdir=/mnt/oapl/run-1
#
# --project=                that pays
# --zone=                   of the cluster
# --cluster=                its name
# --workload=               a name for the run
# --topology=               as for create_workload.sh, as are the next five
# --config=                 ...
# --workdir=                ...
# --commit=HEAD             ..., also of the runs that follow
# --max-restarts=100        ...
# --libtpu=''               ...
# --delete-cluster-at-end   delete the cluster when this ends by itself, for whatever reason
# --renewals=3              of a workload that has used up its restarts
# --poll=600                seconds between two looks
# --service-deadline=1800   seconds for xpk to succeed, with retries
# --deadline=604800         seconds for everything
# --dry-run                 print the commands, do nothing
# -- ...                    further flags of oapl_jax.train
#
# Codes: 0 the run is done, 2 a mistake in a flag, 1 anything else.
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"

find_commit
where=(--project="$project" --zone="$zone" --cluster="$cluster")
dry=(${dry_run:+--dry-run})
create=("$here/create_workload.sh" "${where[@]}" --workload="$workload" --topology="$topology"
  --config="$config" --workdir="$workdir" --commit="$commit"
  --max-restarts="$max_restarts" ${libtpu:+--libtpu="$libtpu"})
delete=("$here/delete_workload.sh" "${where[@]}" --workload="$workload" "${dry[@]}")
delete_cluster=("$here/delete_cluster.sh" "${where[@]}" "${dry[@]}")
# Codes: 0 completed, 124 not finished within --timeout, 125 failed; otherwise it isn't known.
finish=(run xpk workload list "${where[@]}" --wait-for-job-completion="$workload" --timeout="$poll")
# Why it failed: ReachedMaxRestarts, or else the exit code was one that no restart can mend.
reason=(run kubectl get jobset "$workload"
  --output='jsonpath={.status.conditions[?(@.type=="Failed")].reason}')

end() {
  say "${*:2}"
  if [[ $delete_cluster_at_end ]]; then
    "${delete_cluster[@]}" || say "the cluster may be billed still: delete it by hand"
  else
    say "the cluster is billed until: $(quoted "${delete_cluster[@]}")"
  fi
  exit "$1"
}

# Waits for the next look, unless xpk has failed for too long.
failing_since=''
retry() {
  failing_since=${failing_since:-$SECONDS}
  say "$(date +%H:%M:%S) waits for the $1, at most $service_deadline s"
  ((SECONDS - failing_since < service_deadline)) ||
    end 1 "the $1 did not come within $service_deadline s"
  sleep "$((poll < 60 ? poll : 60))"
}

if [[ $dry_run ]]; then
  echo "# each $poll s" && "${finish[@]}"
  echo "# where there is no workload" && "${create[@]}" --dry-run -- "${rest[@]}"
  echo "# where it failed, and anew after ReachedMaxRestarts" && "${reason[@]}" && "${delete[@]}"
  exit
fi

# A mistake shows before anything is waited for.
"${create[@]}" --dry-run -- "${rest[@]}" >/dev/null
trap 'say "stopped watching; the cluster and the run go on, and are billed"; exit 130' INT TERM
renewed=0
while true; do
  ((SECONDS < deadline)) || end 1 "not done within $deadline s"
  code=0
  "${finish[@]}" || code=$?
  case $code in
    0) end 0 "the run is done" ;;
    124)
      failing_since=''
      say "$(date +%H:%M:%S) waits for the end of the run, at most $deadline s"
      ;;
    125)
      why=$("${reason[@]}") || { retry "answer of kubectl" && continue; }
      [[ $why == ReachedMaxRestarts ]] ||
        end 1 "the run failed ($why), and a restart can't mend it; its log says why"
      ((renewed < renewals)) || end 1 "the workload used up its restarts $((renewals + 1)) times"
      say "the workload used up its $max_restarts restarts: creates it anew"
      if "${delete[@]}"; then ((++renewed)); else retry "deletion of the workload"; fi
      ;;
    *)
      if "${create[@]}" -- "${rest[@]}"; then failing_since=''; else retry "workload"; fi
      ;;
  esac
done
