"""The embedded default: a tiny decoder learns arithmetic on two CPU cores in a few minutes.

    python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/arithmetic

Choices: --config=configs/arithmetic.py:task=chain_sum|number_sorting|countdown,objective=NAME, with
the names of configs/objectives.py.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, objectives

# The generators' settings; the longest prompt and response in characters; how many training
# problems there is room for; and the warm-up: steps, and how often a demonstrated step is wrong.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": dict(
        generator=dict(min_terms=4, max_terms=4, min_digits=1, max_digits=1),
        max_prompt_tokens=12,
        max_response_tokens=16,
        train_size=16000,
        warmup=dict(num_steps=1000, noise=0.4),
    ),
    "number_sorting": dict(
        generator=dict(min_numbers=6, max_numbers=6, min_value=0, max_value=9),
        max_prompt_tokens=16,
        max_response_tokens=16,
        train_size=6000,
        warmup=dict(num_steps=500, noise=0.2),
    ),
    "countdown": dict(
        generator=dict(
            min_numbers=3, max_numbers=3, min_value=1, max_value=20, min_target=1, max_target=60
        ),
        max_prompt_tokens=16,
        max_response_tokens=20,
        train_size=4000,
        warmup=dict(num_steps=1500, noise=0.05),
    ),
}


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(arg, task=tuple(TASKS), objective=tuple(objectives.OBJECTIVES))
    task = TASKS[choice["task"]]
    config: common.Config = ConfigDict()
    config.seed = 0
    config.num_steps = 400
    config.group_size = 8
    config.groups_per_step = 32

    config.data = dict(
        task=choice["task"],
        data_dir="runs/data",
        train_size=task["train_size"],
        validation_size=256,
        test_size=512,
        seed=0,
        generator=task["generator"],
        max_prompt_tokens=task["max_prompt_tokens"],
        instruction="",  # below each question
    )

    config.model = dict(
        path="",  # a Hugging Face checkpoint; "" makes a fresh model of this architecture
        architecture=dict(
            model_type="qwen3",
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        ),
        dtype="float32",
        # What a layer keeps for its backward pass, see docs/architecture.md: "none" keeps all, then
        # ever less HBM with "dots", "attention", "full" and "offload".
        remat="none",
        lora=common.lora(),
    )
    config.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)

    # The supervised stage: demonstrations whose steps are wrong with probability `noise`.
    config.warmup = dict(
        **task["warmup"],
        batch_size=64,
        demonstrations=min(8000, task["train_size"]),
        optim=dict(
            learning_rate=6e-3,
            warmup_steps=20,
            final_fraction=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            max_grad_norm=1.0,
            mu_dtype="float32",
        ),
    )

    config.objective = objectives.objective(choice["objective"])
    # Our choice: in answers of a dozen tokens the beta2 of long ones limits the drift too little.
    objectives.set_anchor(config.objective, 0.2)
    config.objective.constant_length = task["max_response_tokens"]

    config.optim = dict(
        learning_rate=1e-3,
        warmup_steps=10,
        final_fraction=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        mu_dtype="float32",  # of Adam's first moment; "bfloat16" halves it
    )

    config.lag = dict(mode="window", steps=16)
    config.buffer = dict(
        mode="clear_on_sync",
        max_age=64,
        max_reuse=2,
        capacity=128,
        zero_variance=objectives.zero_variance(choice["objective"]),
        zero_variance_weight=0.1,
    )

    config.rollout = dict(
        sampler="local",  # the embedded decoder, or "fleet": the servers named below
        overlap=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_response_tokens=task["max_response_tokens"],
        prompts_per_call=32,
        reward_threads=1,  # groups rewarded at a time; more where a reward takes long
        max_zero_reward_groups=256,  # in a row without any reward abort the run; 0: never
        deadline=1800.0,  # seconds either side waits for the other, a fleet's pauses included
        max_sequences=256,
        prompt_multiple=task["max_prompt_tokens"],  # one width, so one prefill a call
        **common.embedded(),
        **common.recorded(),
    )
    config.curriculum = common.curriculum()
    config.fleet = common.fleet()
    config.rewards = common.rewards()
    config.preferences = common.preferences(choice["objective"])
    config.learner = dict(micro_batches=16, row_length=64, rows_multiple=8, logp_chunk=64)
    config.publish_dtype = "float32"
    # Versions with all weights; those between are deltas of the one before, for servers in another
    # place than the bucket. With 1, all are whole.
    config.publish_full_every = 1

    config.evaluation = dict(
        every=50,  # steps between two of the validation split; 0: the run evaluates nothing
        n=8,
        ks=(1, 2, 4, 8),
        resamples=1000,
        max_response_tokens=common.reference(
            config.rollout, "max_response_tokens"
        ),  # of benchmarks
    )
    config.benchmarks = dict()  # name -> a data set, as in data.sets of real data (docs/data.md)
    config.checkpoint = dict(every=100, keep=2)
    config.tracking = common.tracking()
    config.compile_cache = "../programs"  # from the workdir, for all runs beside it; "": none
    return config.lock()
