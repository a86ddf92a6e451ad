"""Admission: requirements on a server, checked when it joins and when it returns after a failure.

A server loads our weights and keeps its own architecture, rotary angles, context length, dtype and
sampling defaults; check_server compares these. The probe of each version (pool.py) then compares
log-probs.
"""

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.config import ProbeTolerance
from oapl_jax.errors import UserError
from oapl_jax.fleet.client import GroupRequest, Refused, SGLangClient, sampling_params
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.lora import Lora
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

NOT_COMPARED = ("max_positions", "bos_token_id", "eos_token_ids", "pad_token_id")
# SGLang 0.5 silently ends a response 2 tokens before the end of its context, and rejects a prompt
# that leaves less room than 7 tokens.
CONTEXT_MARGIN, PROMPT_MARGIN = 2, 7
TOKENIZER_IDS = 64  # of the vocabulary, in the text that both tokenizers encode
Findings = tuple[list[str], list[str]]  # refusals (the server must not sample) and warnings


@dataclasses.dataclass(frozen=True)
class Requirements:
    """Requirements of a run on each of its servers."""

    model_config: ModelConfig
    tokenizer: Any  # the learner's; has `encode` and `decode`
    stop_ids: tuple[int, ...]  # token ids that end a response
    sampling: Sampling
    max_prompt_tokens: int
    dtype: str  # of published versions
    probe_tolerance: ProbeTolerance  # nats by which log-probs may differ
    adapters: Lora | None = None  # if versions are LoRA adapters over the server's weights

    def tolerance(self, *dtypes: str) -> float:
        """Returns the tolerance for log-probs computed in these dtypes: the coarsest decides."""
        exact = set(dtypes) <= {"float32", "auto"}
        return self.probe_tolerance.float32 if exact else self.probe_tolerance.bfloat16

    def check_prompt(self, prompt: Prompt) -> None:
        """Raises UserError for a prompt that a server would reject, or that would crash it."""
        tokens, vocab_size = np.asarray(prompt.tokens), self.model_config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise UserError(
                f"prompt {prompt.id} has token id {outside[0]}, outside the model's vocabulary of "
                f"{vocab_size}; the tokenizer of the data is not that of the model"
            )
        if not 1 <= tokens.size <= self.max_prompt_tokens:
            raise UserError(
                f"prompt {prompt.id} has {tokens.size} tokens; the fleet takes prompts of 1 to "
                f"data.max_prompt_tokens={self.max_prompt_tokens}"
            )


async def check_server(
    client: SGLangClient, info: Mapping[str, Any], requirements: Requirements
) -> Findings:
    """Compares a server, and its `client.info()`, with the requirements."""
    refusals, warnings = compare_info(info, requirements)
    of_files = await asyncio.to_thread(compare_files, info, requirements)
    refusals, warnings = refusals + of_files[0], warnings + of_files[1]
    if requirements.adapters:
        refusals += compare_adapters(info, requirements.adapters)
    elif not await client.can_update():
        refusals.append(
            "it has no route /update_weights_from_disk; start it under oapl_jax.fleet.restart_proxy"
        )
    if not info.get("skip_tokenizer_init"):
        refusals += await _compare_tokenizer(client, requirements)
    if not refusals:
        refusals += await _try_group(client, info, requirements)
    return refusals, warnings


def compare_info(info: Mapping[str, Any], requirements: Requirements) -> Findings:
    """Compares a server's description of itself."""
    refusals, warnings = [], []
    expected, sampling = requirements.model_config.model_type, requirements.sampling
    if info.get("model_type") not in (None, expected):
        refusals.append(f"its model_type is {info['model_type']!r}, the learner's {expected!r}")
    longest, context = requirements.max_prompt_tokens, info.get("max_model_len")
    needed = longest + max(sampling.max_response_tokens + CONTEXT_MARGIN, PROMPT_MARGIN)
    if context is None:
        warnings.append("its context length is unknown: /v1/models has no max_model_len")
    elif context < needed:
        refusals.append(
            f"its context length is {context} tokens; data.max_prompt_tokens={longest} and "
            f"rollout.max_response_tokens={sampling.max_response_tokens} need {needed}; "
            "raise its --context-length"
        )
    sent = sampling_params(sampling, n=1, stop_ids=requirements.stop_ids)
    for name, value in (info.get("preferred_sampling_params") or {}).items():
        if name not in sent or sent[name] != value:
            refusals.append(
                f"its --preferred-sampling-params sets {name}={value!r}, which changes the "
                "log-probs; start it without"
            )
    for name in ("watermark_default_enabled", "watermark_enforce_all"):
        if info.get(name):
            refusals.append(f"its {name} changes the sampled tokens; start it without")
    dtype = dtype_of(info)
    if dtype not in (requirements.dtype, "auto"):
        warnings.append(f"it computes in {dtype}; versions are published in {requirements.dtype}")
    for name in ("quantization", "speculative_algorithm"):
        if info.get(name):
            warnings.append(f"its {name} is {info[name]!r}; its log-probs may differ")
    if info.get("kv_cache_dtype") not in (None, "auto", dtype):
        warnings.append(f"its kv_cache_dtype is {info['kv_cache_dtype']!r}")
    if info.get("json_model_override_args") not in (None, "", "{}"):
        warnings.append(f"its model is changed by {info['json_model_override_args']}")
    return refusals, warnings


def compare_adapters(info: Mapping[str, Any], lora: Lora) -> list[str]:
    """Compares the adapters that a server takes with those of the run."""
    flags = f"--enable-lora --max-lora-rank={lora.rank} --lora-target-modules "
    remedy = f"start it with {flags}{' '.join(lora.targets)}, or set model.lora.merged=True"
    if not info.get("enable_lora"):
        return [f"it takes no LoRA adapters; {remedy}"]
    rank, targets = info.get("max_lora_rank") or lora.rank, info.get("lora_target_modules") or ()
    missing = {*lora.targets} - {*targets} if targets and "all" not in targets else set()
    if rank < lora.rank or missing:
        return [f"its max_lora_rank is {rank}, its lora_target_modules {sorted(targets)}; {remedy}"]
    return []


def compare_files(info: Mapping[str, Any], requirements: Requirements) -> Findings:
    """Compares the config.json and generation_config.json that the server was started with.

    No route reports a model's architecture, and an update loads our tensors into the server's.
    """
    directory = epath.Path(str(info.get("model_path")))
    try:
        found = hf.read_config(directory)
    except (OSError, ValueError) as error:
        return [], [f"its architecture is unknown: {directory} can't be read here ({error})"]
    except UserError as error:
        return [str(error)], []
    ours, theirs = (dataclasses.asdict(c) for c in (requirements.model_config, found))
    refusals = [
        f"its model has {name}={theirs[name]}, the learner's {value}"
        for name, value in ours.items()
        if name not in NOT_COMPARED and theirs[name] != value
    ]
    if more := {*found.eos_token_ids} - {*requirements.stop_ids}:
        refusals.append(
            f"it also ends responses at tokens {sorted(more)}, which eos_token_id of its "
            f"{hf.CONFIG} or {hf.GENERATION} in {directory} lists, but not that of this run's "
            f"model, which ends them at {sorted(requirements.stop_ids)}; start it from a published "
            "version, or add the tokens to the model's generation_config.json"
        )
    return refusals, []


async def _compare_tokenizer(client: SGLangClient, requirements: Requirements) -> list[str]:
    vocab_size, tokenizer = requirements.model_config.vocab_size, requirements.tokenizer
    ids = np.linspace(0, vocab_size - 1, min(TOKENIZER_IDS, vocab_size)).astype(int).tolist()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if await client.tokenize(text) == tokenizer.encode(text, add_special_tokens=False):
        return []
    return [
        "its tokenizer differs from the learner's; start it from a published version, or with "
        "--skip-tokenizer-init, since only token ids are exchanged"
    ]


async def _try_group(
    client: SGLangClient, info: Mapping[str, Any], requirements: Requirements
) -> list[str]:
    """Samples a small group and compares its log-probs with those of the same tokens as a prompt.

    Prompt log-probs are at temperature 1, so at other temperatures the two must differ.
    """
    most = min(4, requirements.sampling.max_response_tokens)
    vocab_size, stop_ids = requirements.model_config.vocab_size, requirements.stop_ids
    prompt = [i for i in range(vocab_size) if i not in stop_ids]
    request = GroupRequest(
        tokens=prompt[: min(2, requirements.max_prompt_tokens)],
        n=2,
        sampling=dataclasses.replace(requirements.sampling, max_response_tokens=most),
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        version=None,
        mixed_versions="keep",
    )
    try:
        rollouts, _ = await client.generate(request)
    except Refused as error:
        return [f"it does not sample: {error}"]
    scores, _ = await client.score([[*request.tokens, *r.tokens.tolist()] for r in rollouts])
    scored = np.concatenate([s[len(request.tokens) - 1 :] for s in scores])
    sampled = np.concatenate([r.behavior_logp for r in rollouts])
    difference = float(np.abs(scored - sampled).max())
    limit, temperature = requirements.tolerance(dtype_of(info)), requirements.sampling.temperature
    if temperature in (0, 1) and difference > limit:
        return [
            f"its log-probs of sampled tokens differ by {difference:.3g} nats from those of the "
            f"same tokens in a prompt (fleet.probe_tolerance allows {limit:g})"
        ]
    if temperature not in (0, 1) and difference < 1e-6 and scored.min() < -0.1:
        return [
            f"its log-probs are those at temperature 1 although rollout.temperature={temperature}; "
            "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
        ]
    return []


def dtype_of(info: Mapping[str, Any]) -> str:
    """Returns the dtype that a server computes in; "auto" if the weights decide."""
    dtype = str(info.get("dtype", "auto"))
    return {"float": "float32", "half": "float16"}.get(dtype, dtype)  # aliases of SGLang


def sampling_warnings(sampling: Sampling) -> list[str]:
    """Names the settings whose log-probs the learner can't reproduce exactly, a sentence each."""
    return [
        f"rollout.{name}={getattr(sampling, name)} samples from fewer tokens than the log-probs "
        "are normalised over (the whole vocabulary, for sampler and learner alike)"
        for name, off in (("top_p", 1), ("top_k", 0))
        if getattr(sampling, name) != off
    ]
