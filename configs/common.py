"""What the configurations share: the argument after the colon, and common sections."""

from typing import Any

from ml_collections import ConfigDict

Config = Any  # a ConfigDict, whose attributes have no static types


def parse_arg(arg: str | None, **choices: tuple[str, ...]) -> dict[str, str]:
    """Reads "task=chain_sum,objective=grpo"; the first of `choices` is the default.

    Raises:
      ValueError: for a name or a value that is not offered.
    """
    chosen = {name: values[0] for name, values in choices.items()}
    for part in (arg or "").split(","):
        if not part:
            continue
        name, _, value = part.partition("=")
        if name not in choices or value not in choices[name]:
            offered = "; ".join(f"{n}={'|'.join(v)}" for n, v in choices.items())
            raise ValueError(f"--config=...:{arg} is not offered here; choose among {offered}")
        chosen[name] = value
    return chosen


def objective(name: str) -> Config:
    """The hyper-parameters of every objective; each takes the ones that it names."""
    section: Config = ConfigDict(
        {
            "name": name,
            # Whose log-probs anchor or correct: the sampler's own ("behavior"), or recomputed by
            # the learner from the published version ("learner").
            "denominator": "behavior",
            "aggregation": "sequence",
            "constant_length": 1,  # tokens, for aggregation="constant"
            # oapl: arXiv 2602.19362; values for long answers, short ones want a larger beta2.
            "beta1": 1.0,
            "beta2": 1e-3,
            # grpo: clip-higher of arXiv 2503.14476; correction and cap are proposals, the paper's
            # own baseline does not state them.
            "normalize_std": True,
            "clip_low": 0.2,
            "clip_high": 0.28,
            "proximal": "behavior",
            "correction": "none",
            "correction_cap": 2.0,
            "correction_floor": 0.5,
        }
    )
    if name == "grpo":
        section.aggregation = "token"
    return section
