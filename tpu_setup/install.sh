#!/usr/bin/env bash
# Copies a commit of this checkout to every worker of a slice and installs it.
#
#   tpu_setup/install.sh --project=P --zone=us-east5-a --name=learner
#
# --project=      project that is billed
# --zone=         zone of the slice
# --name=         name of the slice
# --share=''      NFS export to mount as /mnt/oapl, ADDRESS:/oapl as create_share.sh printed it
# --commit=HEAD   commit of this checkout
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
mount=${share:+$(quoted $on_worker/mount.sh --share="$share") &&}
on_workers all "tar -xzf oapl_jax.tar.gz && $mount $on_worker/install.sh"
