"""The code runs of arXiv 2602.19362: two offline rounds of DeepSeek-R1-Distill-Qwen-14B.

Round 1: the base model answers each DeepCoder problem 8 times, and a run learns from that set.
Round 2: the result answers 4,000 of the problems again, and another run goes on from there.
Round 0: no step; the base model becomes the version that round 1 starts from.

    python -m oapl_jax.train --config=configs/code_contests.py:round=0 ...
    python -m oapl_jax.record --config=configs/code_contests.py:round=1 ...
    python -m oapl_jax.train --config=configs/code_contests.py:round=1 ...

Choices: round=1|2|0; `smoke`, the whole path with a tiny model on two CPU cores; objective=NAME,
with the names of configs/objectives.py. The paper's baseline is DeepCoder's released model (GRPO+),
which is evaluated and not trained here. experiments/README.md has all commands.

[I] marks a value that is inferred: neither the paper nor its authors' code is known to state it.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, objectives

SMOKE_STEPS = 4
# Gradient steps of each round, of 256 sequences. Groups whose rewards are all equal don't count:
# the released set of round 1 has 107,000 of 192,000 responses left, which fits that [I]. Another
# set may have more or fewer left: epochs x groups left x group_size / 256.
STEPS = {
    "1": 418,  # one pass over the 107,000 [I]: the "more than 400 steps" of lag
    "2": 279,  # four passes over 4,000 x 8 responses, if as large a share is left [I]
    "0": 0,
}


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(
        arg,
        round=("1", "2", "0"),
        size=("paper", "smoke"),
        objective=tuple(objectives.OBJECTIVES),
    )
    number = choice["round"]
    config: common.Config = ConfigDict()
    config.releases = "/data/releases"  # where the releases lie, a directory or gs://
    config.rounds = "runs/code_contests"  # where recorded datasets and published versions are
    root, rounds = config.get_oneway_ref("releases"), config.get_oneway_ref("rounds")
    config.seed = 0
    config.num_steps = STEPS[number]
    config.group_size = 8
    config.groups_per_step = 32  # 256 sequences; whole groups; the authors shuffle single responses

    config.data = dict(
        task="code",  # the reward is 1 if every test passes, 6 s a test, else 0
        data_dir="runs/data",
        sets=dict(
            primeintellect=deepcoder(root, "primeintellect/train", rows=16252),
            taco=deepcoder(root, "taco/train", rows=7436),
            lcbv5=deepcoder(root, "lcbv5/train", rows=599),
            lcbv5_test=deepcoder(root, "lcbv5/test", rows=279),
        ),
        train=("primeintellect", "taco", "lcbv5"),  # 24,287 problems
        validation=("lcbv5_test",),
        test=("lcbv5_test",),
        max_prompt_tokens=4096,
        # [I]
        instruction="Solve the problem in Python. A program reads from standard input and writes "
        "to standard output, unless a function is asked for. Put the whole code into one block "
        "that begins with ```python and ends with ```.",
    )
    config.benchmarks = dict(
        livecodebench=livecodebench(root, "2024-08-01", "2025-02-01"),  # v5: 279 problems
        livecodebench_late=livecodebench(root, "2024-10-01", "2025-02-01"),
    )

    config.model = dict(
        path="/data/models/DeepSeek-R1-Distill-Qwen-14B",  # the base, of round 0
        architecture=dict(),  # of a fresh model
        dtype="bfloat16",  # of activations; parameters and optimizer are float32
        remat="full",  # or none, dots, attention, offload: docs/architecture.md
        lora=common.lora(),
    )
    config.mesh = dict(data=1, fsdp=64, context=1, tensor=1)

    config.objective = objectives.objective(choice["objective"])
    config.objective.constant_length = 32000
    if choice["objective"] == "oapl":
        # The denominator: recomputed by the learner from the round's first weights.
        config.objective.update(beta1=1.0, beta2=1e-3, denominator="learner")

    config.optim = dict(
        learning_rate=1e-6,  # decoupled AdamW
        warmup_steps=STEPS[number] // 50,  # 2 %
        final_fraction=0.05,  # of a cosine
        b1=0.9,
        b2=0.95,
        eps=1e-10,
        weight_decay=1e-8,
        max_grad_norm=1.0,  # a step whose norm is not finite is skipped, see learner/train_step.py
        mu_dtype="float32",
    )
    config.warmup = common.no_warmup(config)

    config.lag = dict(mode="window", steps=max(STEPS[number], 1))  # the whole round
    config.buffer = dict(
        mode="clear_on_sync",  # no group of a recorded dataset passes through it
        max_age=1,
        max_reuse=1,
        capacity=512,
        zero_variance="drop",  # [I] see STEPS
        zero_variance_weight=0.1,
    )

    config.rollout = dict(
        sampler="fleet",  # of oapl_jax.record and oapl_jax.evaluate
        overlap=False,
        temperature=0.6,
        top_p=0.95,
        top_k=0,  # [I] none
        max_response_tokens=32000,
        prompts_per_call=32,
        reward_threads=32,
        max_zero_reward_groups=128,
        deadline=7200.0,
        max_sequences=256,
        prompt_multiple=64,
        **common.embedded(),
        **common.recorded(),
    )
    config.rollout.update(source="dataset", dataset=rounds + f"/set{number}")
    config.curriculum = common.curriculum()
    config.fleet = common.fleet()
    config.fleet.update(max_in_flight=256, request_deadline=14400.0)
    config.rewards = common.rewards()
    config.preferences = common.preferences(choice["objective"])
    config.rewards.code.update(parallel=32, thinking_opened=True)
    config.learner = dict(
        micro_batches=4,  # of 64 rows at most, one a device
        row_length=4096 + 32000,
        rows_multiple=64,
        logp_chunk=512,
    )
    config.publish_dtype = "bfloat16"  # [I] of the servers' weights
    config.publish_full_every = 1

    config.evaluation = dict(
        every=0,  # the run itself evaluates nothing: oapl_jax.evaluate does, through the fleet
        n=20,
        ks=(1, 5, 10, 20),
        resamples=1000,
        max_response_tokens=65536,
    )
    config.checkpoint = dict(every=50, keep=2)
    config.tracking = common.tracking()
    config.compile_cache = "../programs"  # from the workdir, for all runs beside it; "": none

    small = choice["size"] == "smoke"
    if small:
        shrink(config)
    if number == "0":
        import_base_model(config, small=small)
    else:
        last = 0 if number == "1" else SMOKE_STEPS if small else STEPS["1"]
        start_from(config, rounds + f"/versions/v{last:06d}")
    if number == "2":
        # 17 % of all problems for the paper's 4,000; which ones those are is not known [I].
        take_part(config, hundredths=60 if small else 17)
    return config.lock()


def shrink(config: common.Config) -> None:
    common.smoke(config)
    objectives.set_anchor(config.objective, 0.05)  # a dozen tokens an answer, not thousands
    config.benchmarks.seen = config.data.sets.taco  # what the warm-up teaches
    config.num_steps = config.lag.steps = SMOKE_STEPS
    config.data.instruction = "Use a ```python block."
    config.data.max_prompt_tokens = 192
    config.rollout.max_response_tokens = config.evaluation.max_response_tokens = 56
    config.objective.constant_length = 56
    config.learner.row_length = 256
    config.warmup.demonstrations = 16


def start_from(config: common.Config, version: Any) -> None:
    """The last version of the round before, as `python -m oapl_jax.publish` wrote it."""
    config.model.path = version


def take_part(config: common.Config, *, hundredths: int) -> None:
    for name in config.data.train:
        config.data.sets[name].part = (0, hundredths)


def import_base_model(config: common.Config, *, small: bool) -> None:
    """Round 0 takes no gradient step: the base model becomes a checkpoint, to be published."""
    config.num_steps, config.lag.steps = 0, 1
    config.rollout.update(source="live", dataset="", sampler="local")
    if small:
        config.warmup.num_steps = 32


def deepcoder(root: common.Config, path: str, *, rows: int) -> common.Config:
    return common.release(
        root,
        "deepcoder",
        "agentica-org/DeepCoder-Preview-Dataset",
        f"{path}-*.parquet",
        rows=rows,
        max_tests=0,  # every test counts
    )


def livecodebench(root: common.Config, start: str, end: str) -> common.Config:
    """The problems of release v5 whose contests were within these days."""
    return common.release(
        root,
        "livecodebench",
        "livecodebench/code_generation_lite",
        *("test.jsonl", "test[2-5].jsonl"),
        rows=880,
        start=start,
        end=end,
        max_tests=0,
    )
