"""Ahead of time: whether a configuration fits a TPU slice, how fast it can go, and what binds.

    python -m oapl_jax.plan --config=configs/competition_math.py --topology=v5e:8x8

The TPU compiler needs no TPU. The programs that a run compiles are compiled here for the slice, and
what the compiler says of them is read (docs/plan.md).
"""
