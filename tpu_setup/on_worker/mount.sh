#!/usr/bin/env bash
# On a virtual machine: mounts the share at the same path as on all others.
#
#   oapl_jax/tpu_setup/on_worker/mount.sh --share=10.1.2.3:/oapl
#
# --share=   NFS export, ADDRESS:/NAME
set -euo pipefail
here=$(dirname "$0")
. "$here/../flags.sh"

mountpoint -q /mnt/oapl && exit
# A new machine may still be running its upgrade.
sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet nfs-common
sudo mkdir -p /mnt/oapl
sudo mount -t nfs -o hard "$share" /mnt/oapl
sudo chmod 1777 /mnt/oapl
