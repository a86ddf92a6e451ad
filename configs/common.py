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


# What each objective changes in the section below, above all how its sequences are averaged.
# "A proposal" is a value that the method's source does not state.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "oapl": dict(aggregation="sequence"),
    "oapl_length": dict(aggregation="sequence"),
    # arXiv 2505.20686.
    "a_star_po": dict(aggregation="sequence", denominator="reference", beta1=0.5),
    # arXiv 2503.18929; beta2, its beta, is a proposal.
    "tba": dict(aggregation="sequence", denominator="reference"),
    # arXiv 2501.12599; beta2, its tau, is a proposal.
    "opmd_kimi": dict(aggregation="sequence"),
    # arXiv 2505.17826.
    "opmd_trinity": dict(aggregation="token"),
    # arXiv 2506.20520.
    "asymre": dict(aggregation="sequence"),
    # arXiv 2402.03300 with the clip-higher and the mean over tokens of arXiv 2503.14476.
    "grpo": dict(aggregation="token"),
    # GRPO + importance sampling, the baseline of arXiv 2602.19362, which states neither level nor
    # cap of the weights: both are proposals.
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
            # beta1 = 1e6 is the mean as a baseline. beta2 anchors a_star_po, tba and opmd_kimi too.
            "beta1": 1.0,
            "beta2": 1e-3,
            "length_exponent": 0.5,  # oapl_length; a proposal
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
            # maxrl: algorithm 1. The order is that of estimator "truncated", a proposal.
            "maxrl_estimator": "baseline",
            "maxrl_order": 4,
            "verified_reward": 1.0,  # maxrl, mixed: from which an answer is right; a proposal
            "opmd_baseline": "mean",
            "opmd_tau": 1.0,  # opmd_trinity: the authors' code
            "asymre_shift": -0.1,  # of the order that arXiv 2506.20520 recommends, not its number
            # mixed: arXiv 2504.05118 has 1 and 0.1, where the mean is over right answers' tokens.
            "reinforcement_weight": 1.0,
            "likelihood_weight": 0.1,
        }
    )
    section.update(OBJECTIVES[name])
    return section


def fleet() -> Config:
    """Servers that sample instead of the embedded decoder; name them in one of three ways."""
    return ConfigDict(
        dict(
            servers=(),  # URLs: --config.fleet.servers="('http://10.0.0.2:30000',)"
            servers_file="",  # or a file with one URL a line, read again every members_every
            router="",  # or a sglang-router, whose GET /workers is the list
            members_every=5.0,  # seconds between two looks at servers_file or router
            max_in_flight=64,  # groups requested at a time, over all servers
            attempts=4,  # of a group that fails; then it is dropped and counted
            backoff=0.5,  # seconds before a failed server is tried again; doubles each time ...
            backoff_limit=30.0,  # ... up to this
            health_every=10.0,  # seconds between two looks at a server that serves
            connect_deadline=5.0,  # seconds to open a connection
            answer_deadline=30.0,  # seconds for a control call: health, contract, probe, flush
            request_deadline=1800.0,  # seconds for the rollouts of one group
            drain_deadline=300.0,  # seconds for groups in flight before a refresh; then aborted
            update_deadline=600.0,  # seconds to load a version (a supervised server restarts)
            start_deadline=600.0,  # seconds for a server to answer at all
            no_server_deadline=1200.0,  # seconds that training pauses with no server; then code 3
            refresh_share=0.5,  # of the servers refreshed at a time, at least one
            # Nats between learner and server on a version's probe, by publish_dtype.
            probe_gap=dict(float32=1e-3, bfloat16=0.3),
            mixed_versions="reissue",  # a response of two versions: or "keep", as of the older
        )
    )


def recorded() -> dict[str, Any]:
    """Groups from a recorded set in the place of sampled ones, or beside them; and recording."""
    return dict(
        source="live",  # "shards": recorded groups only, nothing is sampled; "both"
        shards="",  # directory of the set: by oapl_jax.rollout.generate, or rollouts/ of a run
        recorded_share=0.5,  # of the groups of a step, for source="both"
        recorded_order="shuffled",  # endless; "recorded": in the order of the set, once
        recorded_version=0,  # of the set in this run: it starts from these weights; -1: as recorded
        record=False,  # whether live groups are written to rollouts/ in the workdir
        groups_per_shard=1024,  # of record; a shard also ends with each checkpoint
    )


def rewards() -> Config:
    """Verifiers with processes of their own; each opens for the first prompt of its task."""
    return ConfigDict(
        dict(
            math=dict(
                processes=2,
                seconds=5.0,  # an answer; after them its process is killed
                recycle_after=1000,  # answers; then a process makes room for a new one
                memory_bytes=1 << 30,  # of a process
                thinking_opened=False,  # whether the chat template itself writes <think>
            ),
            code=dict(
                isolation="auto",  # "bubblewrap", or "namespaces" of Linux itself
                allow_unsafe=False,  # run programs on a machine that can't isolate them
                parallel=2,  # programs at a time; no more than there are cores
                seconds_per_test=6.0,  # arXiv 2602.19362's released code
                memory_bytes=1 << 30,  # of a program
                processes=16,  # threads of a program
                output_bytes=16 << 20,  # of a test
                temporary_bytes=256 << 20,  # files of a program
                max_tests=0,  # of a problem, the longest ones; 0 for all
                thinking_opened=False,
                packages=("numpy",),  # that a program may import beside the standard library
                start_seconds=60.0,  # for a sandbox to come up
                cache_entries=100_000,  # verdicts kept, by content
            ),
        )
    )
