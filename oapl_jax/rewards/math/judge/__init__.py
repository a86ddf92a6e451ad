"""The judge of mathematical answers, a program run by judge_pool.py: it loads no JAX."""
