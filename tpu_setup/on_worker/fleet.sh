# shellcheck shell=bash
# Sourced by the server scripts: address, and entry in the servers file.

# Prints the address in the private network; without --api-key, SGLang asks for no login.
address() { hostname -I | cut -d ' ' -f 1; }

# Adds a URL to the servers file, atomically by a rename.
enter() {
  local file=$1 url=$2
  (
    flock --timeout 60 9
    { cat "$file" 2>/dev/null || true; } | grep -Fvx "$url" >"$file.new" || true
    echo "$url" >>"$file.new"
    mv "$file.new" "$file"
  ) 9>"$file.lock"
}
