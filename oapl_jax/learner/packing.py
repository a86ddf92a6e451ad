"""Groups -> packed rows -> arrays on the mesh.

Several responses, each behind its prompt, share a row of fixed length: a segment id keeps them
apart, and positions start again at 0 in each. Objectives never see rows: `Batch.where` finds each
response again.
"""

from collections.abc import Sequence

import jax
import numpy as np

from oapl_jax.errors import UserError
from oapl_jax.structs import Batch, Group


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of sequence indices by first fit, longest first, none of over `row_length` tokens.

    Raises:
      UserError: if a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > row_length:
            raise UserError(
                f"a sequence of {length} tokens (prompt and response) does not fit a row of "
                f"learner.row_length={row_length}; raise it to data.max_prompt_tokens + "
                "rollout.max_response_tokens"
            )
        row = next((r for r, free in enumerate(space) if free >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            space.append(row_length)
        rows[row].append(index)
        space[row] -= length
    return rows


def fill(
    lengths: Sequence[int], *, row_length: int, rows: int, together: int
) -> list[list[list[int]]]:
    """Micro-batches of at most `rows` rows of sequence indices, as few as packing finds.

    Args:
      lengths: tokens of each sequence.
      row_length: T.
      rows: R.
      together: so many sequences in a row, a group, that may not be parted.
    """
    if together == 1:
        packed = pack(lengths, row_length)
        return [packed[start : start + rows] for start in range(0, len(packed), rows)]

    def packed_range(start: int, end: int) -> list[list[int]]:
        packed = pack(lengths[start:end], row_length)
        return [[start + index for index in row] for row in packed]

    filled, begin = [], 0
    for end in range(together, len(lengths) + 1, together):
        if len(packed_range(begin, end)) > rows:
            filled.append(packed_range(begin, end - together))
            begin = end - together
    return [*filled, packed_range(begin, len(lengths))]


def rows_of(sequences: int, *, per_row: int, micro_batches: int, rows_multiple: int) -> int:
    """R, the rows of a micro-batch: M of them hold all sequences with `per_row` in a row."""
    rows = -(-sequences // (per_row * micro_batches))
    return rows + -rows % rows_multiple


def check_lengths(
    groups: Sequence[Group], *, max_prompt_tokens: int, max_response_tokens: int
) -> None:
    """Raises a UserError for a prompt or response that is longer than its setting says."""
    for what, longest, setting, limit in (
        (
            "response",
            max(len(r.tokens) for g in groups for r in g.rollouts),
            "rollout.max_response_tokens",
            max_response_tokens,
        ),
        (
            "prompt",
            max(len(g.prompt.tokens) for g in groups),
            "data.max_prompt_tokens",
            max_prompt_tokens,
        ),
    ):
        if longest > limit:
            raise UserError(
                f"a {what} has {longest} tokens, more than {setting}={limit}; raise it to what the "
                "rollouts were sampled with"
            )


def make_batch(
    groups: Sequence[Group],
    advantages: Sequence[np.ndarray],
    weights: np.ndarray,
    *,
    step: int,
    micro_batches: int,
    row_length: int,
    rows_multiple: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    together: int,
) -> Batch:
    """Packs all sequences of `groups` into a Batch of numpy arrays.

    Its shapes depend on the number of sequences and not on their lengths, so that one program is
    compiled: M micro-batches have room for all even if each is the longest. Mostly more of them
    share a row, and fewer micro-batches are filled.

    Args:
      groups: of one gradient step.
      advantages: float[G] for each group, from its complete set of rewards.
      weights: float[S] aggregation weights in the order of the groups' rollouts.
      step: learner step, for the lag.
      micro_batches: M, the most of them.
      row_length: T.
      rows_multiple: R is rounded up to a multiple.
      max_prompt_tokens: of any prompt.
      max_response_tokens: C.
      together: 1, or the group size if groups must not be parted by micro-batches.

    Raises:
      UserError: if a sequence is longer than a row, or groups do not fit.
    """
    rollouts = [(g, r) for g in groups for r in g.rollouts]
    check_lengths(
        groups, max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens
    )
    rows = rows_of(
        len(rollouts),
        per_row=max(row_length // (max_prompt_tokens + max_response_tokens), 1),
        micro_batches=micro_batches,
        rows_multiple=rows_multiple,
    )
    lengths = [len(g.prompt.tokens) + len(r.tokens) for g, r in rollouts]
    filled = fill(lengths, row_length=row_length, rows=rows, together=together)
    if len(filled) > micro_batches or max(map(len, filled)) > rows:
        raise UserError(
            f"learner.micro_batches={micro_batches} leaves no room for whole groups of {together}, "
            "which the objective needs; choose a divisor of groups_per_step"
        )

    row_shape, token_shape = (micro_batches, rows, row_length), (len(rollouts), max_response_tokens)
    tokens, positions, segments = (np.zeros(row_shape, np.int32) for _ in range(3))
    where = np.zeros(token_shape, np.int32)
    mask, behavior_logp = np.zeros(token_shape, np.float32), np.zeros(token_shape, np.float32)
    for m, layout in enumerate(filled):
        for row, members in enumerate(layout):
            before, start = (m * rows + row) * row_length, 0
            for segment, s in enumerate(members, start=1):
                group, rollout = rollouts[s]
                prompt, response = group.prompt.tokens, rollout.tokens
                end, here = start + len(prompt) + len(response), start + len(prompt)
                tokens[m, row, start:here], tokens[m, row, here:end] = prompt, response
                positions[m, row, start:end] = np.arange(end - start)
                segments[m, row, start:end] = segment
                where[s, : len(response)] = before + np.arange(here, end)
                mask[s, : len(response)] = 1
                behavior_logp[s, : len(response)] = rollout.behavior_logp
                start = end
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=segments,
        where=where,
        mask=mask,
        behavior_logp=behavior_logp,
        reference_logp=behavior_logp,
        advantage=np.concatenate(advantages).astype(np.float32),
        reward=np.concatenate([g.reward for g in groups]).astype(np.float32),
        weight=np.asarray(weights, np.float32),
        lag=np.array([step - r.policy_version for _, r in rollouts], np.int32),
    )


def to_mesh(batch: Batch, shardings: Batch) -> Batch:
    """Puts a batch, which every host has whole, where the learner wants it."""
    place = lambda s, x: jax.make_array_from_callback(x.shape, s, lambda part: x[part])
    return jax.tree.map(place, shardings, batch)
