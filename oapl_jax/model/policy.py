"""The policy that a run starts from: decoder sizes, tokenizer, and a checkpoint, if any."""

import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from oapl_jax.files import write_atomically
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    make_character_tokenizer,
    template_time,
)


@dataclasses.dataclass(frozen=True)
class Policy:
    config: ModelConfig
    tokenizer: Any  # of transformers
    checkpoint: epath.Path | None  # directory with weights; None for a fresh model
    now: datetime.datetime | None = None  # that the chat template prints; None for no time

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, ascending: those of the model and of the tokenizer."""
        return tuple(sorted({*self.config.eos_token_ids, self.tokenizer.eos_token_id}))

    def load_params(self, mesh: Mesh, *, dtype: str = "float32") -> Any:
        assert self.checkpoint is not None
        return hf.load_params(self.checkpoint, self.config, mesh=mesh, dtype=dtype)


def open_policy(
    directory: epath.Path,
    *,
    path: str,
    architecture: Mapping[str, Any],
    characters: str,
    renew: bool = False,
) -> Policy:
    """Opens the Hugging Face checkpoint `path`, or, if that is "", defines a fresh model.

    A fresh model has the sizes of `architecture` (config.json without vocabulary and special
    tokens), a tokenizer of `characters`, and the files of both in `directory`, which are written
    if there are none or `renew` is set. The time that a chat template prints is recorded there too.
    Raises a UserError if tokenizer and model disagree, or the decoder lacks a feature.
    """
    source = epath.Path(path) if path else directory
    if not path and (renew or not (directory / "config.json").exists()):
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = make_character_tokenizer(characters, directory)
        special = {key: getattr(tokenizer, key) for key in ("eos_token_id", "pad_token_id")}
        sizes = {**architecture, "vocab_size": len(tokenizer), **special}
        config = ModelConfig.from_hf(sizes, source="model.architecture").to_hf(dtype="float32")
        write_atomically(directory / "config.json", [json.dumps(config, indent=1).encode()])
    config, tokenizer = hf.load_config(source), load_tokenizer(source)
    check_tokenizer(tokenizer, config, source=path or "model.architecture")
    now = template_time(tokenizer, directory / "template_time.json")
    return Policy(config, tokenizer, source if path else None, now)
