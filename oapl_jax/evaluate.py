"""What was learned: pass@k, avg@n, maj@n and greedy accuracy, with intervals.

python -m oapl_jax.evaluate --config=configs/arithmetic.py --workdir=runs/arithmetic [--step=N]
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n samples hold a right one.

    The unbiased estimator of arXiv 2107.03374, as a product, so that no binomial overflows.

    Raises:
      ValueError: unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= n and 0 <= c <= n; n={num_samples}, c={num_correct}"
        )
    if num_samples - num_correct < k:
        return 1.0
    wrong = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / wrong))


def maj_at_n(answers: Sequence[str], correct: Sequence[float]) -> float:
    """Whether the most frequent final answer is right; in a tie, the share of those that are.

    An answer is right if a response with it is: one that was cut off behind it gets no reward.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        votes[answer].append(right)
    most = max(map(len, votes.values()))
    return float(np.mean([max(v) for v in votes.values() if len(v) == most]))


def interval(values: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap over problems (percentiles)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
) -> dict[str, Any]:
    """Samples n responses (and a greedy one) to each prompt and grades them.

    Args:
      sampler: holds the policy in question.
      prompts: of the split.
      reward: a response is right if its reward is above 0.
      final_answer: what a response says at its end, for the vote of maj@n.
      n: samples a prompt.
      ks: of pass@k, each at most n.
      sampling: of the n samples.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Returns:
      "pass@k" and its interval "pass@k/interval" for each k, "avg@n", "maj@n", "greedy", "length"
      (mean tokens), "truncated" (share), "entropy" (nats a token, -log-prob averaged over samples),
      "version", "prompts" and "samples".

    Raises:
      UserError: unless each k lies within 1 and n.
    """
    if not ks or min(ks) < 1 or max(ks) > n:
        raise UserError(
            f"evaluation.ks={list(ks)} must lie within 1 and evaluation.n={n}; raise n or change ks"
        )
    sampled = sampler.generate(prompts, n=n, sampling=sampling)
    greedy_sampling = Sampling(0.0, 1.0, 0, sampling.max_response_tokens)
    greedy = sampler.generate(prompts, n=1, sampling=greedy_sampling)

    right = [[float(reward(p, r) > 0) for r in rs] for p, rs in zip(prompts, sampled, strict=True)]
    majority = [
        maj_at_n([final_answer(p, r) for r in rs], correct)
        for p, rs, correct in zip(prompts, sampled, right, strict=True)
    ]
    rollouts = [r for rs in sampled for r in rs]
    result: dict[str, Any] = {}
    for k in ks:
        values = np.array([pass_at_k(n, int(sum(correct)), k) for correct in right])
        result[f"pass@{k}"] = float(values.mean())
        result[f"pass@{k}/interval"] = interval(values, resamples=resamples, seed=seed)
    result[f"avg@{n}"] = float(np.mean(right))
    result[f"maj@{n}"] = float(np.mean(majority))
    result["greedy"] = float(
        np.mean([reward(p, rs[0]) > 0 for p, rs in zip(prompts, greedy, strict=True)])
    )
    tokens = sum(len(r.tokens) for r in rollouts)
    result["length"] = tokens / len(rollouts)
    result["truncated"] = float(np.mean([r.finish_reason == "length" for r in rollouts]))
    result["entropy"] = (
        -float(sum(r.behavior_logp.sum(dtype=np.float64) for r in rollouts)) / tokens
    )
    result["version"], result["prompts"], result["samples"] = sampler.version, len(prompts), n
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """A plain-text table, a row for each named result."""
    first = next(iter(results.values()))
    columns = [k for k in first if k.startswith("pass@") and "/" not in k]
    columns += [k for k in first if k.startswith("maj@")] + [
        "greedy",
        "length",
        "truncated",
        "entropy",
    ]
    lines = ["".join(["        ", *(f"{name:>12}" for name in columns)])]
    for name, result in results.items():
        lines.append("".join([f"{name:<8}", *(f"{result[c]:>12.3f}" for c in columns)]))
    return "\n".join(lines)


def main() -> None:
    from oapl_jax.command import read_command_line  # both import this module
    from oapl_jax.job import open_job

    step = flags.DEFINE_integer("step", None, "checkpoint step; the newest by default")
    split = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "which prompts")
    config, workdir = read_command_line()
    if not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} holds no checkpoints; train there first")
    job = open_job(config, workdir)
    found, params = job.params_at(step.value)
    result = job.grade(found, params, split.value)
    print(table({str(found): result}))
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_code(main)
