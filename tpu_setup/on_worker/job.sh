#!/usr/bin/env bash
# On a worker: runs one background job in ~/job (words, log, log.before, pid, code).
#
#   job.sh start COMMAND...   starts a job unless it is running; refuses if another job is
#   job.sh status             prints WORKER running|exited-CODE|absent LAST-LINE-OF-THE-LOG
#   job.sh stop               sends SIGTERM, after two minutes SIGKILL, and removes the exit code
set -euo pipefail
job=~/job
mkdir -p "$job" && cd "$job"

# The job holds the lock; a crash or a reboot releases it.
running() { ! flock --nonblock "$job/lock" true; }

case ${1-} in
  start)
    shift
    command=${*@Q}
    if running; then
      [[ $command == "$(<words)" ]] && exit
      echo "job.sh: $(hostname) is running another job, $(<words); job.sh stop ends it" >&2
      exit 1
    fi
    rm -f code pid
    [[ ! -e log ]] || mv log log.before
    echo "$command" >words
    cd ~
    # shellcheck disable=SC2016  # for the inner shell
    setsid flock --timeout 10 --close "$job/lock" bash -c '
      job=$1 && shift
      "$@" & echo $! >"$job/pid"
      wait $!; echo $? >"$job/code"' - "$job" "$@" >"$job/log" 2>&1 </dev/null &
    for _ in {1..100}; do
      if running || [[ -e $job/code ]]; then exit; fi
      sleep 0.1
    done
    echo "job.sh: the job did not start within 10 s on $(hostname)" >&2
    exit 1
    ;;
  status)
    state=absent
    # In this order: a job writes its code before it releases the lock.
    if running; then state=running; elif [[ -e code ]]; then state=exited-$(<code); fi
    echo "$(hostname) $state $(tail -n 1 log 2>/dev/null || true)"
    ;;
  stop)
    ! running || kill -TERM "$(<pid)" 2>/dev/null || true
    for _ in {1..120}; do
      running || break
      sleep 1
    done
    ! running || kill -KILL -- "-$(ps -o pgid= -p "$(<pid)" | tr -d ' ')"
    rm -f code
    ;;
  *)
    sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0" >&2
    exit 2
    ;;
esac
