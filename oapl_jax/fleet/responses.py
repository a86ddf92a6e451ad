"""What an answer of SGLang's /generate must be, before it is a group or a score."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oapl_jax.fleet.failures import Aborted, Mixed, ServerError, WrongVersion, short
from oapl_jax.structs import Rollout

MIXED_VERSIONS = ("reissue", "keep")
ROUNDING = 1e-4  # nats above 0 that a log-prob may be, from arithmetic in a short dtype


@dataclasses.dataclass(frozen=True)
class Answer:
    """A group, and whether it was kept although it spans two versions."""

    rollouts: tuple[Rollout, ...]
    mixed: bool


def read_group(
    answer: Any,
    *,
    n: int,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
    version: int | None,
    mixed_versions: str,
) -> Answer:
    """The rollouts of an answer of /generate, or the reason why it has none.

    Args:
      answer: parsed JSON: a list of n responses, or one response for n = 1.
      version: that the server must acknowledge for each response, and the rollouts' policy version;
        None for whatever it holds (-1 in the rollouts).
      mixed_versions: what becomes of responses that began with `version` and went on with another:
        "reissue" raises Mixed, "keep" takes them. Their log-probs are then those of the policies
        that drew the tokens, and the stamp is the version that they began with, the older one.

    Raises:
      Aborted: if the server gave a response up.
      Mixed, WrongVersion: see above.
      ServerError: if the number of responses, an id, a log-prob or an end is not what it must be.
    """
    responses = answer if isinstance(answer, list) else [answer]
    stamp = -1 if version is None else version
    if len(responses) != n:
        raise ServerError(f"{len(responses)} responses instead of {n}")
    rollouts, spanned = [], []
    for response in responses:
        try:
            meta = response["meta_info"]
            reason = meta["finish_reason"]["type"]
            drawn = list(response["output_ids"])
            tokens = np.array(drawn, np.int64)
            logp = np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float64)
            scored = [entry[1] for entry in meta["output_token_logprobs"]]
            spans = [str(s["version"]) for s in meta.get("weight_versions") or () if _covers(s)]
            acknowledged = str(meta["weight_version"])
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ServerError(f"a response lacks what it must have: {short(response)}") from error
        if reason == "abort":
            raise Aborted(f"the server gave the group up: {short(meta['finish_reason'])}")
        if drawn != scored:
            raise ServerError("log-probs of other tokens than those of the response")
        wrong = _wrong(tokens, logp, reason, vocab_size, stop_ids, max_response_tokens)
        if wrong:
            raise ServerError(wrong)
        spanned.append(spans or [acknowledged])
        if spanned[-1][-1] != acknowledged:
            raise WrongVersion(f"acknowledges version {acknowledged} with spans {spans}")
        ended = reason if tokens[-1] not in stop_ids else "stop"  # "length" if both came at once
        behavior_logp = np.minimum(logp, 0).astype(np.float32)
        rollouts.append(Rollout(tokens.astype(np.int32), behavior_logp, stamp, ended))
    versions = sorted({v for spans in spanned for v in spans})
    mixed = version is not None and versions != [str(version)]
    if mixed:
        if any(spans[0] != str(version) for spans in spanned):
            raise WrongVersion(f"acknowledges version {', '.join(versions)} instead of {version}")
        if mixed_versions == "reissue":
            raise Mixed(f"spans versions {', '.join(versions)}")
    return Answer(tuple(rollouts), mixed)


def _wrong(
    tokens: np.ndarray,
    logp: np.ndarray,
    reason: str,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
) -> str:
    """What a response can't be, or ""."""
    if tokens.ndim != 1 or not 1 <= len(tokens) <= max_response_tokens:
        return f"a response of shape {tokens.shape}, at most {max_response_tokens} tokens"
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        return f"token id {outside} outside the vocabulary of {vocab_size}"
    if not np.isfinite(logp).all() or logp.max() > ROUNDING:
        return "a log-prob that is above 0 or not finite"
    stops = np.isin(tokens, list(stop_ids))
    if stops[:-1].any():
        return "a response that goes on after a stop token"
    if reason == "stop" and not stops[-1]:
        return f"a stop at token {tokens[-1]}, which is no stop token of this run"
    if reason == "length" and not stops[-1] and len(tokens) < max_response_tokens:
        return f"a response cut off after {len(tokens)} of {max_response_tokens} tokens"
    return "" if reason in ("stop", "length") else f"finish_reason {reason!r}"


def _covers(span: Mapping[str, Any]) -> bool:
    start, end = span["start"], span["end"]
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError("a span without bounds")
    return end > start


def read_scores(
    answer: Any, rows: Sequence[Sequence[int]], *, source: str
) -> tuple[list[np.ndarray], set[str]]:
    """Log-probs of the rows' tokens but the first, and the versions that gave them.

    Args:
      answer: parsed JSON: a response for each row, with its `input_token_logprobs`.
      rows: as they were sent.
      source: named in errors.

    Raises:
      ServerError: if it has no log-probs, or those of other rows.
    """
    try:
        answers = answer if isinstance(answer, list) else [answer]
        entries = [a["meta_info"]["input_token_logprobs"] for a in answers]
        found = [[int(entry[1]) for entry in row] for row in entries]
        scores = [np.array([e[0] for e in row[1:]], np.float32) for row in entries]
        versions = {str(a["meta_info"]["weight_version"]) for a in answers}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"{source} gave no log-probs of a prompt") from error
    # SGLang 0.5 calls the last id of the vocabulary 0 here; its log-prob is right.
    same = len(found) == len(rows) and all(
        len(said) == len(row) and all(a in (b, 0) for a, b in zip(said, row, strict=True))
        for said, row in zip(found, rows, strict=True)
    )
    if not same or not all(np.isfinite(row).all() for row in scores):
        raise ServerError(f"{source} gave wrong log-probs of a prompt")
    return scores, versions
