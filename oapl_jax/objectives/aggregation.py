"""Aggregation of sequence losses into the loss of a batch: one weight a sequence.

Weights come from counts of the global batch before it is split, so responses can be shuffled,
packed and accumulated in any order. The loss of a sequence is a sum over its tokens.
"""

import numpy as np

AGGREGATIONS = ("sequence", "token", "sequence_token", "constant")


def sequence_weights(lengths: np.ndarray, aggregation: str, *, constant_length: int) -> np.ndarray:
    """float32[S] weights w such that sum_i w_i L_i is the loss of the batch.

    Args:
      lengths: int[S], response tokens of every sequence of the global batch.
      aggregation: "sequence" mean over sequences, 1/S; "token" mean over all tokens,
        1/sum(lengths); "sequence_token" mean over sequences of the token mean, 1/(S length_i);
        "constant" mean over sequences of the sum over a fixed length (Dr.GRPO, arXiv 2503.20783),
        1/(S constant_length).
      constant_length: tokens, for "constant" only.
    """
    lengths = np.asarray(lengths, np.float64)
    same, count = np.ones(len(lengths)), len(lengths)
    weights = {
        "sequence": same / count,
        "token": same / lengths.sum(),
        "sequence_token": 1 / (count * lengths),
        "constant": same / (count * constant_length),
    }
    return weights[aggregation].astype(np.float32)
