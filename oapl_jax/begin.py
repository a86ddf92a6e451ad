"""A run's first state: a checkpoint's weights or fresh ones, after the warm-up if there is one."""

import functools
import time
from typing import Any

from oapl_jax import heartbeat
from oapl_jax.build import Job
from oapl_jax.data.synthetic.demonstrations import demonstrations
from oapl_jax.learner import train_step as learner
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.sft import warm_up
from oapl_jax.tracking.progress import Progress


def begin(job: Job) -> tuple[learner.TrainState, dict[str, Any]]:
    """A state at step 0, after the warm-up if there is one, and what the loop keeps beside it."""
    config, started = job.config, time.monotonic()
    together = functools.partial(heartbeat.together, deadline=config.rollout.deadline)
    with together("loading the model"):
        params: Any = job.policy.load_params(job.mesh) if job.policy.checkpoint else config.seed
    if config.warmup.num_steps:
        warmup = config.warmup
        stream = demonstrations(
            job.splits["train"],
            job.policy.tokenizer,
            task=config.data.task,
            count=warmup.demonstrations,
            noise=warmup.noise,
            seed=config.seed,
            max_prompt_tokens=config.data.max_prompt_tokens,
            instruction=config.data.instruction,
            max_response_tokens=config.rollout.max_response_tokens,
        )
        progress = Progress("warm up", warmup.num_steps, 0)
        with together("the warm-up") as work:

            def log(step: int, line: dict[str, float]) -> None:
                work.goes_on()
                progress.step(step, line)

            params = warm_up(
                job.model,
                make_optimizer(**warmup.optim, num_steps=warmup.num_steps),
                job.mesh,
                stream,
                params=params,
                num_steps=warmup.num_steps,
                batch_size=warmup.batch_size,
                micro_batches=config.learner.micro_batches,
                row_length=config.learner.row_length,
                rows_multiple=config.learner.rows_multiple,
                logp_chunk=config.learner.logp_chunk,
                max_prompt_tokens=config.data.max_prompt_tokens,
                max_response_tokens=config.rollout.max_response_tokens,
                log=log,
            )
        progress.close()
    seconds = {"warmup": time.monotonic() - started, "rl": 0.0}
    with together("the first state"):
        state = learner.init_state(job.model, job.optimizer, job.mesh, params)
    before = job.grade(0, state.params, "test") if config.evaluation.every else {}
    return state, {"before": before, "seconds": seconds, "pins": {}}
