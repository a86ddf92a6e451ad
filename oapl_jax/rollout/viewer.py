"""Kept groups as columns for the rollout viewer of the run report.

Tokens are indices into one list of strings, so that a page spells out only the responses that it
shows; log-probs are thousandths of a nat in int16.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.rollout.dataset import MANIFEST, Dataset, read_manifest
from oapl_jax.rollout.kept import read_notes, token_gaps
from oapl_jax.structs import Group

NATS = 1000  # units of a nat
UNKNOWN = -(1 << 15)  # a gap that no step has computed
PROBED = 64  # groups from which the tokens of all are estimated
BROKEN = "\N{REPLACEMENT CHARACTER}"  # in the text of a token that ends within a character


class TokenTexts:
    """Texts of tokens, for any tokenizer of transformers; without one, their ids."""

    def __init__(self, tokenizer: Any | None):
        self._tokenizer, self._texts = tokenizer, {}
        # Tokens are decoded behind another one, since some tokenizers drop a leading space.
        self._anchor = [tokenizer.eos_token_id] if tokenizer else []
        self._before = len(self._decode(self._anchor))

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; a character of several tokens stands at the first of them."""
        texts = [self._text(token) for token in tokens]
        for broken, run in itertools.groupby(range(len(texts)), lambda i: BROKEN in texts[i]):
            if broken:
                first, *others = run
                together = [*self._anchor, *tokens[first : first + 1 + len(others)]]
                texts[first] = self._decode(together)[self._before :]
                texts[first + 1 : first + 1 + len(others)] = [""] * len(others)
        return texts

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode([*self._anchor, token])[self._before :]
        return self._texts[token]

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return "".join(f"⟨{token}⟩" for token in tokens)
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptRun:
    """The kept groups of a run.

    Attributes:
      name: of the run.
      directory: of the dataset.
      texts: of its tokens.
      ends: stream index -> state in the ledger, and the gradient step that trained on the group.
    """

    name: str
    directory: epath.Path
    texts: TokenTexts
    ends: Mapping[int, tuple[str, int | None]]


class _Columns:
    """Rows of groups and of responses, and the tokens of all responses end to end."""

    def __init__(self):
        self.groups: list[dict[str, Any]] = []
        self.responses: dict[str, list[Any]] = defaultdict(list)
        self.tokens: list[np.ndarray] = []
        self.logp: list[np.ndarray] = []
        self.gap: list[np.ndarray] = []
        self._strings: dict[str, int] = {}

    @property
    def strings(self) -> list[str]:
        return list(self._strings)

    def add(self, run: KeptRun, group: Group, note: Mapping[str, Any]) -> None:
        self.groups.append(_group_row(run, group))
        for row in _response_rows(group, note):
            for name, value in row.items():
                self.responses[name].append(value)
        for rollout in group.rollouts:
            texts = run.texts.spell(rollout.tokens.tolist())
            indices = [self._strings.setdefault(text, len(self._strings)) for text in texts]
            self.tokens.append(np.array(indices, np.int32))
            self.logp.append(rollout.behavior_logp)
        tokens, gap = sum(len(rollout.tokens) for rollout in group.rollouts), token_gaps(note)
        if gap is None or len(gap) != tokens:
            gap = np.full(tokens, np.nan)
        self.gap.append(gap)


def _group_row(run: KeptRun, group: Group) -> dict[str, Any]:
    prompt = group.prompt
    state, step = run.ends.get(prompt.stream_index, ("", None))
    return {
        "run": run.name,
        "prompt": prompt.id,
        "question": prompt.text,
        "reference": prompt.answer,
        "index": prompt.stream_index,
        "version": group.policy_version,
        "state": state,
        "step": step,
        "size": len(group.rollouts),
    }


def _response_rows(group: Group, note: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row of each response; None or "" where the note has no value."""
    size = len(group.rollouts)
    grades = note.get("grades") or [("", "", "")] * size
    log_ratios, targets = (note.get(name) or [None] * size for name in ("log_ratio", "target"))
    for rollout, reward, grade, log_ratio, target in zip(
        group.rollouts, group.reward, grades, log_ratios, targets, strict=True
    ):
        extracted, verdict, reason = grade
        yield {
            "length": len(rollout.tokens),
            "reward": round(float(reward), 4),
            "finish": rollout.finish_reason,
            "extracted": extracted,
            "verdict": verdict,
            "reason": reason,
            "log_ratio": log_ratio,
            "target": target,
        }


def viewer_columns(
    runs: Sequence[KeptRun], *, max_tokens: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Groups of all runs, an even sample of them if they have more than `max_tokens`.

    Returns a JSON-able header and arrays:
      header: "groups", a list of objects; "responses", columns of equal length in the order of the
        groups; "strings"; "kept" and "shown", counts of groups and responses.
      arrays: of all tokens end to end: "tokens", int32 indices in "strings"; "logp" of the sampler
        and "gap", that of the learner less it, in thousandths of a nat, int16.
    """
    columns, kept = _Columns(), {"groups": 0, "responses": 0}
    for run in runs:
        shards = _shards(run.directory)
        kept["groups"] += sum(len(shard["samples"]) for shard in shards)
        kept["responses"] += sum(count for shard in shards for _, count in shard["samples"])
        if shards:
            # Checksums of all shards would take longer than a look at a sample of the groups.
            dataset = Dataset(run.directory, checksums=False)
            groups = [dataset[index] for index in _sample(dataset, max_tokens // len(runs))]
            dataset.close()
            notes = read_notes(run.directory, {group.prompt.stream_index for group in groups})
            for group in groups:
                columns.add(run, group, notes.get(group.prompt.stream_index, {}))
    header = {
        "groups": columns.groups,
        "responses": dict(columns.responses),
        "strings": columns.strings,
        "kept": kept,
        "shown": {
            "groups": len(columns.groups),
            "responses": sum(group["size"] for group in columns.groups),
        },
    }
    end_to_end = lambda arrays: np.concatenate(arrays or [np.empty(0)])
    return header, {
        "tokens": end_to_end(columns.tokens).astype(np.int32),
        "logp": _thousandths(end_to_end(columns.logp)),
        "gap": _thousandths(end_to_end(columns.gap)),
    }


def _shards(directory: epath.Path) -> list[dict[str, Any]]:
    """Manifest entries of the shards; [] for a run that has not written one yet."""
    exists = (directory / MANIFEST).exists()
    return list(read_manifest(directory)["shards"].values()) if exists else []


def _sample(dataset: Dataset, max_tokens: int) -> Sequence[int]:
    """Indices of evenly spaced groups with about `max_tokens` tokens, all if they have fewer."""
    count = len(dataset)
    probed = np.linspace(0, count - 1, min(PROBED, count)).astype(int)
    tokens = np.mean([sum(len(r.tokens) for r in dataset[int(i)].rollouts) for i in probed])
    most = max(int(max_tokens / max(tokens, 1)), 1)
    return range(count) if most >= count else np.linspace(0, count - 1, most).astype(int).tolist()


def _thousandths(nats: np.ndarray) -> np.ndarray:
    """int16, UNKNOWN for nan."""
    limit = -UNKNOWN - 1
    rounded = np.clip(np.round(nats * NATS), -limit, limit)
    return np.where(np.isnan(rounded), UNKNOWN, rounded).astype(np.int16)
