"""Evaluation of a split in memory, as training does every `evaluation.every` steps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.evaluation.estimators import interval, maj_at_n, pass_curve
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward: Callable[[Prompt, Rollout], float],
    final_answer: Callable[[Prompt, Rollout], str],
    *,
    n: int,
    ks: Sequence[int],
    sampling: Sampling,
    resamples: int,
    seed: int,
    part_means: Callable[[], dict[str, float]] = dict,
) -> dict[str, Any]:
    """Samples n responses (and a greedy one) to each prompt and grades them.

    Args:
      reward: a response is right if its reward is at least 1.
      final_answer: of a response, for the vote of maj@n.
      ks: of pass@k, each at most n; the bootstrap has `resamples`.
      part_means: means of the rewards' named parts since its last call.

    Returns:
      "pass@k" and its interval "pass@k/interval" for each k, "avg@n", "maj@n", "greedy", "reward"
      (mean) and "part/NAME" of its parts, "length" (mean tokens), "truncated" (share), "entropy"
      (nats a token, -log-prob averaged over samples), "version", "prompts" and "samples".
    """
    sampled = in_order(sampler, prompts, n=n, sampling=sampling)
    greedily = Sampling(0.0, 1.0, 0, sampling.max_response_tokens)
    greedy = in_order(sampler, prompts, n=1, sampling=greedily)

    greedy_right = [reward(p, rs[0]) >= 1 for p, rs in zip(prompts, greedy, strict=True)]
    part_means()  # of the greedy responses
    rewards = [[reward(p, r) for r in rs] for p, rs in zip(prompts, sampled, strict=True)]
    right = [[float(value >= 1) for value in values] for values in rewards]
    answers = [[final_answer(p, r) for r in rs] for p, rs in zip(prompts, sampled, strict=True)]
    majority = list(map(maj_at_n, answers, right))
    rollouts = [r for rs in sampled for r in rs]
    tokens = sum(len(r.tokens) for r in rollouts)
    logp = float(sum(r.behavior_logp.sum(dtype=np.float64) for r in rollouts))
    result: dict[str, Any] = {}
    curves = np.array([pass_curve(n, int(sum(correct))) for correct in right])
    for k in ks:
        values = curves[:, k - 1]
        result[f"pass@{k}"] = float(values.mean())
        result[f"pass@{k}/interval"] = interval(values, resamples=resamples, seed=seed)
    return result | {
        f"avg@{n}": float(np.mean(right)),
        f"maj@{n}": float(np.mean(majority)),
        "greedy": float(np.mean(greedy_right)),
        "reward": float(np.mean(rewards)),
        **part_means(),
        "length": tokens / len(rollouts),
        "truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        "entropy": -logp / tokens,
        "version": sampler.version,
        "prompts": len(prompts),
        "samples": n,
    }


def in_order(
    sampler: Sampler, prompts: Sequence[Prompt], *, n: int, sampling: Sampling
) -> list[tuple[Rollout, ...]]:
    """Samples n rollouts of each prompt, in their order; raises a RunError if a prompt got none."""
    sampled = sampler.generate(prompts, n=n, sampling=sampling)
    done = {s.prompt.stream_index: s.rollouts for s in sampled}
    failed = [p.id for p in prompts if not done.get(p.stream_index)]
    if failed:
        count = f"{len(failed)} of {len(prompts)}"
        raise RunError(f"{count} prompts could not be sampled, the first is {failed[0]}")
    return [done[p.stream_index] for p in prompts]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Formats a plain-text table, a row for each named result."""
    first = next(iter(results.values()))
    columns = [k for k in first if k.startswith("pass@") and "/" not in k]
    columns += [k for k in first if k.startswith("maj@")]
    columns += ["greedy", "length", "truncated", "entropy"]
    lines = [" " * 8 + "".join(f"{name:>12}" for name in columns)]
    for name, result in results.items():
        lines.append(f"{name:<8}" + "".join(f"{result[column]:>12.3f}" for column in columns))
    return "\n".join(lines)
