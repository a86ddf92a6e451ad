"""HTTP client of one SGLang server: its routes, and the validation of their responses.

The protocol is that of SGLang 0.5 (`/generate`, `/update_weights_from_disk`, ...). A client makes
each request once and knows no other server; pool.py retries.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Rollout

ROUNDING = 1e-4  # nats by which low-precision arithmetic may lift a log-prob above 0
MALFORMED = (LookupError, TypeError, ValueError, OverflowError, AttributeError)


class ServerError(Exception):
    """A server can't be reached, is late, or its response is invalid."""


class Refused(ServerError):
    """The server works and rejected the request."""


class Unauthorized(Refused):
    """The server needs another API key."""


class Aborted(ServerError):
    """The group was ended before its last token."""


class WrongVersion(ServerError):
    """The server holds other weights than it was told to load."""


class Mixed(ServerError):
    """The responses of one group span two versions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRequest:
    """Request for one group of responses to a prompt."""

    tokens: Sequence[int]  # of the prompt
    n: int  # number of responses
    sampling: Sampling
    stop_ids: Sequence[int]  # token ids that end a response
    vocab_size: int  # of the learner's model
    # Required of each response, and the rollouts' policy version; None accepts any version (-1).
    version: int | None
    adapter: str = ""  # name of the LoRA adapter that is the version; "": the server's weights are
    # Treatment of responses that began with `version` and ended with another: "reissue" raises
    # Mixed; "keep" stamps them with `version`, the older one. The log-probs of a kept response are
    # those of the policies that sampled its tokens.
    mixed_versions: str

    def body(self) -> dict[str, Any]:
        # The key separates the prefix cache by version; a key of its own bypasses the cache.
        key = f"v{self.version}" if self.version is not None else uuid.uuid4().hex
        return {
            "input_ids": list(map(int, self.tokens)),
            "sampling_params": sampling_params(self.sampling, n=self.n, stop_ids=self.stop_ids),
            "return_logprob": True,
            "extra_key": key,
            "stream": False,
            **({"lora_path": self.adapter} if self.adapter else {}),
        }

    def read(self, content: Any) -> tuple[tuple[Rollout, ...], bool]:
        """Validates parsed JSON from /generate: a list of n responses, or one for n = 1.

        Returns:
          n rollouts, and whether they span two versions.

        Raises:
          Aborted: if the server aborted a response.
          Mixed, WrongVersion: see `version` and `mixed_versions`.
          ServerError: if the number of responses, a token id, a log-prob or an end is invalid.
        """
        responses = content if isinstance(content, list) else [content]
        if len(responses) != self.n:
            raise ServerError(f"{len(responses)} responses instead of {self.n}")
        rollouts, spanned = zip(*map(self._read_response, responses), strict=True)
        versions = sorted({v for spans in spanned for v in spans})
        # A server reports the weights under an adapter, and an adapter's name never changes hands.
        expected = spanned[0][0] if self.adapter else str(self.version)
        mixed = self.version is not None and versions != [expected]
        if mixed and any(spans[0] != expected for spans in spanned):
            raise WrongVersion(f"reports version {', '.join(versions)} instead of {expected}")
        if mixed and self.mixed_versions == "reissue":
            raise Mixed(f"spans versions {', '.join(versions)}")
        return rollouts, mixed

    def _read_response(self, response: Any) -> tuple[Rollout, list[str]]:
        """Returns a rollout, and the versions that it spans in order."""
        try:
            meta = response["meta_info"]
            reason = meta["finish_reason"]["type"]
            token_ids = list(response["output_ids"])
            tokens = np.array(token_ids, np.int64)
            logp = np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float64)
            scored = [entry[1] for entry in meta["output_token_logprobs"]]
            spans = meta.get("weight_versions") or ()
            spans = [(str(s["version"]), s["end"] - s["start"]) for s in spans]
            if not all(math.isfinite(length) for _, length in spans):
                raise ValueError("a version span without bounds")
            reported = str(meta["weight_version"])
        except MALFORMED as error:
            raise ServerError(f"malformed response: {short(response)}") from error
        if reason == "abort":
            raise Aborted(f"the server aborted the group: {short(meta['finish_reason'])}")
        if token_ids != scored:
            raise ServerError("output_token_logprobs and output_ids have different tokens")
        fault = self._find_fault(tokens, logp, reason)
        if fault:
            raise ServerError(fault)
        versions = [version for version, length in spans if length > 0] or [reported]
        if versions[-1] != reported:
            raise WrongVersion(f"reports version {reported} with version spans {versions}")
        # Some servers report "length" if the last allowed token is a stop token.
        reason = "stop" if tokens[-1] in self.stop_ids else reason
        behavior_logp = np.minimum(logp, 0).astype(np.float32)
        stamp = -1 if self.version is None else self.version
        return Rollout(tokens.astype(np.int32), behavior_logp, stamp, reason), versions

    def _find_fault(self, tokens: np.ndarray, logp: np.ndarray, reason: str) -> str:
        """Names the first fault of a response; "" if it is valid."""
        limit = self.sampling.max_response_tokens
        if tokens.ndim != 1 or not 1 <= len(tokens) <= limit:
            return f"a response of shape {tokens.shape}, at most {limit} tokens"
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            return f"token id {outside} outside the vocabulary of {self.vocab_size}"
        if not np.isfinite(logp).all() or logp.max() > ROUNDING:
            return "a log-prob that is above 0 or not finite"
        stops = np.isin(tokens, list(self.stop_ids))
        if stops[:-1].any():
            return "a response that continues after a stop token"
        if reason == "stop" and not stops[-1]:
            return f"a stop at token {tokens[-1]}, which is no stop token of this run"
        if reason == "length" and not stops[-1] and len(tokens) < limit:
            return f"a response cut off after {len(tokens)} of {limit} tokens"
        return "" if reason in ("stop", "length") else f"finish_reason {reason!r}"


class SGLangClient:
    """Routes of one server.

    Args:
      session: shared by all clients.
      url: without a slash at the end.
      connect_deadline: seconds to open a connection.
      deadline: seconds for a request that has no deadline of its own.
      api_key: of a server that was started with --api-key; no message has it.

    Every method raises ServerError if the request fails or the response is invalid.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        connect_deadline: float,
        deadline: float,
        api_key: str = "",
    ):
        self.url, self._session, self._api_key = url, session, api_key
        self._connect_deadline, self._deadline = connect_deadline, deadline

    async def generate(
        self, request: GroupRequest, *, deadline: float | None = None
    ) -> tuple[tuple[Rollout, ...], bool]:
        """Samples one group; see GroupRequest.read."""
        body = request.body()
        return await self._call("/generate", body, deadline=deadline, parse=request.read)

    async def score(
        self, rows: Sequence[Sequence[int]], *, adapter: str = ""
    ) -> tuple[list[np.ndarray], set[str]]:
        """Scores rows of tokens at temperature 1, with an adapter if one is named.

        Returns:
          log-probs float32[T - 1] of each row's tokens after the first, and the versions that the
          server computed them with.
        """
        body = {
            "input_ids": [list(map(int, row)) for row in rows],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "stream": False,
            **({"lora_path": adapter} if adapter else {}),
        }

        def parse(content: Any) -> tuple[list[np.ndarray], set[str]]:
            metas = [r["meta_info"] for r in (content if isinstance(content, list) else [content])]
            logp = []
            for meta, row in zip(metas, body["input_ids"], strict=True):
                entries = zip(meta["input_token_logprobs"], row, strict=True)
                # SGLang 0.5 reports the last id of the vocabulary as 0; its log-prob is right.
                if not all(entry[1] in (token, 0) for entry, token in entries):
                    raise ValueError("log-probs of other tokens")
                logp.append(np.array([e[0] for e in meta["input_token_logprobs"][1:]], np.float32))
                if not np.isfinite(logp[-1]).all():
                    raise ValueError("log-probs that are not finite")
            return logp, {str(meta["weight_version"]) for meta in metas}

        return await self._call("/generate", body, parse=parse)

    async def check_health(self) -> None:
        await self._call("/health")

    async def info(self) -> dict[str, Any]:
        """Merges /server_info, /v1/models and /model_info."""
        server = await self._call("/server_info", parse=dict)
        model = await self._call("/v1/models", parse=lambda c: dict(c["data"][0]))
        return server | model | await self._call("/model_info", parse=dict)

    async def version(self) -> str:
        """Returns the name of the loaded version, as the server reports it."""
        return await self._call("/model_info", parse=lambda c: str(c["weight_version"]))

    async def can_update(self) -> bool:
        """Tells if the server has a route that loads new weights."""
        return (await self._send("/update_weights_from_disk", None, self._deadline))[0] != 404

    async def tokenize(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return await self._call("/tokenize", body, parse=lambda c: list(map(int, c["tokens"])))

    async def update(self, path: str, version: int, *, deadline: float) -> None:
        """Loads a version directory, after the requests in flight.

        Raises:
          Refused: if the server rejects it; it may hold the new weights nevertheless, under the new
            name or the old one.
          WrongVersion: if it accepts and then reports another version.
        """
        body = {"model_path": path, "weight_version": str(version), "flush_cache": True}
        route, parse = "/update_weights_from_disk", lambda content: content
        content = await self._call(route, body, deadline=deadline, parse=parse)
        if not (isinstance(content, dict) and content.get("success") is True):
            raise Refused(f"{self.url} did not load version {version}: {short(content)}")
        reported = await self.version()
        if reported != str(version):
            raise WrongVersion(f"{self.url} loaded version {version} and reports {reported}")

    async def adapters(self) -> set[str]:
        """Returns the names of the loaded adapters, and that of the model."""
        return await self._call("/v1/models", parse=lambda c: {str(m["id"]) for m in c["data"]})

    async def load_adapter(self, name: str, path: str, *, deadline: float) -> None:
        """Loads an adapter beside others, while requests are in flight; none of them waits.

        Raises:
          Refused: if the server rejects it.
        """
        if name not in await self.adapters():
            body = {"lora_name": name, "lora_path": path}
            await self._call("/load_lora_adapter", body, deadline=deadline)

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter, once its requests in flight have ended."""
        await self._call("/unload_lora_adapter", {"lora_name": name})

    async def fetch(self, path: str, *, port: int, deadline: float) -> str:
        """Makes the fetcher on the server's machine (fleet/fetch.py) copy a version to its disk.

        Returns the copy's directory. The fetcher of a server that speaks https does too: the key
        goes to both.
        """
        parts = urlsplit(self.url)
        host = parts._replace(path="").geturl().removesuffix(f":{parts.port}")
        parse = lambda content: str(content["path"])
        body, at = {"path": path}, f"{host}:{port}"
        return await self._call("/fetch", body, deadline=deadline, parse=parse, url=at)

    async def flush_cache(self) -> None:
        """Empties the prefix cache; retried while the server is still busy."""
        until = asyncio.get_running_loop().time() + self._deadline
        while True:
            try:
                return await self._call("/flush_cache", {})
            except Refused:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(0.05)

    async def abort_all(self) -> None:
        """Aborts every request of the server, of any client."""
        await self._call("/abort_request", {"abort_all": True})

    async def _call(
        self,
        route: str,
        body: Any = None,
        *,
        deadline: float | None = None,
        parse: Callable[[Any], Any] | None = None,
        url: str = "",
    ) -> Any:
        """Returns the response's JSON after `parse`, if there is one; `url` is another server's."""
        url = url or self.url
        status, content = await self._send(route, body, deadline or self._deadline, url)
        try:
            if status in (401, 403):
                has = "rejects the key of" if self._api_key else "demands a key; name its file in"
                raise Unauthorized(f"{url}{route} {has} api_key_file (status {status})")
            if status != 200:
                kind = Refused if 400 <= status < 500 else ServerError
                raise kind(f"{url}{route} returned status {status}: {short(content)}")
            try:
                return parse and parse(json.loads(content))
            except MALFORMED as error:
                message = f"{url}{route} returned a malformed response"
                raise ServerError(f"{message} ({error}): {short(content)}") from error
        except ServerError as error:
            key = self._api_key
            if not key or key not in str(error) or key not in _text(content):
                raise
            message = f"{url}{route} returned status {status} and a response with the API key"
            raise type(error)(message) from None

    async def _send(self, route: str, body: Any, total: float, url: str = "") -> tuple[int, bytes]:
        method, url = "GET" if body is None else "POST", (url or self.url) + route
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=self._connect_deadline)
        request: dict[str, Any] = dict(json=body, timeout=timeout, headers=bearer(self._api_key))
        try:
            async with self._session.request(method, url, **request) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            late = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)
            reason = f"no response in {total:g} s" if late else f"{type(error).__name__} {error}"
            raise ServerError(f"{url} failed: {reason}") from error


def _text(content: bytes) -> str:
    """A response as it came and, since JSON may escape any character, as it is parsed."""
    text = content.decode(errors="replace")
    with contextlib.suppress(*MALFORMED):
        text += json.dumps(json.loads(text))
    return text


def bearer(api_key: str) -> dict[str, str]:
    """Headers of a request to a server with this key, or with none."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def sampling_params(sampling: Sampling, *, n: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Names every sampling setting of SGLang, so that no default of a server applies."""
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


def short(content: Any) -> str:
    """Abbreviates the content of a response for an error message."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else json.dumps(content)
    return text if len(text) <= 300 else text[:300] + "..."
