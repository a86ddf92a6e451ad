"""What a server must be before it samples for training: asked when it joins, and when it is back.

The server takes our weights but keeps its own sizes, rotary angles, context, dtype and defaults, so
these are compared first; what its log-probs then are is measured by the probe of each version.
"""

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.fleet.client import Server, sampling_params
from oapl_jax.fleet.failures import Refused
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

NOT_COMPARED = ("max_positions", "bos_token_id", "eos_token_ids", "pad_token_id")
SAME_DTYPE = {"float": "float32", "half": "float16"}  # SGLang's other names
# SGLang 0.5 cuts a response off without a word so many tokens before the end of its context, and
# takes no prompt that leaves less room than this.
CUT, ROOM = 2, 7
TEXT_IDS = 64  # of the vocabulary, in the text that both tokenizers encode


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a run asks of every server.

    Attributes:
      model_config: sizes of the learner's model.
      tokenizer: the learner's; has `encode` and `decode`.
      stop_ids: token ids that end a response.
      sampling: how tokens are drawn.
      max_prompt_tokens: of the longest prompt.
      dtype: that versions are published in.
      probe_gap: nats by which log-probs may differ, by dtype.
    """

    model_config: ModelConfig
    tokenizer: Any
    stop_ids: tuple[int, ...]
    sampling: Sampling
    max_prompt_tokens: int
    dtype: str
    probe_gap: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Contract:
    """How a server meets the terms.

    Attributes:
      refusals: why it must not sample, a sentence each; none if it may.
      warnings: what differs or can't be checked, a sentence each.
      dtype: that it computes in; "auto" if it only says that the weights decide.
    """

    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    dtype: str


async def examine(server: Server, terms: Terms) -> Contract:
    """Asks a server everything.

    Raises:
      ServerError: if it can't be asked, or answers nonsense.
    """
    info = await server.information()
    refusals, warnings = compare(info, terms)
    files_refusals, files_warnings = await asyncio.to_thread(compare_files, info, terms)
    refusals += files_refusals
    warnings += files_warnings
    if not await server.can_update():
        refusals.append(
            "it has no route /update_weights_from_disk; start it under oapl_jax.fleet.restart_proxy"
        )
    if not info.get("skip_tokenizer_init"):
        refusals += await _compare_tokenizer(server, terms)
    if not refusals:
        refusals += await _try_log_probs(server, terms, allowed_gap(terms.probe_gap, _dtype(info)))
    return Contract(tuple(refusals), tuple(warnings), _dtype(info))


def warnings_of(sampling: Sampling) -> list[str]:
    """The settings whose log-probs the learner can't reproduce exactly, a sentence each."""
    settings = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0}
    return [
        f"rollout.{name}={getattr(sampling, name)} draws from fewer tokens than the log-probs are "
        "normalised over (the whole vocabulary, for sampler and learner alike)"
        for name, switched_on in settings.items()
        if switched_on
    ]


def check_prompt(prompt: Prompt, *, vocab_size: int, max_tokens: int) -> None:
    """Refuses a prompt that would end a server, or that a server would refuse.

    Raises:
      UserError: naming the prompt.
    """
    tokens = np.asarray(prompt.tokens)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UserError(
            f"prompt {prompt.id} holds token id {outside[0]}, outside the model's vocabulary of "
            f"{vocab_size}; the tokenizer of the data is not that of the model"
        )
    if not 1 <= tokens.size <= max_tokens:
        raise UserError(
            f"prompt {prompt.id} has {tokens.size} tokens; a prompt for the fleet has 1 to "
            f"{max_tokens} (data.max_prompt_tokens)"
        )


def compare(info: Mapping[str, Any], terms: Terms) -> tuple[list[str], list[str]]:
    """Refusals and warnings from what a server says of itself."""
    refusals, warnings = [], []
    expected = terms.model_config.model_type
    if info.get("model_type") not in (None, expected):
        refusals.append(f"its model_type is {info['model_type']!r}, the learner's {expected!r}")
    longest, context = terms.max_prompt_tokens, info.get("max_model_len")
    needed = max(longest + terms.sampling.max_response_tokens + CUT, longest + ROOM)
    if context is None:
        warnings.append("its context length can't be compared: /v1/models has no max_model_len")
    elif context < needed:
        refusals.append(
            f"its context length is {context} tokens; data.max_prompt_tokens={longest} and "
            f"rollout.max_response_tokens={terms.sampling.max_response_tokens} need {needed}; "
            "raise its --context-length"
        )
    sent = sampling_params(terms.sampling, n=1, stop_ids=terms.stop_ids)
    for name, value in (info.get("preferred_sampling_params") or {}).items():
        if name not in sent or sent[name] != value:
            refusals.append(
                f"its --preferred-sampling-params has {name}={value!r}, whose log-probs are not "
                "those of this run; start it without"
            )
    for name in ("watermark_default_enabled", "watermark_enforce_all"):
        if info.get(name):
            refusals.append(f"its {name} changes what is drawn; start it without")
    dtype = _dtype(info)
    if dtype not in (terms.dtype, "auto"):
        warnings.append(f"it computes in {dtype}; versions are published in {terms.dtype}")
    for name in ("quantization", "speculative_algorithm"):
        if info.get(name):
            warnings.append(f"its {name} is {info[name]!r}; its log-probs may differ")
    if info.get("kv_cache_dtype") not in (None, "auto", dtype):
        warnings.append(f"its kv_cache_dtype is {info['kv_cache_dtype']!r}")
    if info.get("json_model_override_args") not in (None, "", "{}"):
        warnings.append(f"its model is changed by {info['json_model_override_args']}")
    return refusals, warnings


def compare_files(info: Mapping[str, Any], terms: Terms) -> tuple[list[str], list[str]]:
    """Refusals and warnings from the config.json that a server was started with, if we can read it.

    No route tells a model's sizes; an update puts our tensors into the sizes that the server has.
    """
    path = epath.Path(str(info.get("model_path")))
    try:
        config = json.loads((path / "config.json").read_text())
        generation = path / "generation_config.json"
        defaults = json.loads(generation.read_text()) if generation.exists() else {}
        found = ModelConfig.from_hf(config, source=f"{path}/config.json")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [], [f"its model's sizes can't be compared: {path}/config.json can't be read here"]
    except UserError as error:
        return [str(error)], []
    ours, theirs = (dataclasses.asdict(c) for c in (terms.model_config, found))
    refusals = [
        f"its model has {name}={theirs[name]}, the learner's {value}"
        for name, value in ours.items()
        if name not in NOT_COMPARED and theirs[name] != value
    ]
    eos = defaults.get("eos_token_id")
    ends = {*found.eos_token_ids, *(eos if isinstance(eos, list) else [eos])} - {None}
    if not ends <= set(terms.stop_ids):
        refusals.append(
            f"it ends responses at tokens {sorted(ends)}, this run only at "
            f"{sorted(terms.stop_ids)}; give it the run's own model directory"
        )
    return refusals, []


async def _compare_tokenizer(server: Server, terms: Terms) -> list[str]:
    vocab_size = terms.model_config.vocab_size
    ids = np.linspace(0, vocab_size - 1, min(TEXT_IDS, vocab_size)).astype(int).tolist()
    text = terms.tokenizer.decode(ids, skip_special_tokens=True)
    if await server.tokenize(text) == terms.tokenizer.encode(text, add_special_tokens=False):
        return []
    return [
        "its tokenizer encodes a text otherwise than the learner's; start it from a published "
        "version, or with --skip-tokenizer-init, since only token ids are exchanged"
    ]


async def _try_log_probs(server: Server, terms: Terms, probe_gap: float) -> list[str]:
    """A small group, whose log-probs must be those of the same tokens in a prompt.

    These are at temperature 1, whatever is asked for, so at other temperatures the two must differ.
    """
    few = dataclasses.replace(
        terms.sampling, max_response_tokens=min(4, terms.sampling.max_response_tokens)
    )
    plain = [i for i in range(terms.model_config.vocab_size) if i not in terms.stop_ids]
    prompt = plain[: min(2, terms.max_prompt_tokens)]
    try:
        answer = await server.generate(
            prompt,
            n=2,
            sampling=few,
            stop_ids=terms.stop_ids,
            vocab_size=terms.model_config.vocab_size,
            version=None,
            mixed_versions="keep",
            deadline=server.answer_deadline,
        )
    except Refused as error:
        return [f"it does not sample: {error}"]
    scores, _ = await server.score([[*prompt, *r.tokens.tolist()] for r in answer.rollouts])
    scored = np.concatenate([s[len(prompt) - 1 :] for s in scores])
    drawn = np.concatenate([r.behavior_logp for r in answer.rollouts])
    gap, temperature = float(np.abs(scored - drawn).max()), terms.sampling.temperature
    if temperature in (0, 1) and gap > probe_gap:
        return [
            f"its log-probs of sampled tokens differ by {gap:.3g} nats from those of the same "
            f"tokens in a prompt (fleet.probe_gap allows {probe_gap:g})"
        ]
    if temperature not in (0, 1) and gap < 1e-6 and scored.min() < -0.1:
        return [
            f"its log-probs are those at temperature 1 although rollout.temperature={temperature}; "
            "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
        ]
    return []


def _dtype(info: Mapping[str, Any]) -> str:
    said = str(info.get("dtype", "auto"))
    return SAME_DTYPE.get(said, said)


def allowed_gap(probe_gap: Mapping[str, float], *dtypes: str) -> float:
    """Nats by which two log-probs may differ; the float32 value only where all were float32."""
    return probe_gap["float32" if set(dtypes) <= {"float32", "auto"} else "bfloat16"]
