"""A real pretrained model on two CPU cores: SmolLM2-135M-Instruct learns a made task with words in
it (reasoning_gym) at a lag of 8.

    make run-smollm2    # unpacks the model; 12 steps
    python -m oapl_jax.train --config=configs/smollm2.py --workdir=runs/smollm2-full

"Ada likes tea. Bo hates rain. Who hates rain? Reply only with a name." A response is right if its
first word is Bo: a name of the two at random would be right half the time. Choices:
train=full|lora, and objective=NAME with the names of configs/objectives.py. experiments/smollm2.py
states the results.
"""

from configs import arithmetic, common, objectives

LEARNING_RATES = {"full": 2e-5, "lora": 3e-4}


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(arg, train=("full", "lora"), objective=tuple(objectives.OBJECTIVES))
    config: common.Config = arithmetic.get_config(f"objective={choice['objective']}").unlock()
    config.num_steps = 48
    config.group_size = 8
    config.groups_per_step = config.rollout.prompts_per_call = 8
    config.data.update(
        task="needle_haystack",
        train_size=1500,
        validation_size=32,
        test_size=128,
        max_prompt_tokens=72,  # 30 of them are the chat template's
    )
    config.data.generator = dict(min_num_statements=2, max_num_statements=2)
    config.model.path = "runs/smollm2-model"
    config.warmup.num_steps = 0
    # All of a step's responses at once, since they are short: with half the slots sampling would be
    # 61 % of a step, and is 49 % (oapl_jax.plan, counted for an H200).
    config.rollout.update(
        temperature=0.5,
        max_response_tokens=24,
        max_sequences=64,
        prompt_multiple=72,  # one width of prompts
        tokens_per_round=8,
    )
    response = common.reference(config.rollout, "max_response_tokens")
    objectives.set_anchor(config.objective, 0.05)
    config.objective.constant_length = response
    config.optim.update(learning_rate=LEARNING_RATES[choice["train"]], warmup_steps=4)
    # From step 8 on every rollout is of the version 8 steps back; a leftover group has lag 9.
    config.lag.update(mode="fixed", steps=8)
    config.buffer.update(mode="keep_with_anchor", max_age=16, capacity=0)
    # A row has some six sequences; the head is computed for responses alone.
    config.learner.update(micro_batches=16, row_length=512, rows_multiple=1, logp_chunk=32)
    config.evaluation.update(every=12, n=8, ks=(1, 8))
    config.checkpoint.update(every=24, keep=1)
    if choice["train"] == "lora":
        config.model.lora.rank = 16
    return config.lock()
