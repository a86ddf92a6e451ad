# shellcheck shell=bash
# Sourced by the server scripts: address, local copies, and entry in the servers file.

# Prints the address in the private network; without --api-key, SGLang asks for no login.
address() { hostname -I | cut -d ' ' -f 1; }

# Sets `model` to a local copy of a checkpoint in a bucket.
bring() {
  [[ $1 == gs://* ]] || return 0
  model=$HOME/models/${1##*/}
  mkdir -p "$model"
  gcloud storage rsync --recursive "$1" "$model"
}

# Keeps the fetcher of a run's versions up until this process, later the server's, has ended.
fetch_beside() {
  [[ $1 ]] || return 0
  while kill -0 $$ 2>/dev/null; do
    JAX_PLATFORMS=cpu .venv/bin/python -m oapl_jax.fleet.fetch --from="$1" --to="$HOME/versions" \
      --host="$(address)" --port="$2" &
    tail --pid=$$ -f /dev/null &
    wait -n || true
    # shellcheck disable=SC2046  # one word for each process
    kill $(jobs -p) 2>/dev/null || true
    sleep 5
  done &
}

# Adds a URL to the servers file, atomically: by a rename, or by the generation of an object.
enter() {
  local file=$1 url=$2
  if [[ $file == gs://* ]]; then
    enter_object "$file" "$url"
    return
  fi
  (
    flock --timeout 60 9
    { cat "$file" 2>/dev/null || true; } | grep -Fvx "$url" >"$file.new" || true
    echo "$url" >>"$file.new"
    mv "$file.new" "$file"
  ) 9>"$file.lock"
}

enter_object() {
  local file=$1 url=$2 generation
  for _ in {1..60}; do
    generation=$(gcloud storage objects describe "$file" --format='value(generation)' \
      2>/dev/null) || generation=0
    ! gcloud storage cat "$file" 2>/dev/null | grep -Fqx "$url" || return 0
    { gcloud storage cat "$file" 2>/dev/null || true; echo "$url"; } |
      gcloud storage cp --if-generation-match="$generation" - "$file" && return
    sleep 1 # another server has written it meanwhile
  done
  refuse "--servers-file=$file can't be written; give this machine's account access to the bucket"
}
