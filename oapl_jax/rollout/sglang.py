"""One SGLang server: token ids in, validated rollouts out, and the calls that change its weights.

The protocol is that of SGLang 0.5 (`/generate`, `/update_weights_from_disk`, ...). Nothing here
retries a group or knows of other servers: see members.py and fleet.py.
"""

import asyncio
import dataclasses
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Rollout

MIXED_VERSIONS = ("reissue", "keep")
ROUNDING = 1e-4  # nats above 0 that a log-prob may be, from arithmetic in a short dtype


class ServerError(Exception):
    """A server did not do what it was asked: it is not there, late, or its answer is wrong."""


class Unreachable(ServerError):
    """There is nothing at the address, or the connection broke."""


class Refused(ServerError):
    """The server works, and said no."""


class Aborted(ServerError):
    """The server gave the group up before its end."""


class WrongVersion(ServerError):
    """The server holds another version than the one that it was told to hold."""


class Mixed(ServerError):
    """The responses of one group span two versions."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A group, and whether it was kept although it spans two versions."""

    rollouts: tuple[Rollout, ...]
    mixed: bool


class Server:
    """A server's routes.

    Args:
      session: shared by all servers.
      url: without a slash at the end.
      connect_deadline: seconds to open a connection.
      answer_deadline: seconds for each call but those that say otherwise.

    Every call raises a ServerError, with a sentence for people, if the server fails it.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        connect_deadline: float,
        answer_deadline: float,
    ):
        self.url = url
        self._session = session
        self._connect_deadline, self.answer_deadline = connect_deadline, answer_deadline

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        n: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        vocab_size: int,
        version: int | None,
        mixed_versions: str,
        deadline: float,
    ) -> Answer:
        """Samples one group; see `read_group` for what its answer must be.

        `extra_key` keeps the server's prefix cache apart by version, or unused.
        """
        body = {
            "input_ids": list(map(int, tokens)),
            "sampling_params": sampling_params(sampling, n=n, stop_ids=stop_ids),
            "return_logprob": True,
            "extra_key": f"v{version}" if version is not None else uuid.uuid4().hex,
            "stream": False,
        }
        return read_group(
            await self._ask("POST", "/generate", body, deadline=deadline),
            n=n,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            max_response_tokens=sampling.max_response_tokens,
            version=version,
            mixed_versions=mixed_versions,
        )

    async def score(self, rows: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], set[str]]:
        """Log-probs at temperature 1 of each row's tokens but the first, given those before.

        Returns:
          float32[T - 1] a row, and the versions that the server scored them with.
        """
        body = {
            "input_ids": [list(map(int, row)) for row in rows],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "stream": False,
        }
        answer = await self._ask("POST", "/generate", body, deadline=self.answer_deadline)
        try:
            answers = answer if isinstance(answer, list) else [answer]
            entries = [a["meta_info"]["input_token_logprobs"] for a in answers]
            found = [[int(entry[1]) for entry in row] for row in entries]
            scores = [np.array([e[0] for e in row[1:]], np.float32) for row in entries]
            versions = {str(a["meta_info"]["weight_version"]) for a in answers}
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServerError(f"{self.url}/generate gave no log-probs of a prompt") from error
        # SGLang 0.5 calls the last id of the vocabulary 0 here; its log-prob is right.
        same = len(found) == len(rows) and all(
            len(said) == len(row) and all(a in (b, 0) for a, b in zip(said, row, strict=True))
            for said, row in zip(found, body["input_ids"], strict=True)
        )
        if not same or not all(np.isfinite(row).all() for row in scores):
            raise ServerError(f"{self.url}/generate gave wrong log-probs of a prompt")
        return scores, versions

    async def health(self) -> None:
        """Returns if the server can generate."""
        await self._call("GET", "/health", None, deadline=self.answer_deadline)

    async def information(self) -> dict[str, Any]:
        """What the server says of itself in /server_info, /v1/models and /model_info."""
        routes = ("/server_info", "/v1/models", "/model_info")
        server, models, model = [await self._ask("GET", route) for route in routes]
        try:
            return {**server, **models["data"][0], **model}
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self.url} says nothing of itself: {_short(models)}") from error

    async def version(self) -> str:
        """The version that the server says it holds, in its own words."""
        info = await self._ask("GET", "/model_info")
        try:
            return str(info["weight_version"])
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self.url}/model_info gave no weight_version") from error

    async def can_update(self) -> bool:
        """Whether the server has a route that takes new weights."""
        route = "/update_weights_from_disk"
        status, _ = await self._request("GET", route, None, self.answer_deadline)
        return status != 404

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        body = {"prompt": text, "add_special_tokens": False}
        answer = await self._ask("POST", "/tokenize", body)
        try:
            return list(map(int, answer["tokens"]))
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}/tokenize gave no tokens") from error

    async def update(self, path: str, version: int, *, deadline: float) -> None:
        """Loads a version directory; a server with requests in flight ends them first.

        Raises:
          Refused: if the server says no. It may have taken the weights all the same, under the new
            name or the old one.
          WrongVersion: if it says yes and then names another version.
        """
        body = {"model_path": path, "weight_version": str(version), "flush_cache": True}
        answer = await self._ask("POST", "/update_weights_from_disk", body, deadline=deadline)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise Refused(f"{self.url} did not take version {version}: {_short(answer)}")
        acknowledged = await self.version()
        if acknowledged != str(version):
            raise WrongVersion(
                f"{self.url} was told to take version {version} and acknowledges {acknowledged}"
            )

    async def flush(self) -> None:
        """Empties the prefix cache; a busy server says no, and is asked again: it is idle then."""
        give_up = asyncio.get_running_loop().time() + self.answer_deadline
        while True:
            try:
                return await self._call("POST", "/flush_cache", {}, deadline=self.answer_deadline)
            except Refused:
                if asyncio.get_running_loop().time() > give_up:
                    raise
            await asyncio.sleep(0.05)

    async def abort_all(self) -> None:
        """Ends every request of the server, whoever sent it."""
        body = {"abort_all": True}
        await self._call("POST", "/abort_request", body, deadline=self.answer_deadline)

    async def _ask(
        self, method: str, route: str, body: Any = None, *, deadline: float | None = None
    ) -> Any:
        content = await self._call(method, route, body, deadline=deadline or self.answer_deadline)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"{self.url}{route} answered no JSON: {_short(content)}") from error

    async def _call(self, method: str, route: str, body: Any, *, deadline: float) -> Any:
        status, content = await self._request(method, route, body, deadline)
        if status != 200:
            kind = Refused if 400 <= status < 500 else ServerError
            raise kind(f"{self.url}{route} answered {status}: {_short(content)}")
        return content

    async def _request(self, method: str, route: str, body: Any, deadline: float):
        timeout = aiohttp.ClientTimeout(total=deadline, sock_connect=self._connect_deadline)
        url = self.url + route
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except aiohttp.ServerTimeoutError as error:  # of the connection, and a ClientError too
            raise Unreachable(f"{url} could not be connected to: {error}") from error
        except TimeoutError as error:
            raise ServerError(f"{url} did not answer within {deadline:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable(f"{url} failed: {type(error).__name__} {error}") from error


def sampling_params(sampling: Sampling, *, n: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Every setting by which a server could draw tokens, so that none is left to its defaults."""
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_response_tokens,
        "stop_token_ids": sorted(stop_ids),
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "ignore_eos": False,
    }


def read_group(
    answer: Any,
    *,
    n: int,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
    version: int | None,
    mixed_versions: str,
) -> Answer:
    """The rollouts of an answer of /generate, or the reason why it has none.

    Args:
      answer: parsed JSON: a list of n responses, or one response for n = 1.
      version: that the server must acknowledge for each response, and the rollouts' policy version;
        None for whatever it holds (-1 in the rollouts).
      mixed_versions: what becomes of responses that began with `version` and went on with another:
        "reissue" raises Mixed, "keep" takes them. Their log-probs are then those of the policies
        that drew the tokens, and the stamp is the version that they began with, the older one.

    Raises:
      Aborted: if the server gave a response up.
      Mixed, WrongVersion: see above.
      ServerError: if the number of responses, an id, a log-prob or an end is not what it must be.
    """
    responses = answer if isinstance(answer, list) else [answer]
    stamp = -1 if version is None else version
    if len(responses) != n:
        raise ServerError(f"{len(responses)} responses instead of {n}")
    rollouts, spanned = [], []
    for response in responses:
        try:
            meta = response["meta_info"]
            reason = meta["finish_reason"]["type"]
            drawn = list(response["output_ids"])
            tokens = np.array(drawn, np.int64)
            logp = np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float64)
            scored = [entry[1] for entry in meta["output_token_logprobs"]]
            spans = [str(s["version"]) for s in meta.get("weight_versions") or () if _covers(s)]
            acknowledged = str(meta["weight_version"])
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ServerError(f"a response lacks what it must have: {_short(response)}") from error
        if reason == "abort":
            raise Aborted(f"the server gave the group up: {_short(meta['finish_reason'])}")
        if drawn != scored:
            raise ServerError("log-probs of other tokens than those of the response")
        wrong = _wrong(tokens, logp, reason, vocab_size, stop_ids, max_response_tokens)
        if wrong:
            raise ServerError(wrong)
        spanned.append(spans or [acknowledged])
        if spanned[-1][-1] != acknowledged:
            raise WrongVersion(f"acknowledges version {acknowledged} with spans {spans}")
        ended = reason if tokens[-1] not in stop_ids else "stop"  # "length" if both came at once
        behavior_logp = np.minimum(logp, 0).astype(np.float32)
        rollouts.append(Rollout(tokens.astype(np.int32), behavior_logp, stamp, ended))
    versions = sorted({v for spans in spanned for v in spans})
    mixed = version is not None and versions != [str(version)]
    if mixed:
        if any(spans[0] != str(version) for spans in spanned):
            raise WrongVersion(f"acknowledges version {', '.join(versions)} instead of {version}")
        if mixed_versions == "reissue":
            raise Mixed(f"spans versions {', '.join(versions)}")
    return Answer(tuple(rollouts), mixed)


def _wrong(
    tokens: np.ndarray,
    logp: np.ndarray,
    reason: str,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
) -> str:
    """What a response can't be, or ""."""
    if tokens.ndim != 1 or not 1 <= len(tokens) <= max_response_tokens:
        return f"a response of shape {tokens.shape}, at most {max_response_tokens} tokens"
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        return f"token id {outside} outside the vocabulary of {vocab_size}"
    if not np.isfinite(logp).all() or logp.max() > ROUNDING:
        return "a log-prob that is above 0 or not finite"
    stops = np.isin(tokens, list(stop_ids))
    if stops[:-1].any():
        return "a response that goes on after a stop token"
    if reason == "stop" and not stops[-1]:
        return f"a stop at token {tokens[-1]}, which is no stop token of this run"
    if reason == "length" and not stops[-1] and len(tokens) < max_response_tokens:
        return f"a response cut off after {len(tokens)} of {max_response_tokens} tokens"
    return "" if reason in ("stop", "length") else f"finish_reason {reason!r}"


def _covers(span: Mapping[str, Any]) -> bool:
    start, end = span["start"], span["end"]
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError("a span without bounds")
    return end > start


def _short(content: Any) -> str:
    text = content.decode(errors="replace") if isinstance(content, bytes) else json.dumps(content)
    return text if len(text) <= 300 else text[:300] + "..."
