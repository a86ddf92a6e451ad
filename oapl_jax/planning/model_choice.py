"""The model that a configuration names, in sizes."""

import os
import string
from collections.abc import Callable

from etils import epath

from oapl_jax.build import Config
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.policy import check_lengths, open_policy
from oapl_jax.model.published import PUBLISHED, published

# What directories are called after, where PUBLISHED has a shorter name.
DIRECTORIES = {
    "deepseek-r1-distill-qwen-14b": "r1-distill-qwen-14b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3.1-8b": "llama-3.1-8b",
}


def model_of(
    config: Config, name: str | None, scratch: epath.Path, say: Callable[[str], None]
) -> tuple[ModelConfig, bool]:
    """The sizes of the model, and whether its weights come from files.

    Args:
      config: of the run.
      name: of a published model, whose sizes then count; None for `model.path` or, if that is
        empty, `model.architecture`.
      scratch: a directory for the tokenizer of a fresh model.
      say: told if `model.path` is not on this machine and its name decides.

    Raises:
      UserError: if the checkpoint is neither on this machine nor called like a published model, or
        prompt and response do not fit.
    """
    path, task = config.model.path, config.data.task
    if name is None and path and not os.path.exists(path):
        name = published_name(path)
        say(f"model.path={path} is not on this machine; planned with the sizes of {name}")
    if name is not None:
        sizes = published(name)
    elif path:
        sizes = hf.load_config(path)
    else:
        characters = TASKS[task].characters if task in TASKS else string.printable
        architecture = config.model.architecture
        sizes = open_policy(
            scratch, path="", architecture=architecture, characters=characters
        ).config
    check_lengths(
        sizes,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        row_length=config.learner.row_length,
    )
    return sizes, bool(name or path)


def published_name(path: str) -> str:
    """The published model that a directory is called after.

    Raises:
      UserError: if there is none.
    """
    last = os.path.basename(path.rstrip("/")).lower()
    name = DIRECTORIES.get(last, last)
    if name not in PUBLISHED:
        raise UserError(
            f"model.path={path} is not on this machine; give its sizes with --model="
            f"{'|'.join(PUBLISHED)}"
        )
    return name
