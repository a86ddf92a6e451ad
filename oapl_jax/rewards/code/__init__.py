"""Rewards of programs: problems, sandbox, verifier."""
