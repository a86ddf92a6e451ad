"""One group as a record of an array_record file, and back.

It is a map, in msgpack with arrays as flax.serialization writes them (no pickle):

    prompt            map: id, text, answer and task, strings; stream_index, int; tokens, int32[P]
    policy_version    int, as Rollout has it
    lengths           int32[n], tokens of each response
    tokens            int32[sum of lengths], the responses one behind the other
    behavior_logp     float32[sum of lengths]
    finish_reasons    list of n strings, "stop" or "length"
    reward            float32[n]
"""

from typing import Any

import numpy as np
from flax import serialization

from oapl_jax.structs import Group, Prompt, Rollout


def encode(group: Group) -> bytes:
    """One record."""
    prompt, rollouts = group.prompt, group.rollouts
    join = lambda arrays, dtype: np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
    return serialization.msgpack_serialize(
        {
            "prompt": {
                "id": prompt.id,
                "stream_index": prompt.stream_index,
                "tokens": np.asarray(prompt.tokens, np.int32),
                "text": prompt.text,
                "answer": prompt.answer,
                "task": prompt.task,
            },
            "policy_version": group.policy_version,
            "lengths": np.array([len(r.tokens) for r in rollouts], np.int32),
            "tokens": join([r.tokens for r in rollouts], np.int32),
            "behavior_logp": join([r.behavior_logp for r in rollouts], np.float32),
            "finish_reasons": [r.finish_reason for r in rollouts],
            "reward": np.asarray(group.reward, np.float32),
        }
    )


def decode(record: bytes) -> Group:
    """The inverse of `encode`."""
    content: Any = serialization.msgpack_restore(record)
    ends = np.cumsum(content["lengths"])[:-1]
    rollouts = zip(
        np.split(content["tokens"], ends),
        np.split(content["behavior_logp"], ends),
        [content["policy_version"]] * len(content["lengths"]),
        content["finish_reasons"],
        strict=True,
    )
    prompt = Prompt(**content["prompt"])
    return Group(prompt, tuple(Rollout(*parts) for parts in rollouts), content["reward"])
