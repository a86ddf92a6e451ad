"""One SGLang server: token ids in, validated rollouts out, and the calls that change its weights.

The protocol is that of SGLang 0.5 (`/generate`, `/update_weights_from_disk`, ...). Nothing here
retries a group or knows of other servers: see members.py and fleet.py.
"""

import asyncio
import json
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from oapl_jax.fleet.failures import Refused, ServerError, Unreachable, WrongVersion, short
from oapl_jax.fleet.responses import Answer, read_group, read_scores
from oapl_jax.rollout.sampler import Sampling


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
          float32[T - 1] a row, and the versions that the server scored them with; see
          `read_scores` for what its answer must be.
        """
        body = {
            "input_ids": [list(map(int, row)) for row in rows],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "stream": False,
        }
        answer = await self._ask("POST", "/generate", body, deadline=self.answer_deadline)
        return read_scores(answer, body["input_ids"], source=f"{self.url}/generate")

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
            raise ServerError(f"{self.url} says nothing of itself: {short(models)}") from error

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
            raise Refused(f"{self.url} did not take version {version}: {short(answer)}")
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
            raise ServerError(f"{self.url}{route} answered no JSON: {short(content)}") from error

    async def _call(self, method: str, route: str, body: Any, *, deadline: float) -> Any:
        status, content = await self._request(method, route, body, deadline)
        if status != 200:
            kind = Refused if 400 <= status < 500 else ServerError
            raise kind(f"{self.url}{route} answered {status}: {short(content)}")
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
