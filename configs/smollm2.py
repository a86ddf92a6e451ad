"""A real pretrained model on two CPU cores: SmolLM2-135M-Instruct takes two OAPL steps on word
problems in the form of GSM8K, made up by oapl_jax.data.samples.

    make run-smollm2

For the problems of GSM8K itself: --config.releases=/data/releases, longer prompts and responses,
and more steps.
"""

from configs import arithmetic, common, objectives


def get_config() -> common.Config:
    config: common.Config = arithmetic.get_config("task=chain_sum").unlock()
    config.releases = "runs/samples"
    root = config.get_oneway_ref("releases")
    gsm8k = lambda split: common.release(
        root, "gsm8k", "openai/gsm8k", f"main/{split}-*.parquet", rows=0
    )
    config.data = dict(
        task="math",
        data_dir="runs/data",
        sets=dict(gsm8k=gsm8k("train"), gsm8k_test=gsm8k("test")),
        train=("gsm8k",),
        validation=("gsm8k_test",),
        test=("gsm8k_test",),
        max_prompt_tokens=96,
        instruction="Say how you add, then: The answer is",
    )
    config.benchmarks.gsm8k_test = gsm8k("test")
    config.model.path = "runs/smollm2-model"
    config.num_steps = 2
    config.group_size = 4
    config.groups_per_step = 4
    config.warmup.num_steps = 0
    objectives.set_anchor(config.objective, 0.05)
    config.objective.constant_length = 48
    config.optim.update(learning_rate=1e-5, warmup_steps=0)
    config.lag.steps = 1
    config.buffer.capacity = 8
    config.rollout.update(
        temperature=0.5,
        max_response_tokens=48,
        prompts_per_call=4,
        max_sequences=16,
        prompt_multiple=16,
    )
    config.learner.update(row_length=144, rows_multiple=4, logp_chunk=32)
    config.evaluation.update(every=0, n=2, ks=(1, 2))
    config.checkpoint.keep = 2
    return config.lock()
