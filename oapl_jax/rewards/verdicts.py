"""Verdicts of the verifiers as people read them: right, wrong, error or timeout, and the reason."""

from oapl_jax.rewards.code.verifier import CodeVerdict
from oapl_jax.rewards.documents.verifier import DocumentVerdict
from oapl_jax.rewards.function.verifier import FunctionVerdict
from oapl_jax.rewards.math.verifier import MathVerdict

TRUNCATED = "truncated, which gets no reward"
CODE = {"passed": "right", "failed": "wrong", "no_code": "wrong"}
REASONS = {
    "passed": "every test passed",
    "failed": "a wrong output",
    "timeout": "the deadline of the test passed",
    "error": "the program raised, was killed or exceeded a limit",
    "no_code": "no fenced block of code",
}


Verdict = FunctionVerdict | MathVerdict | CodeVerdict | DocumentVerdict | float


def explain(verdict: Verdict) -> tuple[str, str]:
    """The verdict as right, wrong, error or timeout, and the reason."""
    match verdict:
        case MathVerdict() | FunctionVerdict():
            return verdict.outcome, verdict.reason
        case CodeVerdict():
            at = "" if verdict.test is None else f"test {verdict.test}: "
            reason = at + REASONS.get(verdict.outcome, verdict.outcome)
            return CODE.get(verdict.outcome, verdict.outcome), reason
        case DocumentVerdict():
            terms = ", ".join(f"{name} {value + 0:.3g}" for name, value in verdict.terms.items())
            faults = f"; {', '.join(verdict.faults)}" if verdict.faults else ""
            right = "right" if verdict.reward == 1 else "wrong"
            return right, f"reward {verdict.reward:.3g}: {terms}{faults}"
    return ("right" if verdict == 1 else "wrong"), f"reward {verdict:g}"
