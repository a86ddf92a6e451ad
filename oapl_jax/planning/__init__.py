"""Compiles a run for a TPU slice without hardware, and reads its memory, traffic and roofline.

`python -m oapl_jax.plan` is the command; docs/plan.md explains the figures.
"""
