"""The judge of answers: a program of its own, run in its own processes and never by the package.

`python -I oapl_jax/rewards/judge` puts this folder, and not the package, on the path of modules: so
a process of the pool loads math-verify without loading JAX. Only `plain` is imported from outside.
"""
