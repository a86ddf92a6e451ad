"""Every objective raises the reward of a small tabular policy, on data that is one step old.

The policy is exact (its reward is a sum over all responses), the rest is what a run has: groups
sampled by an older policy, advantages of whole groups, the aggregation of the objective's own
configuration, Adam.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import section

from oapl_jax.objectives import OBJECTIVES, bind
from oapl_jax.objectives.aggregation import sequence_weights

PROMPTS, GROUP, LONGEST, STEPS, LAG = 6, 8, 3, 80, 1
STOP, TOKENS = 0, 3
# All responses: up to the first stop token, or cut off at three.
RESPONSES = [
    r
    for n in range(1, LONGEST + 1)
    for r in itertools.product(range(TOKENS), repeat=n)
    if STOP not in r[:-1] and (r[-1] == STOP or n == LONGEST)
]
LENGTHS = np.array([len(r) for r in RESPONSES])
TABLE = np.array([[*r, *[0] * (LONGEST - len(r))] for r in RESPONSES])
MASK = (np.arange(LONGEST) < LENGTHS[:, None]).astype(np.float32)
RIGHT = [RESPONSES.index(r) for r in [(0,), (1, 0), (2, 0), (1, 2, 0), (2, 2, 0), (1, 1, 2)]]
REWARD = np.eye(len(RESPONSES), dtype=np.float32)[RIGHT]


def response_logps(policy):
    """[P, R, T] of every response to every prompt, under logits [P, T, V]."""
    table = jax.nn.log_softmax(policy)
    return table[:, np.arange(LONGEST), TABLE]


def probabilities(policy):
    logp = np.asarray(response_logps(policy), np.float64)
    return np.exp((logp * MASK).sum(-1))


def expected_reward(policy):
    return float((probabilities(policy) * REWARD).sum(-1).mean())


def start():
    """A policy that is right in about one response of five."""
    logits = np.random.default_rng(0).normal(0, 0.3, (PROMPTS, LONGEST, TOKENS))
    for prompt, right in enumerate(RIGHT):
        logits[prompt, np.arange(LENGTHS[right]), TABLE[right, : LENGTHS[right]]] += 0.6
    return jnp.asarray(logits, jnp.float32)


def train(name):
    """The expected reward before and after; the sampler is `LAG` steps behind."""
    values = section(name, anchor=0.2, constant_length=LONGEST)
    objective = bind(name, values, group_size=GROUP)
    optimizer, rng = optax.adam(0.05), np.random.default_rng(1)
    rows = np.repeat(np.arange(PROMPTS), GROUP)

    @jax.jit
    def step(policy, state, behavior, sampled, advantage, weights):
        def batch_loss(policy):
            logp = response_logps(policy)[rows, sampled]
            losses, _ = objective.loss(logp, behavior, advantage, jnp.asarray(MASK)[sampled])
            return jnp.sum(weights * losses)

        updates, state = optimizer.update(jax.grad(batch_loss)(policy), state)
        return optax.apply_updates(policy, updates), state

    logps = jax.jit(response_logps)
    estimate = jax.jit(jax.vmap(objective.advantage))
    policy = reference = start()
    state, versions = optimizer.init(policy), [policy] * (LAG + 1)
    for _ in range(STEPS):
        sampler = versions[-1 - LAG]
        table = np.asarray(logps(sampler), np.float64)
        chances = np.exp((table * MASK).sum(-1))
        chances /= chances.sum(-1, keepdims=True)
        sampled = np.concatenate([rng.choice(len(RESPONSES), GROUP, p=p) for p in chances])
        advantage = estimate(REWARD[rows, sampled].reshape(PROMPTS, GROUP)).reshape(-1)
        anchor = reference if values["denominator"] == "reference" else sampler
        weights = sequence_weights(
            LENGTHS[sampled], values["aggregation"], constant_length=values["constant_length"]
        )
        behavior = logps(anchor)[rows, sampled]
        policy, state = step(policy, state, behavior, sampled, advantage, weights)
        versions.append(policy)
    return expected_reward(reference), expected_reward(policy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_at_lag_1(name):
    before, after = train(name)
    assert before < 0.3
    # GSPO's trust region is a few ten-thousandths of the mean ratio: its steps are small.
    assert after > (0.5 if name == "gspo" else 0.85)
