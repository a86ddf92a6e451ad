"""What a run starts from: the decoder's sizes, its tokenizer, and perhaps weights."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from oapl_jax.errors import UserError
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.tokenizer import check_tokenizer, load_tokenizer, make_character_tokenizer


@dataclasses.dataclass(frozen=True)
class Policy:
    config: ModelConfig
    tokenizer: Any
    checkpoint: epath.Path | None  # holds weights; None for a fresh model

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.config.eos_token_ids, self.tokenizer.eos_token_id}))

    def load_params(self, mesh: Mesh) -> Any:
        assert self.checkpoint is not None
        return hf.load_params(self.checkpoint, self.config, mesh=mesh)


def open_policy(
    directory: epath.Path, *, path: str, architecture: Mapping[str, Any], characters: str
) -> Policy:
    """Reads a Hugging Face checkpoint, or lays out a fresh model.

    Args:
      directory: where a fresh model's tokenizer and config.json are written, and found again.
      path: a checkpoint directory; "" for a fresh model.
      architecture: config.json of a fresh model, without vocabulary and special tokens.
      characters: of a fresh model's tokenizer.

    Raises:
      UserError: if tokenizer and model disagree, or the decoder lacks what config.json asks for.
    """
    if path:
        checkpoint = epath.Path(path)
        config, tokenizer = hf.load_config(checkpoint), load_tokenizer(os.fspath(checkpoint))
    else:
        checkpoint = None
        if not (directory / "config.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            tokenizer = make_character_tokenizer(characters, os.fspath(directory))
            sizes = {
                **architecture,
                "vocab_size": len(tokenizer),
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            config = ModelConfig.from_hf(sizes, source="model.architecture")
            (directory / "config.json").write_text(
                json.dumps(config.to_hf(dtype="float32"), indent=1)
            )
        config, tokenizer = hf.load_config(directory), load_tokenizer(os.fspath(directory))
    check_tokenizer(tokenizer, config, source=path or "model.architecture")
    return Policy(config, tokenizer, checkpoint)


def check_lengths(
    policy: Policy, *, max_prompt_tokens: int, max_response_tokens: int, row_length: int
) -> None:
    """Raises a UserError unless the longest prompt and response fit the context and a row."""
    total = max_prompt_tokens + max_response_tokens
    for name, limit in (
        ("the model's max_position_embeddings", policy.config.max_positions),
        ("learner.row_length", row_length),
    ):
        if total > limit:
            raise UserError(
                f"data.max_prompt_tokens={max_prompt_tokens} + rollout.max_response_tokens="
                f"{max_response_tokens} is {total} tokens, more than {name} ({limit}); lower one"
            )
