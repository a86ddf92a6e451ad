"""Tokenizers: load from local files, make one for the synthetic tasks, check against the model."""

import os
from pathlib import Path
from typing import Any

import tokenizers

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is absent on purpose
# transformers is imported where it is used: it takes a second, and a misspelt flag should not.
PAD, EOS = "<pad>", "<eos>"
CONTENTS_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load_tokenizer(directory: str | Path) -> Any:
    """Loads a local tokenizer; raises a UserError if it lacks chat template or end of sequence."""
    directory = Path(directory)
    if not (directory / "tokenizer_config.json").is_file():
        raise UserError(
            f"no tokenizer in {directory}: tokenizer_config.json is missing; copy its files there"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for attribute in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, attribute) is None:
            raise UserError(
                f"the tokenizer in {directory} has no {attribute}; set it in tokenizer_config.json"
            )
    return tokenizer


def make_character_tokenizer(characters: str, directory: str | Path) -> Any:
    """Saves a tokenizer with one token per character, and loads it; other characters raise.

    Ids: 0 <pad>, 1 <eos>, then the characters in order. The chat template concatenates contents.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *dict.fromkeys(characters)])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
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
    """Raises a UserError, naming the model's `source`, if a token has no embedding, or tokenizer
    and model end a response with different tokens."""
    name, eos = f"the tokenizer ({tokenizer.name_or_path})", list(config.eos_token_ids)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{name} has {len(tokenizer)} tokens but vocab_size of {source} is "
            f"{config.vocab_size}; use the model's own tokenizer or raise vocab_size"
        )
    if tokenizer.eos_token_id not in eos:
        raise UserError(
            f"{name} ends a response with token {tokenizer.eos_token_id} ({tokenizer.eos_token}) "
            f"but eos_token_id of {source} is {eos}; use the model's own tokenizer or correct it"
        )
