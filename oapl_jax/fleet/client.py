"""HTTP client of one SGLang server: its routes, and the validation of their responses.

The protocol is that of SGLang 0.5 (`/generate`, `/update_weights_from_disk`, ...). A client makes
each request once and knows no other server; pool.py retries.
"""

import asyncio
import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Rollout

ROUNDING = 1e-4  # nats by which low-precision arithmetic may lift a log-prob above 0


class ServerError(Exception):
    """A server can't be reached, is late, or its response is invalid."""


class Refused(ServerError):
    """The server works and rejected the request."""


class Aborted(ServerError):
    """The group was ended before its last token."""


class WrongVersion(ServerError):
    """The server holds other weights than it was told to load."""


class Mixed(ServerError):
    """The responses of one group span two versions."""


class SGLangClient:
    """Routes of one server.

    Args:
      session: shared by all clients.
      url: without a slash at the end.
      connect_deadline: seconds to open a connection.
      deadline: seconds for a request that has no deadline of its own.

    Every method raises ServerError if the request fails or the response is invalid.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, connect_deadline: float, deadline: float
    ):
        self.url, self._session = url, session
        self._connect_deadline, self._deadline = connect_deadline, deadline

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
        deadline: float | None = None,
    ) -> tuple[tuple[Rollout, ...], bool]:
        """Samples one group; see `read_group` for the result and the errors."""
        body = {
            "input_ids": list(map(int, tokens)),
            "sampling_params": sampling_params(sampling, n=n, stop_ids=stop_ids),
            "return_logprob": True,
            # Separates the prefix cache by version; a key of its own bypasses it.
            "extra_key": f"v{version}" if version is not None else uuid.uuid4().hex,
            "stream": False,
        }
        return read_group(
            await self._json("POST", "/generate", body, deadline=deadline),
            n=n,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            max_response_tokens=sampling.max_response_tokens,
            version=version,
            mixed_versions=mixed_versions,
        )

    async def score(self, rows: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], set[str]]:
        """Scores rows of tokens at temperature 1.

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
        }
        responses = await self._json("POST", "/generate", body)
        try:
            responses = responses if isinstance(responses, list) else [responses]
            entries = [r["meta_info"]["input_token_logprobs"] for r in responses]
            scored = [[int(entry[1]) for entry in row] for row in entries]
            logp = [np.array([e[0] for e in row[1:]], np.float32) for row in entries]
            versions = {str(r["meta_info"]["weight_version"]) for r in responses}
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServerError(f"{self.url}/generate returned no prompt log-probs") from error
        # SGLang 0.5 reports the last id of the vocabulary as 0 here; its log-prob is right.
        same = len(scored) == len(rows) and all(
            len(found) == len(row) and all(a in (b, 0) for a, b in zip(found, row, strict=True))
            for found, row in zip(scored, body["input_ids"], strict=True)
        )
        if not same or not all(np.isfinite(row).all() for row in logp):
            raise ServerError(f"{self.url}/generate returned invalid prompt log-probs")
        return logp, versions

    async def check_health(self) -> None:
        """Returns if the server can generate."""
        await self._call("GET", "/health")

    async def info(self) -> dict[str, Any]:
        """Merges /server_info, /v1/models and /model_info."""
        routes = ("/server_info", "/v1/models", "/model_info")
        server, models, model = [await self._json("GET", route) for route in routes]
        try:
            return {**server, **models["data"][0], **model}
        except (LookupError, TypeError) as error:
            raise ServerError(
                f"{self.url} returned invalid information: {short(models)}"
            ) from error

    async def version(self) -> str:
        """Returns the name of the loaded version, as the server reports it."""
        info = await self._json("GET", "/model_info")
        try:
            return str(info["weight_version"])
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self.url}/model_info has no weight_version") from error

    async def can_update(self) -> bool:
        """Tells if the server has a route that loads new weights."""
        return (await self._send("GET", "/update_weights_from_disk", None, None))[0] != 404

    async def tokenize(self, text: str) -> list[int]:
        """Encodes a text without special tokens."""
        body = {"prompt": text, "add_special_tokens": False}
        response = await self._json("POST", "/tokenize", body)
        try:
            return list(map(int, response["tokens"]))
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}/tokenize returned no tokens") from error

    async def update(self, path: str, version: int, *, deadline: float) -> None:
        """Loads a version directory, after the requests in flight.

        Raises:
          Refused: if the server rejects it; it may hold the new weights nevertheless, under the new
            name or the old one.
          WrongVersion: if it accepts and then reports another version.
        """
        body = {"model_path": path, "weight_version": str(version), "flush_cache": True}
        response = await self._json("POST", "/update_weights_from_disk", body, deadline=deadline)
        if not (isinstance(response, dict) and response.get("success") is True):
            raise Refused(f"{self.url} did not load version {version}: {short(response)}")
        reported = await self.version()
        if reported != str(version):
            raise WrongVersion(f"{self.url} loaded version {version} and reports {reported}")

    async def flush_cache(self) -> None:
        """Empties the prefix cache; retried while the server is still busy."""
        until = asyncio.get_running_loop().time() + self._deadline
        while True:
            try:
                await self._call("POST", "/flush_cache", {})
                return
            except Refused:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(0.05)

    async def abort_all(self) -> None:
        """Aborts every request of the server, of any client."""
        await self._call("POST", "/abort_request", {"abort_all": True})

    async def _json(
        self, method: str, route: str, body: Any = None, *, deadline: float | None = None
    ) -> Any:
        content = await self._call(method, route, body, deadline=deadline)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(f"{self.url}{route} returned no JSON: {short(content)}") from error

    async def _call(
        self, method: str, route: str, body: Any = None, *, deadline: float | None = None
    ) -> bytes:
        status, content = await self._send(method, route, body, deadline)
        if status != 200:
            kind = Refused if 400 <= status < 500 else ServerError
            raise kind(f"{self.url}{route} returned status {status}: {short(content)}")
        return content

    async def _send(
        self, method: str, route: str, body: Any, deadline: float | None
    ) -> tuple[int, bytes]:
        total, url = deadline or self._deadline, self.url + route
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=self._connect_deadline)
        try:
            async with self._session.request(method, url, json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            late = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)
            reason = f"no response in {total:g} s" if late else f"{type(error).__name__} {error}"
            raise ServerError(f"{url} failed: {reason}") from error


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


def read_group(
    content: Any,
    *,
    n: int,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
    version: int | None,
    mixed_versions: str,
) -> tuple[tuple[Rollout, ...], bool]:
    """Validates a response of /generate.

    Args:
      content: parsed JSON: a list of n responses, or one response for n = 1.
      version: required of each response, and the rollouts' policy version; None accepts any
        version (-1 in the rollouts).
      mixed_versions: treatment of responses that began with `version` and ended with another:
        "reissue" raises Mixed; "keep" keeps them, stamped with `version`, the older one. The
        log-probs of a kept response are those of the policies that sampled its tokens.

    Returns:
      n rollouts, and whether they span two versions.

    Raises:
      Aborted: if the server aborted a response.
      Mixed, WrongVersion: see above.
      ServerError: if the number of responses, a token id, a log-prob or an end is invalid.
    """
    responses = content if isinstance(content, list) else [content]
    if len(responses) != n:
        raise ServerError(f"{len(responses)} responses instead of {n}")
    rollouts, spanned = [], []
    for response in responses:
        try:
            meta = response["meta_info"]
            reason = meta["finish_reason"]["type"]
            token_ids = list(response["output_ids"])
            tokens = np.array(token_ids, np.int64)
            logp = np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float64)
            scored = [entry[1] for entry in meta["output_token_logprobs"]]
            bounds = [
                (s["version"], s["start"], s["end"]) for s in meta.get("weight_versions") or ()
            ]
            if not all(math.isfinite(start) and math.isfinite(end) for _, start, end in bounds):
                raise ValueError("a version span without bounds")
            reported = str(meta["weight_version"])
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ServerError(f"malformed response: {short(response)}") from error
        if reason == "abort":
            raise Aborted(f"the server aborted the group: {short(meta['finish_reason'])}")
        if token_ids != scored:
            raise ServerError("output_token_logprobs and output_ids have different tokens")
        fault = _find_fault(tokens, logp, reason, vocab_size, stop_ids, max_response_tokens)
        if fault:
            raise ServerError(fault)
        spanned.append([str(v) for v, start, end in bounds if end > start] or [reported])
        if spanned[-1][-1] != reported:
            raise WrongVersion(f"reports version {reported} with version spans {spanned[-1]}")
        # Some servers report "length" if the last allowed token is a stop token.
        reason = "stop" if tokens[-1] in stop_ids else reason
        behavior_logp = np.minimum(logp, 0).astype(np.float32)
        stamp = -1 if version is None else version
        rollouts.append(Rollout(tokens.astype(np.int32), behavior_logp, stamp, reason))
    versions = sorted({v for spans in spanned for v in spans})
    mixed = version is not None and versions != [str(version)]
    if mixed:
        if any(spans[0] != str(version) for spans in spanned):
            raise WrongVersion(f"reports version {', '.join(versions)} instead of {version}")
        if mixed_versions == "reissue":
            raise Mixed(f"spans versions {', '.join(versions)}")
    return tuple(rollouts), mixed


def _find_fault(
    tokens: np.ndarray,
    logp: np.ndarray,
    reason: str,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_response_tokens: int,
) -> str:
    """Names the first fault of a response; "" if it is valid."""
    if tokens.ndim != 1 or not 1 <= len(tokens) <= max_response_tokens:
        return f"a response of shape {tokens.shape}, at most {max_response_tokens} tokens"
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        return f"token id {outside} outside the vocabulary of {vocab_size}"
    if not np.isfinite(logp).all() or logp.max() > ROUNDING:
        return "a log-prob that is above 0 or not finite"
    stops = np.isin(tokens, list(stop_ids))
    if stops[:-1].any():
        return "a response that continues after a stop token"
    if reason == "stop" and not stops[-1]:
        return f"a stop at token {tokens[-1]}, which is no stop token of this run"
    if reason == "length" and not stops[-1] and len(tokens) < max_response_tokens:
        return f"a response cut off after {len(tokens)} of {max_response_tokens} tokens"
    return "" if reason in ("stop", "length") else f"finish_reason {reason!r}"


def short(content: Any) -> str:
    """Abbreviates the content of a response for an error message."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else json.dumps(content)
    return text if len(text) <= 300 else text[:300] + "..."
