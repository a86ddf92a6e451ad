"""Documents on two CPU cores: a tiny decoder writes tables and formulas from plain descriptions.

    python -m oapl_jax.train --config=configs/documents.py --workdir=runs/documents/round0

The rewards are the four terms of FireRed-OCR (docs/documents.md). The warm-up's demonstrations omit
closing tags, braces and cells; after the warm-up so does the policy.

Choices: --config=configs/documents.py:objective=NAME,round=0|1|2, with the names of
configs/objectives.py. Each round is a supervised stage and then RL; round 1 starts from the weights
where round 0 ended, round 2 from those of round 1, and their demonstrations omit nothing.
"""

from configs import arithmetic, common, objectives

STEPS = 120  # of RL, in each round


def get_config(arg: str | None = None) -> common.Config:
    choice = common.parse_arg(arg, objective=tuple(objectives.OBJECTIVES), round=("0", "1", "2"))
    config: common.Config = arithmetic.get_config(f"objective={choice['objective']}").unlock()
    config.rounds = "runs/documents"  # where the workdirs of rounds lie
    config.num_steps = STEPS
    config.group_size, config.groups_per_step = 8, 16

    config.data.update(task="documents", train_size=8000, test_size=256, max_prompt_tokens=32)
    config.data.generator = dict(
        min_rows=2,
        max_rows=2,
        min_columns=2,
        max_columns=3,
        max_letters=2,
        formulas_alone=0.25,
        formulas_in_tables=0.5,
        max_depth=2,
    )
    config.model.architecture.max_position_embeddings = 144
    config.rollout.max_response_tokens = 112
    config.rollout.prompts_per_call = 16
    config.learner.update(row_length=288, logp_chunk=128)

    config.warmup.update(num_steps=800, noise=0.08, demonstrations=8000, batch_size=32)
    config.warmup.optim.learning_rate = 1e-2
    config.rewards.documents.per_open_tag = 0.5  # our choice: of a dozen tags, not of hundreds
    # The anchor stays that of arithmetic.py, whose answers are a tenth as long: our choice too.
    config.objective.constant_length = 112
    config.lag.steps = 8
    config.evaluation.every = 30
    config.checkpoint.every = 60

    if choice["round"] != "0":
        before = f"/round{int(choice['round']) - 1}/end/v{STEPS:06d}"
        config.model.path = config.get_oneway_ref("rounds") + before
        config.warmup.update(num_steps=100, noise=0.0)
        config.warmup.optim.learning_rate = config.optim.get_oneway_ref("learning_rate")
    return config.lock()
