"""A real pretrained model on two CPU cores: SmolLM2-135M-Instruct takes two OAPL steps.

make run-smollm2
"""

from configs import arithmetic, common


def get_config() -> common.Config:
    config: common.Config = arithmetic.get_config("task=chain_sum").unlock()
    config.model.path = "runs/smollm2-model"
    config.num_steps = 2
    config.group_size = 4
    config.groups_per_step = 4
    config.data.update(train_size=64, validation_size=8, test_size=8, max_prompt_tokens=64)
    config.data.generator.update(min_terms=2, max_terms=2)
    config.warmup.num_steps = 0
    config.objective.beta2 = 0.05
    config.rollout.temperature = 0.5
    config.optim.update(learning_rate=1e-5, warmup_steps=0)
    config.lag.steps = 1
    config.buffer.capacity = 8
    config.rollout.update(
        max_response_tokens=48, prompts_per_call=4, max_sequences=16, prompt_multiple=16
    )
    config.learner.update(row_length=112, rows_multiple=4, logp_chunk=32)
    config.evaluation.update(every=2, n=2, ks=(1, 2))
    config.checkpoint.keep = 1
    return config.lock()
