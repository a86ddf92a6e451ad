"""The hyper-parameters of every objective: their one default, and where each comes from."""

from typing import Any

from ml_collections import ConfigDict

from configs.common import Config

# What each objective changes in the section below, above all how its sequences are averaged.
# "A proposal" is a value that the method's source does not state.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "oapl": dict(aggregation="sequence"),
    "oapl_length": dict(aggregation="sequence"),
    # arXiv 2505.20686.
    "a_star_po": dict(aggregation="sequence", denominator="reference", beta1=0.5),
    # arXiv 2503.18929; beta2, its beta, is a proposal.
    "tba": dict(aggregation="sequence", denominator="reference"),
    # arXiv 2602.19041; beta2, its 1 / eta, is a proposal. Its rewards: see preferences().
    "prosper": dict(aggregation="sequence"),
    # arXiv 2501.12599; beta2, its tau, is a proposal.
    "opmd_kimi": dict(aggregation="sequence"),
    # arXiv 2505.17826.
    "opmd_trinity": dict(aggregation="token"),
    # arXiv 2506.20520.
    "asymre": dict(aggregation="sequence"),
    # arXiv 2402.03300 with the clip-higher and the mean over tokens of arXiv 2503.14476.
    "grpo": dict(aggregation="token"),
    # GRPO + importance sampling, the baseline of arXiv 2602.19362, which states neither level nor
    # cap of the weights: both are proposals, and so is its clip, which never acts.
    "grpo_is": dict(aggregation="token", proximal="learner", correction="token_truncate"),
    # arXiv 2602.17616, but for its baseline, which needs the gradient of every response.
    "vcpo": dict(
        aggregation="token",
        proximal="learner",
        correction="sequence_truncate",
        correction_cap=8.0,
        ess_power=0.5,
    ),
    # arXiv 2503.20783.
    "dr_grpo": dict(aggregation="constant", estimator="dr_grpo", clip_high=0.2),
    # arXiv 2402.14740, whose data are fresh; the correction of stale data is a proposal.
    "rloo": dict(
        aggregation="sequence", estimator="rloo", proximal="learner", correction="token_truncate"
    ),
    # arXiv 2507.18071.
    "gspo": dict(aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    # arXiv 2506.13585 with the absolute cap of arXiv 2510.13786.
    "cispo": dict(aggregation="token", correction_cap=5.0, correction_floor=0.0),
    # arXiv 2602.10693.
    "vespo": dict(aggregation="token"),
    # arXiv 2602.02710, whose data are fresh, so that nothing is clipped; clipping stale data is a
    # proposal.
    "maxrl": dict(aggregation="token", clip_high=0.2),
    # Both terms without a ratio, a proposal: the likelihood is then exact, whatever the lag.
    "mixed": dict(aggregation="token", proximal="learner"),
    # The warm-up's objective; with rollouts it is expert iteration.
    "sft": dict(aggregation="token"),
}


# These learn from groups of equal rewards too: sft and mixed imitate right answers, asymre weighs
# all of a group alike. Others learn from differences, or pull to an anchor.
FROM_EQUAL_REWARDS = ("sft", "mixed", "asymre")


def zero_variance(name: str) -> str:
    """What the default job does with a group of equal rewards: its buffer.zero_variance."""
    return "keep" if name in FROM_EQUAL_REWARDS else "drop"


def objective(name: str) -> Config:
    """The hyper-parameters of every objective; each takes the ones that it names.

    A name alone (`--config.objective.name=`) keeps the values of another objective; the argument
    after the config file's colon (`objective=`) sets the right ones.
    """
    section: Config = ConfigDict(
        {
            "name": name,
            # Whose log-probs anchor or correct: the sampler's own ("behavior"), recomputed by the
            # learner from the published version ("learner"), or version 0's ("reference").
            "denominator": "behavior",
            "aggregation": "sequence",
            "constant_length": 1,  # tokens, for aggregation="constant": the longest response
            "kl_weight": 0.0,  # of a KL to the reference, version 0, beside any objective
            # A step is shortened by (ESS / B)^ess_power: arXiv 2602.17616 has 0.5 for Adam.
            "ess_power": 0.0,
            # oapl: arXiv 2602.19362; values for long answers, short ones want a larger beta2, and
            # beta1 = 1e6 is the mean as a baseline. beta2 anchors a_star_po, tba, prosper and
            # opmd_kimi too.
            "beta1": 1.0,
            "beta2": 1e-3,
            "length_exponent": 0.5,  # oapl_length; a proposal
            # prosper: of a group's pairs, those that differ most. arXiv 2602.19041 keeps 0.15;
            # whether of each prompt's pairs or of all is not known, so that 1 is a proposal.
            "pair_share": 1.0,
            # The advantage of the policy-gradient family: grpo, dr_grpo, rloo or maxrl.
            "estimator": "grpo",
            "clip_low": 0.2,
            "clip_high": 0.28,
            "dual_clip": 1e30,  # arXiv 1912.09729; usual is 3.0, and as large as this it is off
            # Decoupled policies: arXiv 2505.24298; the bounds are proposals.
            "proximal": "behavior",
            "correction": "none",
            "correction_cap": 2.0,
            "correction_floor": 0.5,
            # vespo: the authors' code.
            "vespo_power_good": 2.0,
            "vespo_decay_good": 3.0,
            "vespo_power_bad": 3.0,
            "vespo_decay_bad": 2.0,
            # maxrl: algorithm 1. Others are biased unless buffer.zero_variance="keep". The order is
            # that of "truncated", a proposal.
            "maxrl_estimator": "baseline",
            "maxrl_order": 4,
            "verified_reward": 1.0,  # maxrl, mixed: from which an answer is right; a proposal
            "opmd_baseline": "mean",
            "opmd_tau": 1.0,  # opmd_trinity: the authors' code
            # arXiv 2506.20520 asks for a little below 0; the number is Trinity-RFT's default.
            "asymre_shift": -0.1,
            # mixed: arXiv 2504.05118 has 1 and 0.1, where the mean is over right answers' tokens.
            "reinforcement_weight": 1.0,
            "likelihood_weight": 0.1,
        }
    )
    section.update(OBJECTIVES[name])
    return section
