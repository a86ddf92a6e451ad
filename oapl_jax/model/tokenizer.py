"""Tokenizers: loaded from local files, made for the embedded tasks, checked against the model."""

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
    """The tokenizer saved in a local directory; nothing is downloaded.

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
    """Saves a tokenizer of one token a character, and loads it again as any other program would.

    Ids: 0 <pad>, 1 <eos>, then the characters in their order. The chat template only concatenates
    contents. A character outside the vocabulary raises when it is encoded.
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
    """Checks that the tokenizer and the model agree.

    Args:
      tokenizer: the one that templates prompts and decodes responses.
      config: of the policy.
      source: the model's directory or config section, named in errors.

    Raises:
      UserError: if a token has no embedding, or the model does not stop where the tokenizer does.
    """
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


def stop_ids(tokenizer: Any, config: ModelConfig) -> tuple[int, ...]:
    """Every token that ends a response, ascending: the model's and the tokenizer's."""
    return tuple(sorted({*config.eos_token_ids, tokenizer.eos_token_id}))
