"""A task of one's own by flags alone: a file of questions, and a reward function or a verifier.

    python -m oapl_jax.train --config=configs/own_task.py --workdir=runs/own \
        --config.data.sets.train=questions.jsonl --config.rewards.function=my_reward:reward

docs/own-task.md leads from the two files to a learning curve. Choices: start=tiny|pretrained, and
objective=NAME with the names of configs/objectives.py. `tiny` is a decoder of 0.1M parameters,
which learns to write from the file's solutions or answers before it learns from rewards;
`pretrained` takes --config.model.path and no warm-up. Lengths that follow from
data.max_prompt_tokens and rollout.max_response_tokens need no setting of their own.
"""

from configs import arithmetic, common, objectives


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(
        arg, start=("tiny", "pretrained"), objective=tuple(objectives.OBJECTIVES)
    )
    pretrained = choice["start"] == "pretrained"
    config: common.Config = arithmetic.get_config(f"objective={choice['objective']}").unlock()
    config.num_steps = 100
    config.data = dict(
        task="function",  # rewards.function judges; or a verifier of the answers: "math", "code"
        data_dir="runs/data",
        # .jsonl, .json or .parquet, of questions; "": drawn from those of train
        sets=dict(train="", validation="", test=""),
        columns=dict(problem="question", answer="answer"),  # names in the files
        validation_share=0.1,  # of the questions, where they are drawn ...
        test_share=0.1,
        most_drawn=256,  # ... up to this many
        seed=0,  # of what is drawn
        max_prompt_tokens=512 if pretrained else 48,
        instruction="",  # below each question
    )
    config.rollout.max_response_tokens = 512 if pretrained else 24
    response = common.reference(config.rollout, "max_response_tokens")
    together = common.reference(config.data, "max_prompt_tokens") + response
    config.learner.row_length = together
    config.objective.constant_length = response
    config.evaluation.max_response_tokens = response
    config.evaluation.every = 10
    config.checkpoint.every = 50
    if pretrained:
        config.model.update(path="/data/models/NAME", dtype="bfloat16", remat="full")
        config.publish_dtype = "bfloat16"
        config.warmup.num_steps = 0
        config.optim.update(learning_rate=1e-6, warmup_steps=0, final_fraction=1.0)
        config.groups_per_step = config.rollout.prompts_per_call = 16
        config.rollout.update(prompt_multiple=64, max_sequences=64)
        config.buffer.capacity = 0  # as rows_multiple, what fits the sampler and the devices
        config.learner.update(rows_multiple=0, logp_chunk=512)
        objectives.set_anchor(config.objective, 1e-2)
    else:
        config.model.architecture.max_position_embeddings = together
        config.warmup.update(num_steps=100, noise=0.0, demonstrations=0)
    return config.lock()
