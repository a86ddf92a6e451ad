"""AsymRE is REINFORCE without a ratio and with a lower baseline."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import bound, random_group, run

from oapl_jax.objectives import advantages

REWARD = jnp.array([1.0, 0.0, 0.5, 0.0])
LENGTHS = [6, 1, 4, 9]


def test_asymre_shifts_the_baseline_of_reinforce():
    centred = np.asarray(advantages.advantage(REWARD, estimator="dr_grpo"))
    shifted = lambda shift: np.asarray(bound("asymre", asymre_shift=shift).advantage(REWARD))
    np.testing.assert_array_equal(shifted(0.0), centred)
    np.testing.assert_allclose(shifted(-0.1), centred + 0.1, rtol=1e-6)
    group = random_group(4, LENGTHS, 9, spread=0.3)
    jax.tree.map(
        np.testing.assert_array_equal,
        run(bound("asymre"), *group)[:2],
        run(bound("sft"), *group)[:2],
    )
