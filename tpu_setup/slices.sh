# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source it read what find_slice sets
#
# Slices that can be rented, named as in `python -m oapl_jax.plan --topology=...`.
#
# A v5e or v6e type counts chips; a v5p type counts cores, two a chip. A worker is a virtual machine
# of a queued resource. Sources: cloud.google.com/tpu/docs/v5e, v5p, v6e, and runtimes (the images).

slices="
v5e:1x1       v5litepod-1    1
v5e:2x2       v5litepod-4    1
v5e:2x4       v5litepod-8    1
v5e:4x4       v5litepod-16   4
v5e:4x8       v5litepod-32   8
v5e:8x8       v5litepod-64   16
v5e:8x16      v5litepod-128  32
v5e:16x16     v5litepod-256  64
v5p:2x2x1     v5p-8          1
v5p:2x2x2     v5p-16         2
v5p:2x2x4     v5p-32         4
v5p:2x4x4     v5p-64         8
v5p:4x4x4     v5p-128        16
v5p:4x4x8     v5p-256        32
v5p:4x8x8     v5p-512        64
v5p:8x8x8     v5p-1024       128
v5p:8x8x16    v5p-2048       256
v5p:8x16x16   v5p-4096       512
v5p:16x16x16  v5p-8192       1024
v5p:16x16x24  v5p-12288      1536
v6e:1x1       v6e-1          1
v6e:2x2       v6e-4          1
v6e:2x4       v6e-8          1
v6e:4x4       v6e-16         4
v6e:4x8       v6e-32         8
v6e:8x8       v6e-64         16
v6e:8x16      v6e-128        32
v6e:16x16     v6e-256        64
"
declare -A runtimes=([v5e]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)

# Sets accelerator, workers, chips and runtime for $topology.
find_slice() {
  local shape
  while read -r shape accelerator workers; do
    [[ $shape == "$topology" ]] && break
  done <<<"$slices"
  [[ $accelerator ]] || refuse "--topology=$topology is not a slice of the table in slices.sh," \
    "which has v5e:8x8, v5p:4x4x4 and v6e:16x16, for example"
  runtime=${runtimes[${topology%%:*}]}
  shape=${topology#*:}
  chips=$((${shape//x/*}))
}
