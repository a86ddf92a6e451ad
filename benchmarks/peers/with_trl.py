"""TRL's GRPOTrainer with given rollouts, through its `rollout_func`."""

import os
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import with_torch
import work
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

BATCH = work.make_rollouts()


def given_rollouts(prompts, trainer):
    """Prompts are numbers of groups, in the trainer's order."""
    groups = [int(prompt) for prompt in prompts[:: work.GROUP_SIZE]]
    rows = [group * work.GROUP_SIZE + i for group in groups for i in range(work.GROUP_SIZE)]
    return {
        "prompt_ids": BATCH.prompts[rows].tolist(),
        "completion_ids": BATCH.responses[rows].tolist(),
        "logprobs": None,
        "given": BATCH.rewards[rows].tolist(),
    }


def given_rewards(completions, given, **rest):
    return given


class Clock(TrainerCallback):
    """Times steps, advantages included."""

    def __init__(self):
        self.start, self.taken = 0.0, []

    def on_step_begin(self, args, state, control, **rest):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **rest):
        self.taken.append(time.perf_counter() - self.start)


def learner(path: str, steps: int, check: bool) -> None:
    adam, clock = work.ADAM, Clock()
    model, tokens = with_torch.load(path), with_torch.batch_tokens()
    before = with_torch.sequence_logp(model, tokens) if check else None
    with tempfile.TemporaryDirectory() as place:
        config = GRPOConfig(
            output_dir=place,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=work.MICRO_BATCH,
            gradient_accumulation_steps=work.SEQUENCES // work.MICRO_BATCH,
            num_generations=work.GROUP_SIZE,
            max_completion_length=work.RESPONSE,
            max_steps=1 if check else 1 + steps,
            loss_type="grpo",
            scale_rewards="none",
            beta=0.0,
            epsilon=work.CLIP,
            learning_rate=adam["learning_rate"],
            adam_beta1=adam["b1"],
            adam_beta2=adam["b2"],
            adam_epsilon=adam["eps"],
            weight_decay=0.0,
            max_grad_norm=adam["max_grad_norm"],
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=given_rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(work.GROUPS)]}),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
            callbacks=[clock],
            rollout_func=given_rollouts,
        )
        trainer.train()
    if check:
        work.report(logp_before=before, logp_after=with_torch.sequence_logp(model, tokens))
    else:
        work.report(seconds=clock.taken[1:])


if __name__ == "__main__":
    given = work.arguments()
    learner(given.model, given.steps, check=given.part == "check")
