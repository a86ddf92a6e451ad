# shellcheck shell=bash
# Sourced by the servers' scripts: where they listen, and how a run learns of them.

# The address in the private network; SGLang has no login.
address() { hostname -I | cut -d ' ' -f 1; }

# Adds a server to a file with one URL a line, by a rename, so that nobody reads half of it.
enter() {
  local file=$1 url=$2
  (
    flock --timeout 60 9
    { cat "$file" 2>/dev/null || true; } | grep -Fvx "$url" >"$file.new" || true
    echo "$url" >>"$file.new"
    mv "$file.new" "$file"
  ) 9>"$file.lock"
}
