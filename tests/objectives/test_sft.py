"""Maximum likelihood: of what was right, whoever said it."""

import numpy as np
from cases import bound, random_group, run


def test_every_token_of_a_right_answer_is_made_likelier_by_the_same():
    logp, behavior, _, mask = random_group(1, [3, 5, 1], 5, spread=0.5)
    objective = bound("sft")
    advantage = objective.advantage(np.array([1.0, 0.0, 0.5], np.float32))
    np.testing.assert_array_equal(advantage, [1.0, 0.0, 0.5])  # no baseline
    losses, gradient, _ = run(objective, logp, behavior, advantage, mask)
    right = np.array([1.0, 0.0, 0.5])
    np.testing.assert_allclose(losses, -right * (logp * mask).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(gradient, -right[:, None] * mask)
    np.testing.assert_array_equal(losses, run(objective, logp, 2 * behavior, advantage, mask)[0])
