#!/usr/bin/env bash
# Puts a commit of this checkout on every worker of a slice, and installs it there.
#
#   tpu_setup/install.sh --project=P --zone=us-east5-a --name=learner --share=10.1.2.3:/oapl
#
# --project=      that pays
# --zone=         of the slice
# --name=         of the slice
# --share=        NFS, mounted as /mnt/oapl: ADDRESS:/oapl with what create_share.sh printed
# --commit=HEAD   of this checkout
# --dry-run       print the commands, do nothing
set -euo pipefail
here=$(dirname "$0")
. "$here/flags.sh"
. "$here/tpus.sh"

find_commit
archive=${TMPDIR:-/tmp}/oapl_jax-$commit.tar.gz
run git -C "$root" archive --prefix=oapl_jax/ --output="$archive" "$commit"
tpus tpu-vm scp "$archive" "$name:oapl_jax.tar.gz" --worker=all
on_worker=oapl_jax/tpu_setup/on_worker
on_workers all "tar -xzf oapl_jax.tar.gz && $(quoted $on_worker/mount.sh --share="$share") &&\
 $on_worker/install.sh"
