# shellcheck shell=bash
# Sourced by the scripts that call gcloud, xpk or kubectl: tells a refusal that no wait mends
# (quota, permission, login, zone, a name that is taken) from a service that does not answer.

# cloud PROGRAM...: runs a command of the cloud. Returns 2, after a sentence, for a refusal that no
# wait mends, or its code (1 for 2). Under --dry-run it only prints the command.
cloud() {
  local log code=0 remedy=''
  if [[ $dry_run ]]; then
    quoted "$@"
    return
  fi
  if ! command -v "$1" >/dev/null; then
    say "$1 is not installed; docs/tpu.md lists the requirements"
    return 2
  fi
  log=$(mktemp)
  # No pipe for gcloud: an ssh connection that is kept open would keep the pipe open too.
  case $1 in
    xpk) "$@" 2>&1 | tee "$log" || code=$? ;;
    *)
      "$@" 2>"$log" || code=$?
      cat "$log" >&2
      ;;
  esac
  # xpk: the run is not finished (124), or it failed (125).
  if ((code != 0 && code != 124 && code != 125)); then
    remedy=$(remedy_for "$(errors_of "$*" <"$log")" "$*")
    ((code != 2)) || code=1
  fi
  rm -f "$log"
  [[ $remedy ]] || return "$code"
  say "$remedy"
  return 2
}

# errors_of COMMAND: prints the program's own errors, not those of a command on a worker.
errors_of() {
  case $1 in
    *" tpu-vm "*) sed -n '/^ERROR: (gcloud/,$p' ;;
    xpk*) grep -E 'ERROR|[Ee]rror|denied|will not create' || true ;;
    *) sed -n '/^[Ee][Rr][Rr][Oo][Rr]/,$p' ;;
  esac
}

# remedy_for ERRORS COMMAND: prints a remedy, or nothing if a wait may mend the error.
remedy_for() {
  case ${1,,} in
    *"per minute"* | *rate_limit* | *"no more capacity"* | *stockout* | *pool_exhausted* | \
      *"reserved capacity"*) ;;
    *already_exists* | *"already exist"* | *'"code": 6,'*)
      echo "the name is taken: choose another, or look with status.sh and delete what has it"
      ;;
    *quota*exceeded* | *quota*exhausted* | *insufficient*quota* | *"quota limit"* | \
      *resource_exhausted*)
      echo "the quota of --project is used up: raise it at" \
        "console.cloud.google.com/iam-admin/quotas, or change --topology, --zone or --spot"
      ;;
    *billing_disabled* | *billing*"be enabled"* | *"billing account"*)
      echo "--project has no billing account: link one at console.cloud.google.com/billing"
      ;;
    *service_disabled* | *"api has not been"* | *"not enabled on project"*)
      echo "an API of --project is disabled: enable it with gcloud services enable"
      ;;
    *"'locations/"*"may not exist"* | *zone*"not supported"* | *"zonal accelerator"* | \
      *location*"not found"* | *zone*"not found"* | *"invalid location"* | *"invalid zone"* | \
      *zone*"not valid"* | *"unknown zone"* | *"found in zone"*)
      echo "--zone does not exist, or has no such chips; cloud.google.com/tpu/docs/regions-zones" \
        "lists the zones of each --topology"
      ;;
    *unauthenticated* | *invalid_grant* | *reauth* | *"active account selected"* | \
      *"valid credentials"* | *"must be logged in"*)
      echo "gcloud is not logged in: gcloud auth login"
      ;;
    *permission_denied* | *"have permission"* | *"required "*permission* | *'"code": 7,'* | \
      *code=403* | *forbidden* | *"denied: permission"* | *project*"not found or deleted"* | \
      *"property [project]"*)
      echo "the account of gcloud lacks a permission in --project, or --project does not exist;" \
        "docs/tpu.md lists the requirements"
      ;;
    *reservation*"not found"* | *reservation*"not exist"*)
      echo "the reservation does not exist in --zone of --project"
      ;;
    *invalid_argument* | *'"code": 3,'* | *"unrecognized arguments"* | *"invalid choice"* | \
      *"invalid value"* | *"argument --"*)
      echo "a flag is refused; see the message above"
      ;;
    *not_found* | *'"code": 5,'*)
      # Of a slice or a request, it is the state that a watch waits for.
      case $2 in
        gcloud*" create "* | gcloud*" list "*)
          echo "--project, --zone, --network or a reservation does not exist; see above"
          ;;
      esac
      ;;
  esac
}
