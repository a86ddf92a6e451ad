"""The model that a configuration names, in sizes."""

import os
import string

from etils import epath

from oapl_jax.data.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.job import Config
from oapl_jax.models import hf
from oapl_jax.models.config import ModelConfig
from oapl_jax.models.published import PUBLISHED, published
from oapl_jax.policy import Policy, check_lengths, open_policy


def model_of(config: Config, name: str | None, scratch: epath.Path) -> tuple[ModelConfig, bool]:
    """The sizes of the model, and whether its weights come from files.

    Args:
      config: of the run.
      name: of a published model, whose sizes then count; None for `model.path` or, if that is
        empty, `model.architecture`.
      scratch: a directory for the tokenizer of a fresh model.

    Raises:
      UserError: if the checkpoint is not on this machine, or prompt and response do not fit.
    """
    path, task = config.model.path, config.data.task
    if name is not None:
        sizes = published(name)
    elif path and not os.path.exists(path):
        raise UserError(
            f"model.path={path} is not on this machine; give its sizes with --model="
            f"{'|'.join(PUBLISHED)}"
        )
    elif path:
        sizes = hf.load_config(path)
    else:
        characters = TASKS[task].characters if task in TASKS else string.printable
        architecture = config.model.architecture
        sizes = open_policy(
            scratch, path="", architecture=architecture, characters=characters
        ).config
    check_lengths(
        Policy(sizes, None, None),
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        row_length=config.learner.row_length,
    )
    return sizes, bool(name or path)
