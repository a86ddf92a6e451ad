"""The maths runs of arXiv 2602.19362: Qwen3-4B-Thinking-2507 learns on DeepScaleR, asynchronously.

    python -m oapl_jax.train --config=configs/competition_math.py --workdir=runs/competition_math \
        --config.releases=/data/releases --config.model.path=/data/models/Qwen3-4B-Thinking-2507 \
        --config.fleet.servers_file=servers.txt

Choices: objective=NAME, with the names of configs/objectives.py, of which grpo_is is the paper's
baseline, at a lag of at most 1; and `smoke`, the whole path with a tiny model on two CPU cores.
experiments/README.md has all commands.

[I] marks a value that is inferred: neither the paper nor its authors' code is known to state it.
"""

from ml_collections import ConfigDict

from configs import common, objectives


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(arg, size=("paper", "smoke"), objective=tuple(objectives.OBJECTIVES))
    config: common.Config = ConfigDict()
    config.releases = "/data/releases"  # where the releases lie, a directory or gs://
    root = config.get_oneway_ref("releases")
    config.seed = 0
    config.num_steps = 1000  # [I] 20 windows of lag.steps
    config.group_size = 8  # [I] that of the code runs
    config.groups_per_step = 32  # [I] 256 sequences a gradient step, as in the code runs

    config.data = dict(
        task="math",  # the reward is 1 if the answer equals the reference, else 0
        data_dir="runs/data",
        sets=dict(
            deepscaler=common.release(
                root,
                "deepscaler",
                "agentica-org/DeepScaleR-Preview-Dataset",
                "deepscaler.json",
                rows=40315,
            ),
            aime24=competition(root, "HuggingFaceH4/aime_2024", rows=30),
            aime25=competition(root, "MathArena/aime_2025", rows=30),
        ),
        train=("deepscaler",),
        validation=("aime24",),
        test=("aime25",),
        max_prompt_tokens=1024,  # [I]
        # [I] the wording that the model's authors recommend.
        instruction=r"Please reason step by step, and put your final answer within \boxed{}.",
    )
    config.benchmarks = dict(
        aime24=competition(root, "HuggingFaceH4/aime_2024", rows=30),
        aime25=competition(root, "MathArena/aime_2025", rows=30),
        hmmt25_feb=competition(root, "MathArena/hmmt_feb_2025", rows=30),
        hmmt25_nov=competition(root, "MathArena/hmmt_nov_2025", rows=30),
        brumo25=competition(root, "MathArena/brumo_2025", rows=30),
        math500=common.release(root, "math500", "HuggingFaceH4/MATH-500", "test.jsonl", rows=500),
    )

    config.model = dict(
        path="/data/models/Qwen3-4B-Thinking-2507",
        architecture=dict(),  # of a fresh model
        dtype="bfloat16",  # of activations; parameters and optimizer are float32
        remat="full",  # or none, dots, attention, offload: docs/architecture.md
        lora=common.lora(),
    )
    config.mesh = dict(data=1, fsdp=64, context=1, tensor=1)

    config.objective = objectives.objective(choice["objective"])
    config.objective.constant_length = 16384
    if choice["objective"] == "oapl":
        # The denominator: the servers' own log-probs.
        config.objective.update(beta1=1.0, beta2=1e-3, denominator="behavior")

    config.optim = dict(
        learning_rate=1e-6,  # AdamW; it and max_grad_norm rest on a single reader of the paper
        warmup_steps=0,  # [I] as final_fraction: a constant rate
        final_fraction=1.0,
        b1=0.9,  # [I] as b2, eps and weight_decay: those of the code runs
        b2=0.95,
        eps=1e-10,
        weight_decay=1e-8,
        max_grad_norm=1e-3,
        mu_dtype="float32",
    )
    config.warmup = common.no_warmup(config)

    config.lag = dict(mode="window", steps=50)  # the ablation has 100
    config.buffer = dict(
        mode="clear_on_sync",  # algorithm 1
        max_age=50,
        max_reuse=1,
        capacity=512,  # [I] how large D may become
        zero_variance="keep",  # [I] algorithm 1 drops none
        zero_variance_weight=0.1,
    )

    config.rollout = dict(
        sampler="fleet",
        overlap=True,
        temperature=1.0,  # [I] as top_p and top_k: the servers' log-probs are then of what is drawn
        top_p=1.0,
        top_k=0,
        max_response_tokens=16384,
        prompts_per_call=32,
        reward_threads=16,
        max_zero_reward_groups=128,
        deadline=7200.0,
        max_sequences=256,
        prompt_multiple=64,
        **common.embedded(),
        **common.recorded(),
    )
    config.curriculum = common.curriculum()
    config.fleet = common.fleet()
    config.fleet.update(max_in_flight=256, request_deadline=7200.0)
    config.rewards = common.rewards()
    config.preferences = common.preferences(choice["objective"])
    config.rewards.math.update(processes=8, thinking_opened=True)
    config.learner = dict(
        micro_batches=4,  # of 64 rows at most, one a device
        row_length=1024 + 16384,
        rows_multiple=64,
        logp_chunk=512,
    )
    config.publish_dtype = "bfloat16"  # [I] of the servers' weights
    config.publish_full_every = 1

    config.evaluation = dict(
        every=0,  # the run itself evaluates nothing: oapl_jax.evaluate does, through the fleet
        n=10,  # and --n=256 for the scaling figure
        ks=(1, 5, 10),
        resamples=1000,
        max_response_tokens=common.reference(config.rollout, "max_response_tokens"),  # [I]
    )
    config.checkpoint = dict(every=50, keep=2)
    config.tracking = common.tracking()
    config.compile_cache = "../programs"  # from the workdir, for all runs beside it; "": none

    if choice["objective"] == "grpo_is":  # GRPO + importance sampling, asynchronous
        config.lag = dict(mode="fixed", steps=1)
        config.buffer.update(mode="keep_with_anchor", max_age=1)
    if choice["size"] == "smoke":
        shrink(config)
    return config.lock()


def shrink(config: common.Config) -> None:
    common.smoke(config)
    objectives.set_anchor(config.objective, 0.05)  # a dozen tokens an answer, not thousands
    config.benchmarks.seen = config.data.sets.deepscaler  # what the warm-up teaches
    config.num_steps = 8
    config.lag.steps = min(config.lag.steps, 4)
    config.data.max_prompt_tokens = 128
    config.rollout.max_response_tokens = 16
    config.objective.constant_length = 16
    config.learner.row_length = 144
    config.warmup.update(num_steps=18, demonstrations=8)


def competition(root: common.Config, path: str, *, rows: int) -> common.Config:
    return common.release(root, "competition", path, "data/train-*.parquet", rows=rows)
