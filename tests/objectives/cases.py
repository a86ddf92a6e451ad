"""Shared by the tests of objectives: random groups, a bandit, objectives bound from the config."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import objectives
from oapl_jax.objectives import Objective, bind

INF = float("inf")
LENGTHS = [6, 1, 4, 9]
REWARD = jnp.array([1.0, 0.0, 0.5, 0.0])


# Settings of the section beside constants.
COMMON = {"name", "denominator", "aggregation", "constant_length", "kl_weight", "ess_power"}


def section(name: str, anchor: float | None = None, **changes: Any) -> dict[str, Any]:
    """The section `objective` of a configuration, with some values changed, nested or not.

    Args:
      anchor: strength of the anchor of any regression, by whatever name.
    """
    config = objectives.objective(name)
    if anchor is not None:
        objectives.set_anchor(config, anchor)
    values = config.to_dict()
    for key, value in changes.items():
        places = (values.get(name, {}), values["policy_gradient"], values)
        next(place for place in places if key in place)[key] = value
    return values


def own_constants(values: dict[str, Any]) -> dict[str, Any]:
    """The constants of a section `objective`."""
    return {key: value for key, value in values.items() if key not in COMMON}


def bound(name: str, *, group_size: int = 4, **changes: Any) -> Objective:
    return bind(name, own_constants(section(name, **changes)), group_size=group_size)


def run(objective: Objective, logp, behavior_logp, advantage, mask):
    """(losses, gradient of their sum by logp, metrics) as numpy."""

    def total(logp):
        losses, metrics = objective.loss(
            logp, jnp.asarray(behavior_logp), jnp.asarray(advantage), jnp.asarray(mask)
        )
        return losses.sum(), (losses, metrics)

    (_, (losses, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logp))
    return np.asarray(losses), np.asarray(gradient), jax.tree.map(np.asarray, metrics)


def random_group(seed, lengths, width, spread):
    """(logp, behavior_logp, advantage, mask) in float32; lengths of responses, nats of spread."""
    rng = np.random.default_rng(seed)
    logp = rng.normal(-1.5, 0.5, (len(lengths), width)).astype(np.float32)
    behavior = (logp + rng.normal(0, spread, logp.shape)).astype(np.float32)
    mask = (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.float32)
    return logp, behavior, rng.normal(0, 1, len(lengths)).astype(np.float32), mask


def log_ratios(logp, behavior, mask):
    """Of whole responses, in float64."""
    return ((logp.astype(np.float64) - behavior) * mask).sum(-1)
