"""The judge of mathematical answers, a program run by math/verifier.py: it loads no JAX."""
