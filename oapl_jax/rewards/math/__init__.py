"""Rewards of mathematical answers: extraction, judge processes, verifier."""
