"""Off-policy reinforcement learning of language models in JAX, with lag as a treatment variable."""

__version__ = "0.1.0"
