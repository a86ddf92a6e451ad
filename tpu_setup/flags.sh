# shellcheck shell=bash
# Sourced by every script: parses flags, and defines `run`, which only prints under --dry-run.
#
# The comment at a script's head is its --help and declares its flags, one a line:
#   --zone=       required                --poll=60     default; numbers must stay numbers
#   --subnet=''   optional                --spot        switch: "yes" or empty
#   -- ...        further words after `--`, in the array `rest`
# Each flag becomes a variable of its name ($zone, $dry_run). Errors are one sentence and code 2.

script=${0##*/}
rest=()

say() { echo "$script: $*" >&2; }
refuse() { say "$@" && exit 2; }

read_flags() {
  local help line word flag default
  local -A kind=()
  help=$(sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0")
  while IFS= read -r line; do
    if [[ $line == "-- "* ]]; then
      kind[rest]=allowed
    elif [[ $line =~ ^--([a-z-]+)(=([^ ]*))?\ +(.*) ]]; then
      flag=${BASH_REMATCH[1]} default=${BASH_REMATCH[3]}
      case ${BASH_REMATCH[2]} in
        "") kind[$flag]=switch ;;
        =) kind[$flag]="missing: ${BASH_REMATCH[4]}" ;;
        =*[!0-9]*) kind[$flag]=text ;;
        *) kind[$flag]=number ;;
      esac
      assign "$flag" "${default//"''"/}"
    fi
  done <<<"$help"

  while (($#)); do
    word=$1 && shift
    [[ $word == --help ]] && echo "$help" && exit
    if [[ $word == -- ]]; then
      [[ ${kind[rest]-} ]] || refuse "no words are allowed after --; see --help"
      rest=("$@")
      break
    fi
    [[ $word == --* ]] || refuse "$word is not a flag; write --name=value"
    flag=${word#--} && flag=${flag%%=*}
    [[ $flag != rest && ${kind[$flag]-} ]] || refuse "unknown flag --$flag; see --help"
    if [[ ${kind[$flag]} == switch ]]; then
      [[ $word != *=* ]] || refuse "--$flag takes no value"
      assign "$flag" yes
    else
      [[ $word == *=?* ]] || refuse "--$flag needs a value, written --$flag=VALUE"
      [[ ${kind[$flag]} != number || ${word#*=} =~ ^[0-9]+$ ]] || refuse "$word is not a number"
      assign "$flag" "${word#*=}"
      [[ ${kind[$flag]} != missing:* ]] || kind[$flag]=text
    fi
  done

  for flag in "${!kind[@]}"; do
    [[ ${kind[$flag]} != missing:* ]] || refuse "--$flag is missing: ${kind[$flag]#missing: }"
  done
}

assign() { declare -g "${1//-/_}=$2"; }

# Quotes words for a shell where necessary.
quoted() {
  local word words=()
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+~-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# Sets root to this checkout, and resolves $commit.
find_commit() {
  root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
  [[ $commit != HEAD ]] || git -C "$root" diff --quiet HEAD || say "ignores uncommitted changes"
  commit=$(git -C "$root" rev-parse --short --verify --quiet "$commit^{commit}") ||
    refuse "--commit is not a commit of $root"
}

((BASH_VERSINFO[0] >= 5)) || refuse "needs bash 5 or newer, and this is $BASH_VERSION"
read_flags "$@"
