"""Tokenizers: load from local files, make one for the synthetic tasks, check against the model.

A chat template may print the date (`strftime_now`). The date of a run is recorded, so that its
prompts are the same on every day.
"""

import datetime
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from oapl_jax.errors import UserError, one_line
from oapl_jax.files import local_copy, read_json, read_parts, write_atomically, write_file
from oapl_jax.model.config import ModelConfig

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is absent on purpose
# transformers and tokenizers are imported where they are used: a misspelt flag should not take a
# second, and whoever trains on token ids needs neither.
PAD, EOS = "<pad>", "<eos>"
CONTENTS_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def load_tokenizer(directory: epath.PathLike) -> Any:
    """Loads a tokenizer from a directory; transformers gets a local copy of one in a bucket.

    Raises:
      UserError: for files that are missing or damaged, without an end of sequence, or without a
        chat template that makes a prompt of a user's message.
    """
    directory = epath.Path(directory)
    if not (directory / "tokenizer_config.json").exists():
        raise UserError(
            f"no tokenizer in {directory}: tokenizer_config.json is missing; copy its files there"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with local_copy(directory) as local:
            named = json.loads((local / "tokenizer_config.json").read_text())
            # Beside a config.json of qwen2 AutoTokenizer would make it a Qwen2Tokenizer.
            plain = named.get("tokenizer_class") == "TokenizersBackend"
            kind = PreTrainedTokenizerFast if plain else AutoTokenizer
            tokenizer = kind.from_pretrained(os.fspath(local), local_files_only=True)
    except Exception as error:  # the libraries name no closed set for damaged files
        fault = f"the tokenizer in {directory} can't be loaded ({one_line(error)})"
        raise UserError(f"{fault}; copy its files there again") from error
    for attribute in ("chat_template", "eos_token_id"):
        if getattr(tokenizer, attribute) is None:
            raise UserError(
                f"the tokenizer in {directory} has no {attribute}; set it in tokenizer_config.json"
            )
    try:
        omitted = omits_last(tokenizer, [{"role": "user"}])
    except Exception as error:  # a template is a program of the model's and raises anything
        fault = f"refuses a user's message ({one_line(error)})"
        raise UserError(f"the chat template of {directory} {fault}; correct it") from error
    if omitted:
        raise UserError(
            f"the chat template of {directory} omits a user's message: all prompts would be equal; "
            "correct it"
        )
    return tokenizer


def render_chat(
    tokenizer: Any,
    chat: Sequence[Mapping[str, str]],
    *,
    tokenize: bool,
    now: datetime.datetime | None = None,
) -> Any:
    """Applies the chat template up to the response: text, or token ids.

    `now` is the time that the template prints; None for the clock's.
    """
    return tokenizer.apply_chat_template(
        chat,
        chat_template=at_time(tokenizer.get_chat_template(), now) if now else None,
        add_generation_prompt=True,
        tokenize=tokenize,
        return_dict=False,  # transformers 5 returns a BatchEncoding otherwise
    )


@functools.lru_cache
def at_time(template: str, now: datetime.datetime) -> str:
    """A chat template whose `strftime_now` is that of a fixed time.

    transformers passes data to a template, and no functions; so it gets a macro.
    """
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdfHIjmMpSUwWxXyYzZ"]
    texts = json.dumps({code: now.strftime(code) for code in codes})
    return (
        "{%- macro strftime_now(format) -%}{%- set text = namespace(value=format) -%}"
        f"{{%- for code, value in {texts}.items() -%}}"
        "{%- set text.value = text.value | replace(code, value) -%}{%- endfor -%}"
        # A newline after a block is dropped; without one, the template's own first one would be.
        "{{- text.value -}}{%- endmacro %}\n"
    ) + template


def omits_last(tokenizer: Any, chat: Sequence[Mapping[str, str]]) -> bool:
    """True if the chat template omits the content of the last message, at one and the same time."""
    now = datetime.datetime.now()
    chats = ([*chat[:-1], {**chat[-1], "content": content}] for content in "12")
    one, other = (render_chat(tokenizer, chat, tokenize=False, now=now) for chat in chats)
    return one == other


def template_time(tokenizer: Any, path: epath.Path) -> datetime.datetime | None:
    """The time that the chat template prints in a run, recorded in `path` at its first start.

    None for a template that prints none; UserError for a damaged file.
    """
    if "strftime_now" not in tokenizer.get_chat_template():
        return None
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        write_atomically(path, [json.dumps({"time": now}).encode()])
    remedy = 'write {"time": "2026-01-31"} there, with the date of the run\'s start'
    recorded = read_json(path, ["time"], remedy=remedy)["time"]
    try:
        return datetime.datetime.fromisoformat(recorded)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no time ({recorded!r}); {remedy}") from error


def make_character_tokenizer(characters: str, directory: epath.PathLike) -> Any:
    """Saves a tokenizer with one token per character, and loads it; other characters raise.

    Ids: 0 <pad>, 1 <eos>, then the characters in order. The chat template concatenates contents.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *dict.fromkeys(characters)])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()  # the default decoder puts spaces between tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=CONTENTS_ONLY,
    )
    save_tokenizer(tokenizer, epath.Path(directory))
    return load_tokenizer(directory)


def save_tokenizer(tokenizer: Any, directory: epath.Path) -> dict[str, dict[str, Any]]:
    """Writes the files of a tokenizer, of a disk or bucket; returns name -> manifest entry."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:  # transformers writes to disks alone
        tokenizer.save_pretrained(local)
        paths = sorted(epath.Path(local).iterdir())
        return {path.name: write_file(directory / path.name, read_parts(path)) for path in paths}


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
