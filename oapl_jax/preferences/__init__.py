"""Preferences: rewards by comparison with the reference policy's responses, without a verifier.

A judge (judges.py, language_model.py) compares responses objective by objective; winner.py turns
its preferences into a target for each response, which is the group's reward (rewards.py).
objectives/prosper.py regresses onto it.
"""

from oapl_jax.preferences.judges import CallableJudge, Judge, Response, RubricJudge
from oapl_jax.preferences.language_model import LanguageModelJudge
from oapl_jax.preferences.rewards import Preferences, RecordedComparators, SampledComparators

__all__ = [
    "JUDGES",
    "Judge",
    "Preferences",
    "RecordedComparators",
    "Response",
    "SampledComparators",
]

# Each takes the section of the configuration of its name.
JUDGES = {"rubric": RubricJudge, "language_model": LanguageModelJudge, "callable": CallableJudge}
