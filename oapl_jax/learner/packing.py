"""Packing: the groups of a gradient step -> rows of fixed length -> arrays on the mesh.

Several sequences, each a prompt and its response, share a row of fixed length: a segment id keeps
them apart, and positions start again at 0 in each. Objectives never see rows:
`Batch.token_index` gathers the tokens of each response.
"""

from collections.abc import Sequence

import jax
import numpy as np

from oapl_jax.config import LearnerConfig
from oapl_jax.errors import UserError
from oapl_jax.objectives import Objective
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.structs import Batch, Group


def build_batch(
    groups: Sequence[Group],
    objective: Objective,
    layout: LearnerConfig,
    *,
    aggregation: str,
    step: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    constant_length: int = 1,
    zero_variance_weight: float = 1.0,
) -> Batch:
    """Advantages of whole groups, aggregation weights of the global batch, and packed rows.

    Its shapes depend on the number of sequences and not on their lengths, so that one program is
    compiled: M micro-batches have room for all sequences at their greatest length. Shorter ones
    share rows and fill fewer micro-batches.

    Args:
      groups: of one gradient step, all of one size.
      objective: gives the advantages; if its loss needs whole groups, none is split.
      layout: M micro-batches of rows of T tokens; R, their number of rows, is rounded up.
      aggregation, constant_length: as in objectives/aggregation.py.
      step: learner step, for the lag.
      max_prompt_tokens, max_response_tokens: of any sequence; the latter is C.
      zero_variance_weight: factor on the weights of groups with equal rewards.

    Returns a Batch of numpy arrays, sequences in the order of the groups' rollouts. Raises a
    UserError if a sequence is longer than a row or its settings, or groups do not fit.
    """
    rollouts = [(g, r) for g in groups for r in g.rollouts]
    group_size = len(groups[0].rollouts) if objective.needs_whole_groups else 1
    check_lengths(groups, prompt=max_prompt_tokens, response=max_response_tokens)
    rows = rows_per_micro_batch(len(rollouts), max_prompt_tokens + max_response_tokens, layout)
    micro_batches, row_length = layout.micro_batches, layout.row_length
    lengths = [len(g.prompt.tokens) + len(r.tokens) for g, r in rollouts]
    filled = fill(lengths, row_length=row_length, rows=rows, group_size=group_size)
    if len(filled) > micro_batches or max(map(len, filled)) > rows:
        raise UserError(
            f"learner.micro_batches={micro_batches} has no room for whole groups of {group_size}, "
            "which the objective needs; choose a divisor of groups_per_step"
        )

    row_shape, token_shape = (micro_batches, rows, row_length), (len(rollouts), max_response_tokens)
    tokens, positions, segments = (np.zeros(row_shape, np.int32) for _ in range(3))
    token_index = np.zeros(token_shape, np.int32)
    mask, behavior_logp = np.zeros(token_shape, np.float32), np.zeros(token_shape, np.float32)
    for m, micro_batch in enumerate(filled):
        for row, sequences in enumerate(micro_batch):
            row_start, start = (m * rows + row) * row_length, 0
            for segment, s in enumerate(sequences, start=1):
                group, rollout = rollouts[s]
                end, length = start + lengths[s], len(rollout.tokens)
                tokens[m, row, start:end] = np.concatenate([group.prompt.tokens, rollout.tokens])
                positions[m, row, start:end] = np.arange(lengths[s])
                segments[m, row, start:end] = segment
                token_index[s, :length] = row_start + np.arange(end - length, end)
                mask[s, :length] = 1
                behavior_logp[s, :length] = rollout.behavior_logp
                start = end

    weights = sequence_weights(mask.sum(-1), aggregation, constant_length=constant_length)
    factors = np.array([zero_variance_weight if g.zero_variance else 1.0 for g, _ in rollouts])
    return Batch(
        tokens=tokens,
        positions=positions,
        segments=segments,
        token_index=token_index,
        mask=mask,
        behavior_logp=behavior_logp,
        reference_logp=behavior_logp,
        advantage=np.concatenate([objective.advantage(g.reward) for g in groups], dtype=np.float32),
        reward=np.concatenate([g.reward for g in groups], dtype=np.float32),
        weight=(weights * factors).astype(np.float32),
        lag=np.array([step - r.policy_version for _, r in rollouts], np.int32),
    )


def check_lengths(groups: Sequence[Group], *, prompt: int, response: int) -> None:
    """Raises a UserError for a prompt or response that is longer than its setting allows."""
    longest = max(len(r.tokens) for g in groups for r in g.rollouts)
    longest_prompt = max(len(g.prompt.tokens) for g in groups)
    for tokens, limit, setting in (
        (longest, response, "rollout.max_response_tokens"),
        (longest_prompt, prompt, "data.max_prompt_tokens"),
    ):
        if tokens > limit:
            raise UserError(
                f"a recorded or sampled text has {tokens} tokens, more than {setting}={limit}; "
                "raise it to the value of the sampling run"
            )


def rows_per_micro_batch(sequences: int, longest: int, layout: LearnerConfig) -> int:
    """R: M micro-batches of R rows hold all sequences, even if each has `longest` tokens."""
    per_row = max(layout.row_length // longest, 1)
    rows = -(-sequences // (per_row * layout.micro_batches))
    return rows + -rows % layout.rows_multiple


def check_whole_groups(
    groups_per_step: int, group_size: int, longest: int, layout: LearnerConfig
) -> None:
    """Raises a UserError if micro-batches of this layout can't hold whole groups."""
    rows = rows_per_micro_batch(groups_per_step * group_size, longest, layout)
    rows_per_group = -(-group_size // max(layout.row_length // longest, 1))
    if layout.micro_batches * (rows // rows_per_group) < groups_per_step:
        raise UserError(
            "the objective needs whole groups in a micro-batch, and learner.micro_batches="
            f"{layout.micro_batches} leaves each {rows} rows for them; choose a divisor of "
            f"groups_per_step={groups_per_step}"
        )


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of sequence indices by first fit, longest first, none of over `row_length` tokens."""
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
        row = next((r for r, free in enumerate(space) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(row_length)
        rows[row].append(index)
        space[row] -= length
    return rows


def fill(
    lengths: Sequence[int], *, row_length: int, rows: int, group_size: int = 1
) -> list[list[list[int]]]:
    """Micro-batches of at most `rows` rows of sequence indices, as few as packing finds.

    With `group_size` above 1 so many consecutive sequences always share a micro-batch.
    """
    if group_size == 1:
        packed = pack(lengths, row_length)
        return [packed[start : start + rows] for start in range(0, len(packed), rows)]

    def pack_range(start: int, end: int) -> list[list[int]]:
        packed = pack(lengths[start:end], row_length)
        return [[start + index for index in row] for row in packed]

    filled, first = [], 0
    for end in range(group_size, len(lengths) + 1, group_size):
        if len(pack_range(first, end)) > rows:
            filled.append(pack_range(first, end - group_size))
            first = end - group_size
    return [*filled, pack_range(first, len(lengths))]


def to_mesh(batch: Batch, shardings: Batch) -> Batch:
    """Places a batch, of which every host has a whole copy, in the learner's shardings."""
    place = lambda s, x: jax.make_array_from_callback(x.shape, s, lambda part: x[part])
    return jax.tree.map(place, shardings, batch)
