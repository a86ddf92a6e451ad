"""A pretrained model on GSM8K on one host of 8 chips or one GPU: all in one process.

    python -m oapl_jax.train --config=configs/gsm8k.py --workdir=runs/gsm8k \
        --config.model.path=/data/models/Qwen3-0.6B --config.releases=/data/releases

Any Qwen3, Qwen2 or Llama checkpoint (`:qwen2`, `:llama` with its `model.path`); docs/data.md has
the layout of the releases. Sizes that follow from the devices are derived: weights and rows are
split over all of them. `:lora` trains adapters (docs/lora.md). Choices: train=full|lora,
family=qwen3|qwen2|llama, and objective=NAME with the names of configs/objectives.py. Expected: not
measured.
"""

from configs import arithmetic, common, objectives

MODELS = {
    "qwen3": "Qwen3-0.6B",
    "qwen2": "Qwen2.5-0.5B-Instruct",
    "llama": "Llama-3.2-1B-Instruct",
}


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(
        arg, train=("full", "lora"), family=tuple(MODELS), objective=tuple(objectives.OBJECTIVES)
    )
    config: common.Config = arithmetic.get_config(f"objective={choice['objective']}").unlock()
    config.releases = "/data/releases"
    root = config.get_oneway_ref("releases")
    train, validation, test = (
        common.release(root, "gsm8k", "openai/gsm8k", f"main/{split}-*.parquet", rows=rows)
        for split, rows in (("train", 7473), ("train", 7473), ("test", 1319))
    )
    train.part, validation.part = (4, 100), (0, 4)
    config.data = dict(
        task="math",
        data_dir="runs/data",
        sets=dict(train=train, validation=validation, test=test),
        train=("train",),
        validation=("validation",),
        test=("test",),
        max_prompt_tokens=256,
        # The last word is Qwen3's: no thinking before the answer.
        instruction="Reason step by step, and put the final answer within \\boxed{}."
        + " /no_think" * (choice["family"] == "qwen3"),
    )
    config.benchmarks.gsm8k_test = test
    path = f"/data/models/{MODELS[choice['family']]}"
    config.model.update(path=path, dtype="bfloat16", remat="full")
    config.publish_dtype = "bfloat16"
    config.warmup.num_steps = 0

    config.num_steps = 200
    config.group_size = 8
    config.groups_per_step = config.rollout.prompts_per_call = 32
    # Half of a step's responses: a slot that ends is used again, where with 256 all would wait for
    # the longest. With responses of the greatest length it costs little: sampling is 74 % of a step
    # on one H200, and 73 % with 256 slots (oapl_jax.plan, Qwen3-0.6B).
    config.rollout.update(
        max_response_tokens=512, max_sequences=128, prompt_multiple=64, reward_threads=4
    )
    response = common.reference(config.rollout, "max_response_tokens")
    config.learner.update(
        row_length=common.reference(config.data, "max_prompt_tokens") + response,
        rows_multiple=0,  # one row a device
        logp_chunk=256,
    )
    objectives.set_anchor(config.objective, 1e-2)
    config.objective.constant_length = response
    config.optim.update(learning_rate=1e-6, warmup_steps=0, final_fraction=1.0)
    config.lag.steps = 8
    config.buffer.update(capacity=0, zero_variance="drop")
    config.evaluation.update(every=20, n=4, ks=(1, 4))
    config.checkpoint.update(every=20, keep=2)
    if choice["train"] == "lora":
        config.model.lora.rank = 16
        config.optim.learning_rate = 1e-5
    return config.lock()
