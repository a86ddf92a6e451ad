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


def make_batch(
    groups: Sequence[Group],
    advantages: Sequence[np.ndarray],
    weights: np.ndarray,
    *,
    step: int,
    micro_batches: int,
    row_length: int,
    rows_multiple: int,
    max_response_tokens: int,
) -> Batch:
    """Packs all sequences of `groups` into a Batch of numpy arrays.

    Args:
      groups: of one gradient step.
      advantages: float[G] for each group, from its complete set of rewards.
      weights: float[S] aggregation weights in the order of the groups' rollouts.
      step: learner step, for the lag.
      micro_batches: M; the number of sequences must be a multiple of it.
      row_length: T.
      rows_multiple: the number of rows is rounded up to a multiple, so that few shapes are
        compiled.
      max_response_tokens: C.

    Raises:
      UserError: if the sequences can't be divided into micro-batches, or one is longer than a row.
    """
    rollouts = [(g, r) for g in groups for r in g.rollouts]
    if len(rollouts) % micro_batches:
        raise UserError(
            f"learner.micro_batches={micro_batches} does not divide the {len(rollouts)} sequences "
            "of a step (groups_per_step x group_size); choose a divisor"
        )
    longest = max(len(r.tokens) for _, r in rollouts)
    if longest > max_response_tokens:
        raise UserError(
            f"a response has {longest} tokens, more than rollout.max_response_tokens="
            f"{max_response_tokens}; raise it to what the rollouts were sampled with"
        )
    per_micro = len(rollouts) // micro_batches
    lengths = [len(g.prompt.tokens) + len(r.tokens) for g, r in rollouts]
    packed = [
        pack(lengths[m * per_micro : (m + 1) * per_micro], row_length) for m in range(micro_batches)
    ]
    rows = max(map(len, packed))
    rows += -rows % rows_multiple

    row_shape, sequence_shape = (micro_batches, rows, row_length), (micro_batches, per_micro)
    token_shape = (*sequence_shape, max_response_tokens)
    tokens, positions, segments = (np.zeros(row_shape, np.int32) for _ in range(3))
    where = np.zeros(token_shape, np.int32)
    mask, behavior_logp = np.zeros(token_shape, np.float32), np.zeros(token_shape, np.float32)
    for m, layout in enumerate(packed):
        for row, members in enumerate(layout):
            start = 0
            for segment, s in enumerate(members, start=1):
                group, rollout = rollouts[m * per_micro + s]
                prompt, response = group.prompt.tokens, rollout.tokens
                end, here = start + len(prompt) + len(response), start + len(prompt)
                tokens[m, row, start:here], tokens[m, row, here:end] = prompt, response
                positions[m, row, start:end] = np.arange(end - start)
                segments[m, row, start:end] = segment
                where[m, s, : len(response)] = row * row_length + np.arange(here, end)
                mask[m, s, : len(response)] = 1
                behavior_logp[m, s, : len(response)] = rollout.behavior_logp
                start = end
    by_sequence = lambda values, dtype: np.asarray(values, dtype).reshape(sequence_shape)
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=segments,
        where=where,
        mask=mask,
        behavior_logp=behavior_logp,
        reference_logp=behavior_logp,
        advantage=by_sequence(np.concatenate(advantages), np.float32),
        reward=by_sequence(np.concatenate([g.reward for g in groups]), np.float32),
        weight=by_sequence(weights, np.float32),
        lag=by_sequence([step - r.policy_version for _, r in rollouts], np.int32),
    )


def to_mesh(batch: Batch, shardings: Batch) -> Batch:
    """Puts a batch, which every host has whole, where the learner wants it."""
    place = lambda s, x: jax.make_array_from_callback(x.shape, s, lambda part: x[part])
    return jax.tree.map(place, shardings, batch)
