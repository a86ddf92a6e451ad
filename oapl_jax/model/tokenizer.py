"""Tokenizers: load from local files, make one for the synthetic tasks, check against the model."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is absent on purpose

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig

PAD, EOS = "<pad>", "<eos>"
CONTENTS_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load_tokenizer(directory: str | Path) -> Any:
    """Loads the tokenizer of a local directory; never downloads.

    Raises:
      UserError: if there is none, or it has no chat template or no end-of-sequence token.
    """
    directory = Path(directory)
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError(
            f"no tokenizer in {directory}: tokenizer_config.json is missing; name a directory in "
            "Hugging Face format, or copy the tokenizer's files there"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for attribute in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, attribute) is None:
            raise UserError(
                f"the tokenizer in {directory} has no {attribute}; set it in tokenizer_config.json"
            )
    return tokenizer


def make_character_tokenizer(characters: str, directory: str | Path) -> Any:
    """Saves a tokenizer with one token per character, and loads it.

    Ids: 0 <pad>, 1 <eos>, then the characters in order. The chat template concatenates contents.
    Encoding a character outside the vocabulary raises.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *dict.fromkeys(characters)])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    model.decoder = tokenizers.decoders.Fuse()  # the default decoder puts spaces between tokens
    PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=CONTENTS_ONLY,
    ).save_pretrained(str(directory))
    return load_tokenizer(directory)


def check_tokenizer(tokenizer: Any, config: ModelConfig, *, source: str) -> None:
    """Raises a UserError if a token has no embedding, or tokenizer and model end a response with
    different tokens; `source` (the model's directory or config section) is named in it."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer ({tokenizer.name_or_path}) has {len(tokenizer)} tokens but vocab_size "
            f"of {source} is {config.vocab_size}; use the model's own tokenizer or raise vocab_size"
        )
    if tokenizer.eos_token_id not in config.eos_token_ids:
        raise UserError(
            f"the tokenizer ({tokenizer.name_or_path}) ends a response with token "
            f"{tokenizer.eos_token_id} ({tokenizer.eos_token}) but eos_token_id of {source} is "
            f"{list(config.eos_token_ids)}; use the model's own tokenizer or correct eos_token_id"
        )
