"""The constants of every objective: one default each, with its source."""

from typing import Any

from ml_collections import ConfigDict

from configs.common import Config

# The settings that each objective changes below, above all its aggregation, and the sub-section of
# its own constants. "Our choice" marks a value that the method's source does not state.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "oapl": dict(aggregation="sequence"),
    "oapl_length": dict(
        aggregation="sequence", oapl_length=dict(length_exponent=0.5)
    ),  # our choice
    # arXiv 2505.20686.
    "a_star_po": dict(
        aggregation="sequence", denominator="reference", a_star_po=dict(beta1=0.5, beta2=1e-3)
    ),
    # arXiv 2503.18929; beta is our choice.
    "tba": dict(aggregation="sequence", denominator="reference", tba=dict(beta=1e-3)),
    # arXiv 2602.19041; eta is our choice. The paper keeps 0.15 of the pairs, of each prompt's or of
    # all (it does not say); 1 is our choice. Its rewards: see preferences() in common.py.
    "prosper": dict(aggregation="sequence", prosper=dict(eta=1e3, pair_share=1.0)),
    # arXiv 2501.12599; tau is our choice.
    "opmd_kimi": dict(aggregation="sequence", opmd_kimi=dict(tau=1e-3, baseline="mean")),
    # arXiv 2505.17826 and its code.
    "opmd_trinity": dict(aggregation="token", opmd_trinity=dict(tau=1.0, baseline="mean")),
    # arXiv 2506.20520 asks for a little below 0; the number is Trinity-RFT's default.
    "asymre": dict(aggregation="sequence", asymre=dict(delta_v=-0.1)),
    # arXiv 2402.03300 with the clip-higher and the mean over tokens of arXiv 2503.14476.
    "grpo": dict(aggregation="token"),
    # GRPO + importance sampling, the baseline of arXiv 2602.19362, which states neither level nor
    # cap of the weights: both are our choice, and so is its clip, which never acts.
    "grpo_is": dict(
        aggregation="token",
        policy_gradient=dict(proximal="learner", correction="token_truncate"),
    ),
    # arXiv 2602.17616 without its baseline, which needs the gradient of every response.
    "vcpo": dict(
        aggregation="token",
        ess_power=0.5,
        policy_gradient=dict(
            proximal="learner", correction="sequence_truncate", correction_cap=8.0
        ),
    ),
    # arXiv 2503.20783.
    "dr_grpo": dict(
        aggregation="constant", policy_gradient=dict(estimator="dr_grpo", clip_high=0.2)
    ),
    # arXiv 2402.14740, for fresh data; the correction of stale data is our choice.
    "rloo": dict(
        aggregation="sequence",
        policy_gradient=dict(estimator="rloo", proximal="learner", correction="token_truncate"),
    ),
    # arXiv 2507.18071.
    "gspo": dict(aggregation="sequence", gspo=dict(clip_low=3e-4, clip_high=4e-4)),
    # arXiv 2506.13585 with the absolute cap of arXiv 2510.13786.
    "cispo": dict(aggregation="token", cispo=dict(cap=5.0, floor=0.0)),
    # arXiv 2602.10693 and its code.
    "vespo": dict(
        aggregation="token",
        vespo=dict(power_good=2.0, decay_good=3.0, power_bad=3.0, decay_bad=2.0),
    ),
    # arXiv 2602.02710, algorithm 1, for fresh data, so that nothing is clipped; clipping stale data
    # is our choice. Other estimators are biased unless buffer.zero_variance="keep". `order` is that
    # of "truncated"; it and the least reward of a right answer are our choice.
    "maxrl": dict(
        aggregation="token",
        policy_gradient=dict(clip_high=0.2),
        maxrl=dict(estimator="baseline", order=4, verified_reward=1.0),
    ),
    # Both terms without a ratio, our choice: the likelihood is then exact at any lag. The weights
    # are those of arXiv 2504.05118, whose mean is over right answers' tokens.
    "mixed": dict(
        aggregation="token",
        policy_gradient=dict(proximal="learner"),
        mixed=dict(reinforcement_weight=1.0, likelihood_weight=0.1, verified_reward=1.0),
    ),
    # The warm-up's objective; with rollouts it is expert iteration.
    "sft": dict(aggregation="token"),
}

# These learn from groups of equal rewards too: sft and mixed imitate right answers, asymre weighs
# all of a group alike. Others learn from differences, or pull to an anchor.
FROM_EQUAL_REWARDS = ("sft", "mixed", "asymre")


def zero_variance(name: str) -> str:
    """The default of buffer.zero_variance: what happens to a group of equal rewards."""
    return "keep" if name in FROM_EQUAL_REWARDS else "drop"


def objective(name: str) -> Config:
    """The section `objective`: common settings, then the constants of every objective.

    A name alone (`--config.objective.name=`) keeps the common settings and the policy_gradient
    section of another objective; the argument after the config file's colon (`objective=`) sets the
    right ones.
    """
    section: Config = ConfigDict(
        {
            "name": name,
            # Source of the log-probs that anchor or correct: the sampler's own ("behavior"),
            # recomputed from the published version ("learner"), or version 0's ("reference").
            "denominator": "behavior",
            "aggregation": "sequence",
            "constant_length": 1,  # tokens, for aggregation="constant": the longest response
            "kl_weight": 0.0,  # of a KL to the reference, version 0, beside any objective
            # A step is shortened by (ESS / B)^ess_power: arXiv 2602.17616 has 0.5 for Adam.
            "ess_power": 0.0,
            # oapl, oapl_length: arXiv 2602.19362; values for long answers. Short ones want a larger
            # beta2, and beta1 = 1e6 is the mean as a baseline.
            "beta1": 1.0,
            "beta2": 1e-3,
            # grpo, grpo_is, vcpo, dr_grpo, rloo, and others whose loss or advantage is theirs.
            "policy_gradient": {
                "estimator": "grpo",  # of the advantage: grpo, dr_grpo, rloo or maxrl
                "clip_low": 0.2,
                "clip_high": 0.28,
                "dual_clip": 1e30,  # arXiv 1912.09729; usual is 3.0; at this value it is off
                # Decoupled policies: arXiv 2505.24298; the bounds are our choice.
                "proximal": "behavior",
                "correction": "none",
                "correction_cap": 2.0,
                "correction_floor": 0.5,
            },
        }
    )
    for of_one, changes in OBJECTIVES.items():
        if of_one in changes:
            section[of_one] = changes[of_one]
    section.update(OBJECTIVES[name])
    return section


def set_anchor(section: Config, strength: float) -> None:
    """Sets the anchor of every regression, in units of reward per nat: tasks differ in length."""
    section.beta2 = section.a_star_po.beta2 = section.tba.beta = section.opmd_kimi.tau = strength
    section.prosper.eta = 1 / strength
