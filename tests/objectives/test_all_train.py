"""Every objective raises the reward of a small tabular policy, on data that is one step old.

The policy is exact (its reward is a sum over all responses), the rest is what a run has: groups
sampled by an older policy, advantages of whole groups, the aggregation of the objective's own
configuration, Adam.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import own_constants, section

from oapl_jax.objectives import OBJECTIVES, bind
from oapl_jax.objectives.aggregation import sequence_weights

PROMPTS, GROUP, STEPS = 6, 8, 100
# Fifteen responses of one to three tokens, each with its share of the response's log-probability.
LENGTHS = np.arange(15) % 3 + 1
MASK = (np.arange(3) < LENGTHS[:, None]).astype(np.float32)
SHARES = MASK / LENGTHS[:, None]
REWARD = np.eye(PROMPTS, len(LENGTHS), dtype=np.float32)  # one response is right


@jax.jit
def token_logps(policy):
    """[P, R, T] of every response to every prompt, under logits [P, R]."""
    return jax.nn.log_softmax(policy)[:, :, None] * SHARES


def expected_reward(policy):
    return float((jax.nn.softmax(policy) * REWARD).sum(-1).mean())


def train(name):
    """The expected reward before and after; the sampler is a step behind."""
    values = section(name, anchor=0.2, constant_length=3)
    objective = bind(name, own_constants(values), group_size=GROUP)
    optimizer, rng = optax.adam(0.05), np.random.default_rng(1)
    rows = np.repeat(np.arange(PROMPTS), GROUP)

    @jax.jit
    def step(policy, state, behavior, sampled, advantage, weights):
        def batch_loss(policy):
            logp = token_logps(policy)[rows, sampled]
            losses, _ = objective.loss(logp, behavior, advantage, jnp.asarray(MASK)[sampled])
            return jnp.sum(weights * losses)

        updates, state = optimizer.update(jax.grad(batch_loss)(policy), state)
        return optax.apply_updates(policy, updates), state

    estimate = jax.jit(jax.vmap(objective.advantage))
    # Right in about one response of five.
    policy = sampler = reference = (
        rng.normal(0, 0.3, REWARD.shape).astype(np.float32) + 1.2 * REWARD
    )
    state = optimizer.init(policy)
    for _ in range(STEPS):
        chances = np.asarray(jax.nn.softmax(jnp.asarray(sampler)), np.float64)
        chances /= chances.sum(-1, keepdims=True)
        sampled = np.concatenate([rng.choice(len(LENGTHS), GROUP, p=p) for p in chances])
        advantage = estimate(REWARD[rows, sampled].reshape(PROMPTS, GROUP)).reshape(-1)
        anchor = reference if values["denominator"] == "reference" else sampler
        weights = sequence_weights(LENGTHS[sampled], values["aggregation"], constant_length=3)
        behavior, sampler = token_logps(anchor)[rows, sampled], policy
        policy, state = step(policy, state, behavior, sampled, advantage, weights)
    return expected_reward(reference), expected_reward(policy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_at_lag_1(name):
    before, after = train(name)
    assert before < 0.3
    # GSPO's trust region is a few ten-thousandths of the mean ratio: its steps are small.
    assert after > (0.5 if name == "gspo" else 0.85)
