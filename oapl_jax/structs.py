"""Data structures of a training step: Prompt -> Rollout -> Group -> Batch.

Prompts, rollouts and groups are numpy on the host and never change once made; a batch is what the
learner's compiled step takes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import numpy as np
from flax import serialization

from oapl_jax.errors import RunError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question, ready for a sampler.

    Attributes:
      id: name of the record in its dataset split, stable across runs.
      stream_index: position in the prompt stream (for a recorded group -1 - its position in the
        dataset's stream, below 0). With the sample's index in its group it names the random
        numbers of a rollout, so a resumed run samples the same responses.
      tokens: int32[P], the templated prompt.
      text: the question as a person reads it.
      answer: what the reward function compares with.
      task: name of the verifier.
      metadata: JSON of the record's other columns, for a reward function; "" for verifiers.
    """

    id: str
    stream_index: int
    tokens: np.ndarray
    text: str
    answer: str
    task: str
    metadata: str = ""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
      tokens: int32[T], the response with its stop token if it has one, without the prompt.
      behavior_logp: float32[T], log-probability of each token under the policy that sampled it, at
        the sampling temperature, over the whole vocabulary (top-k and top-p are not renormalised).
      policy_version: learner step of the weights that the sampler held.
      finish_reason: "stop" (a stop token was drawn) or "length" (the response was cut off).
    """

    tokens: np.ndarray
    behavior_logp: np.ndarray
    policy_version: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Group:
    """All rollouts of one prompt, with their rewards; always of one policy version.

    Raises:
      RunError: if the rollouts come from several policy versions: the anchor of one group must be
        one policy.
      ValueError: if the number of rollouts is not that of rewards.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    reward: np.ndarray

    def __post_init__(self):
        versions = sorted({r.policy_version for r in self.rollouts})
        if len(versions) != 1:
            raise RunError(
                f"group of prompt {self.prompt.id} mixes policy versions {versions}; sample each "
                "group from one version (drain the sampler before it is refreshed)"
            )
        if self.reward.shape != (len(self.rollouts),):
            raise ValueError(
                f"group of prompt {self.prompt.id} has {len(self.rollouts)} rollouts but reward of "
                f"shape {self.reward.shape}"
            )

    @property
    def policy_version(self) -> int:
        return self.rollouts[0].policy_version

    @property
    def zero_variance(self) -> bool:
        """True if all rewards are equal, so that every advantage is zero."""
        return bool(np.all(self.reward == self.reward[0]))

    @property
    def right_and_stopped(self) -> int:
        """The number of responses that were rewarded with 1 or more and not cut off."""
        stopped = [rollout.finish_reason == "stop" for rollout in self.rollouts]
        return int(np.sum((self.reward >= 1) & stopped))


def encode_groups(
    groups: Sequence[Group], decode: Callable[[np.ndarray], str] | None = None
) -> bytes:
    """Serializes groups: the one format of recorded datasets, checkpoints and the hosts' exchange.

    A msgpack map, with arrays as flax.serialization writes them. "groups" is a list of maps:

        prompt            map of the fields of `Prompt`; tokens as int32[P]
        policy_version    int
        lengths           int32[n], tokens of each response
        tokens            int32[sum of lengths], the responses end to end
        behavior_logp     float32[sum of lengths]
        finish_reasons    list of n strings
        reward            float32[n]
        texts             list of n strings, the responses as `decode` gives them, for people;
                          absent without `decode`
    """
    return serialization.msgpack_serialize(
        {"groups": [_group_to_map(group, decode) for group in groups]}
    )


def decode_groups(content: bytes) -> list[Group]:
    """Inverts `encode_groups`, bit for bit; the arrays are read-only."""
    state: Any = serialization.msgpack_restore(content)
    return [_group_from_map(fields) for fields in state["groups"]]


def _group_to_map(group: Group, decode: Callable[[np.ndarray], str] | None) -> dict[str, Any]:
    rollouts = group.rollouts
    texts = {"texts": [decode(rollout.tokens) for rollout in rollouts]} if decode else {}
    return {
        "prompt": {**vars(group.prompt), "tokens": np.asarray(group.prompt.tokens, np.int32)},
        "policy_version": group.policy_version,
        "lengths": np.array([len(r.tokens) for r in rollouts], np.int32),
        "tokens": np.concatenate([r.tokens for r in rollouts]).astype(np.int32),
        "behavior_logp": np.concatenate([r.behavior_logp for r in rollouts]).astype(np.float32),
        "finish_reasons": [r.finish_reason for r in rollouts],
        "reward": np.asarray(group.reward, np.float32),
        **texts,
    }


def _group_from_map(fields: dict[str, Any]) -> Group:
    ends = np.cumsum(fields["lengths"])[:-1]
    rollouts = [
        Rollout(tokens, logp, fields["policy_version"], reason)
        for tokens, logp, reason in zip(
            np.split(fields["tokens"], ends),
            np.split(fields["behavior_logp"], ends),
            fields["finish_reasons"],
            strict=True,
        )
    ]
    return Group(Prompt(**fields["prompt"]), tuple(rollouts), fields["reward"])


Leaf = Any  # a jax.Array; a numpy array before it is on the mesh; or the sharding of one


@flax.struct.dataclass
class Batch:
    """S sequences, packed into at most M micro-batches of R rows of length T (learner/packing.py).

    The forward pass runs on rows; `token_index` gathers the tokens of each response from them, so
    that one float a token is unpacked for the objective. Micro-batches are filled in order; the
    rest is padding.
    """

    tokens: Leaf  # int32[M, R, T]
    positions: Leaf  # int32[M, R, T], restart in each segment
    segments: Leaf  # int32[M, R, T], 0 is padding
    token_index: Leaf  # int32[S, C], indices in M * R * T of a response's tokens, C the most
    mask: Leaf  # float32[S, C], 1 on response tokens
    behavior_logp: Leaf  # float32[S, C], of the policy that sampled: drift is measured from it
    reference_logp: Leaf  # float32[S, C], the behavior policy's unless the run has a reference
    advantage: Leaf  # float32[S]
    reward: Leaf  # float32[S]
    weight: Leaf  # float32[S], aggregation weight from counts of the global batch
    lag: Leaf  # int32[S], learner version minus behavior version
