"""Rewards of structured documents: markup, formulas, verifier."""
