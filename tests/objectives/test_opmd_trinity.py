"""OPMD in Trinity's form is REINFORCE without a ratio, over 1 + tau."""

import numpy as np
from cases import bound, random_group, run

LENGTHS = [6, 1, 4, 9]


def test_tau_divides_plain_reinforce():
    group = random_group(3, LENGTHS, 9, spread=0.3)
    reinforce = run(bound("sft"), *group)[1]
    trinity = lambda tau: run(bound("opmd_trinity", opmd_tau=tau), *group)
    np.testing.assert_array_equal(trinity(0.0)[1], reinforce)
    np.testing.assert_allclose(trinity(1.0)[1], reinforce / 2, rtol=1e-6)
    np.testing.assert_allclose(trinity(1.0)[0], trinity(0.0)[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(trinity(3.0)[1], reinforce / 4, rtol=1e-6)


def test_its_advantage_is_that_of_kimis_form():
    reward = np.array([1.0, 0.0, 0.5, 0.0], np.float32)
    for baseline in ("mean", "log_mean_exp"):
        found, theirs = (
            bound(name, opmd_baseline=baseline).advantage(reward)
            for name in ("opmd_trinity", "opmd_kimi")
        )
        np.testing.assert_array_equal(found, theirs)
