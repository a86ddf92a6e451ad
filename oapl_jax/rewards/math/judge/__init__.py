"""The judge of mathematical answers: a program of its own processes, run by judge_pool.py.

It imports nothing of the package but this folder and worker_process.py, so a process loads
math-verify without JAX. The parent imports `numbers` only.
"""
