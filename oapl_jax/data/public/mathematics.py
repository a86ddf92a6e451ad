"""Rows of mathematical data sets, made records: a problem and its final answer."""

from typing import Any

from oapl_jax.data.public.cells import Unfit, answered, asked, text
from oapl_jax.data.public.tables import Row
from oapl_jax.data.records import Record

TASK = "math"  # the verifier


def deepscaler(row: Row) -> Record:
    return problem(row["problem"], row["answer"])


def competition(row: Row) -> Record:
    """AIME, HMMT, BRUMO as MathArena releases them; other columns than these two vary."""
    number = next((row[c] for c in ("problem_idx", "id") if row.get(c) is not None), "")
    metadata = {"number": number, "type": list(row.get("problem_type") or [])}
    return problem(row["problem"], row["answer"], metadata=metadata)


def math500(row: Row) -> Record:
    metadata = {"unique_id": row["unique_id"], "subject": row["subject"]}
    return problem(row["problem"], row["answer"], difficulty=text(row["level"]), metadata=metadata)


def gsm8k(row: Row) -> Record:
    """The final answer stands behind "####", with thousands set off by commas."""
    _, mark, final = text(row["answer"]).rpartition("####")
    if not mark:
        raise Unfit("no final answer behind ####")
    return problem(row["question"], final.replace(",", ""))


def problem(
    question: Any, answer: Any, *, difficulty: str = "", metadata: dict[str, Any] | None = None
) -> Record:
    """A record of a question and its final answer.

    Raises:
      Unfit: if one is missing.
    """
    return answered(
        asked(question), answer, task=TASK, difficulty=difficulty, metadata=metadata or {}
    )
