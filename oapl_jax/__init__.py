"""Off-policy reinforcement learning of language models in JAX, with lag as a treatment variable."""

__version__ = "0.2.0"
