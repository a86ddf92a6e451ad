"""Fault server: speaks SGLang's protocol, samples from a toy policy, and injects faults.

The toy policy's log-probs depend on version, position and token only, so that a test can tell if a
sample is right and of the version of its stamp.
"""

import asyncio
import contextlib
import functools
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from aiohttp import web
from etils import epath

from oapl_jax.files import file_entry
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Rollout
from oapl_jax.weights.publisher import COMMITTED, MANIFEST, version_path

VOCAB, CONTEXT, STOP = 32, 64, 1
LINGERS = 0.05  # seconds that a server is not idle after requests were aborted
SIZES = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=2, rms_norm_eps=1e-6)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
TOKENS = dict(vocab_size=VOCAB, max_position_embeddings=CONTEXT, eos_token_id=STOP)
MODEL = ModelConfig.from_hf(dict(model_type="llama", **SIZES, **HEADS, **TOKENS), source="test")
ERRORS = {
    "400": web.HTTPBadRequest,
    "500": web.HTTPInternalServerError,
    "503": web.HTTPServiceUnavailable,
}
CONTROL = ("health", "info", "update", "flush", "abort", "adapter")
# Faults of /generate. All but "delay" must never pass as a group.
FAULTS = (
    *("delay", "500", "503", "400", "reset", "cut", "truncated", "html", "empty", "hang"),
    *("wrong_version", "few", "many", "range", "negative", "positive", "nan", "no_logp"),
    *("other_logp", "short", "after_stop", "abort", "mixed", "other_mixed"),
)


@functools.cache
def toy_logits(version: int) -> np.ndarray:
    """float64[CONTEXT, VOCAB] of the token at each position, whatever was before it."""
    return np.random.default_rng([7, version + 1]).normal(size=(CONTEXT, VOCAB))


def toy_logp(version: int, temperature: float = 1.0) -> np.ndarray:
    scaled = toy_logits(version) / (temperature or 1.0)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def is_right(rollout: Rollout, prompt_tokens: np.ndarray, sampling: Sampling) -> bool:
    """Tells if a rollout is of the version that it is stamped with."""
    tokens, start = rollout.tokens, len(prompt_tokens)
    where = np.arange(start, start + len(tokens))
    expected = toy_logp(rollout.policy_version, sampling.temperature)[where, tokens]
    ends = tokens[-1] == STOP
    return (
        np.allclose(rollout.behavior_logp, expected, atol=1e-5)
        and not (tokens[:-1] == STOP).any()
        and rollout.finish_reason == ("stop" if ends else "length")
        and (ends or len(tokens) == sampling.max_response_tokens)
    )


def stamps(*spans: tuple[str, int]) -> dict:
    """Returns the versions of a response: each with the token at which it ends."""
    starts = [0, *(end for _, end in spans)]
    versions = [
        {"version": version, "start": start, "end": end}
        for (version, end), start in zip(spans, starts, strict=False)
    ]
    return {"weight_version": spans[-1][0], "weight_versions": versions}


def publish_toy(
    directory: epath.Path, version: int, *, off: float = 0.0, weights: str = "model.safetensors"
) -> epath.Path:
    """Writes a version directory of the toy policy, whose probe is off by so many nats."""
    path = version_path(directory, version)
    path.mkdir(parents=True)
    rows = np.random.default_rng(version).integers(0, VOCAB, (3, 9)).tolist()
    says = toy_logp(version) + off
    logp = [[float(says[i, row[i]]) for i in range(1, len(row))] for row in rows]
    contents = {
        "config.json": MODEL.to_hf(dtype="float32"),
        "probe.json": {"tokens": rows, "logp": logp, "dtype": "float32"},
        weights: {"version": version},
    }
    for name, content in contents.items():
        (path / name).write_text(json.dumps(content))
    files = {name: file_entry(path / name) for name in contents}
    manifest = dict(version=version, parent="", config_hash="", dtype="float32", files=files)
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / COMMITTED).write_text("")
    return path


class FaultServer:
    """A server in a thread: samples from the policy of version `held`, reports version `says`."""

    def __init__(self, directory: epath.Path):
        # Fault to inject at a call ("generate", "score", or one of CONTROL), or "".
        self.plan: Callable[[str], str] = lambda call: ""
        self.seconds = self.update_seconds = 0.0  # of a group, of an update
        self.calls: Counter[str] = Counter()
        self.faults: Counter[tuple[str, str]] = Counter()  # by (call, fault)
        self.loads: list[int] = []  # versions that it was told to load
        self.running = self.most_running = 0
        self.requests: list[dict] = []
        self.adapters: dict[str, int] = {}  # version by name
        self.together: list[set[int]] = []  # versions of the adapters of running requests
        self.updates: list[tuple[float, float]] = []  # begin and end of each, seconds
        self.forced_sampling: dict = {}
        self.information: Any = {"dtype": "float32", "skip_tokenizer_init": True}
        self.max_model_len = CONTEXT
        self.workers: list[str] = []  # of a router
        self.api_key = ""  # that every route but /health demands, as of SGLang's --api-key
        self.model_path = directory / "base"
        if not self.model_path.exists():
            self.model_path.mkdir(parents=True)
            (self.model_path / "config.json").write_text(json.dumps(MODEL.to_hf(dtype="float32")))
        self._rng = np.random.default_rng(0)
        self._port = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts, also after `kill`: on the same port, with weights of no version."""
        self._in_loop(self._start())

    def kill(self) -> None:
        """Breaks every connection and closes the port."""
        self._in_loop(self._kill())

    def close(self) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _in_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _start(self) -> None:
        self.held, self.says = -1, "default"
        self.adapters.clear()
        self._sampling: Counter[str] = Counter()  # requests by adapter
        self._aborting = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.running, self._busy_until = 0, 0.0
        self._transports: set = set()
        app = web.Application(middlewares=[self._check_key])
        base = lambda: {"id": "base", "max_model_len": self.max_model_len}
        models = lambda: {"data": [base(), *({"id": name} for name in self.adapters)]}
        gets = {
            "/health": self._answer("health", dict),
            "/model_info": self._model_info,
            "/server_info": self._answer("info", lambda: self.information),
            "/v1/models": self._answer("info", models),
            "/workers": self._answer("workers", self._list_workers),
        }
        posts = dict(generate=self._generate, update_weights_from_disk=self._update)
        posts |= dict(flush_cache=self._flush, abort_request=self._abort, tokenize=self._tokenize)
        posts |= dict(load_lora_adapter=self._load_adapter)
        posts |= dict(unload_lora_adapter=self._unload_adapter)
        app.add_routes(web.get(path, route) for path, route in gets.items())
        app.add_routes(web.post(f"/{path}", route) for path, route in posts.items())
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        assert self._runner.addresses
        self._port = self._runner.addresses[0][1]

    async def _kill(self) -> None:
        for transport in self._transports:
            transport.abort()
        await self._runner.cleanup()

    @web.middleware
    async def _check_key(self, request: web.Request, handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if self.api_key and request.path != "/health" and given != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized", "given": given}, status=401)
        return await handler(request)

    async def _fault(self, request: web.Request, call: str) -> str:
        """The fault that is due, after those that any call can have."""
        self.calls[call] += 1
        self._transports.add(request.transport)
        fault = self.plan(call)
        self.faults[call, fault] += 1
        if fault == "reset":
            assert request.transport
            request.transport.abort()
        if fault in ("hang", "reset"):
            await asyncio.sleep(60)
        if fault == "delay":
            await asyncio.sleep(float(self._rng.uniform(0, 0.05)))
        if fault in ERRORS:
            raise ERRORS[fault](text="injected")
        return fault

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if isinstance(body["input_ids"][0], list):
            return await self._score(request, body)
        settings = body["sampling_params"]
        self.requests.append(body)
        if max(body["input_ids"]) >= VOCAB:
            await self._kill()  # as the real one
        if len(body["input_ids"]) + settings["max_new_tokens"] > self.max_model_len:
            raise web.HTTPBadRequest(text="too long")
        name = body.get("lora_path", "")
        held, says = self._held_by(name), self.says
        self._sampling[name] += 1
        running = {self.adapters[n] for n, count in self._sampling.items() if n and count}
        self.together.append(running)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self._idle.clear()
        try:
            fault = await self._fault(request, "generate")
            aborted = await self._work()
        except asyncio.CancelledError:  # the client hung up
            self._busy_until = self._loop.time() + LINGERS
            raise
        finally:
            self.running -= 1
            self._sampling[name] -= 1
            if not self.running:
                self._idle.set()
        answers = [self._sample(body, held, says) for _ in range(settings["n"])]
        if aborted or fault == "abort":
            for answer in answers:
                answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
        answers = self._spoil(answers, fault, settings)
        content = json.dumps(answers[0] if len(answers) == 1 else answers)
        half = content[: len(content) // 2]
        content = dict(html="<html>injected</html>", truncated=half, empty="").get(fault, content)
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(half.encode())
            assert request.transport
            request.transport.close()
            return response
        return web.Response(text=content, content_type="application/json")

    async def _work(self) -> bool:
        """Takes the time of a group; returns whether it was aborted meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                return await self._aborting.wait()
        return False

    def _sample(self, body: dict, held: int, says: str) -> dict:
        settings = body["sampling_params"] | self.forced_sampling
        logp = toy_logp(held, settings["temperature"])
        tokens: list[int] = []
        while len(tokens) < settings["max_new_tokens"] and tokens[-1:] != [STOP]:
            at = len(body["input_ids"]) + len(tokens)
            greedy = settings["temperature"] == 0
            drawn = logp[at].argmax() if greedy else self._rng.choice(VOCAB, p=np.exp(logp[at]))
            tokens.append(int(drawn))
        at, end = len(body["input_ids"]), len(tokens)
        pairs = [[float(logp[at + i, token]), token, None] for i, token in enumerate(tokens)]
        ended = {"type": "length", "length": end}
        if tokens[-1] == STOP:
            ended = {"type": "stop", "matched": STOP}
        meta = {"finish_reason": ended, "output_token_logprobs": pairs, **stamps((says, end))}
        return {"output_ids": tokens, "meta_info": meta}

    def _spoil(self, answers: list[dict], fault: str, settings: dict) -> list[dict]:
        answer = answers[-1]
        meta, ids = answer["meta_info"], answer["output_ids"]
        pairs = meta["output_token_logprobs"]
        if fault == "wrong_version":
            meta.update(stamps(("77", len(ids))))
        if fault == "few":
            return answers[:-1]
        if fault == "many":
            return [*answers, answer]
        if fault in ("range", "negative"):
            ids[0] = pairs[0][1] = VOCAB if fault == "range" else -1
        if fault in ("positive", "nan"):
            pairs[0][0] = 0.5 if fault == "positive" else float("nan")
        if fault == "no_logp":
            del meta["output_token_logprobs"]
        if fault == "other_logp":
            pairs[0][1] = (pairs[0][1] + 1) % VOCAB
        if fault == "short":
            for values in (ids, pairs):
                del values[1:]
            ids[0] = pairs[0][1] = STOP + 1
            meta["finish_reason"] = {"type": "length", "length": 1}
        if fault == "after_stop":
            ids.insert(0, STOP)
            pairs.insert(0, [-1.0, STOP, None])
            del ids[settings["max_new_tokens"] :], pairs[settings["max_new_tokens"] :]
        if fault in ("mixed", "other_mixed"):
            first, last = meta["weight_version"], "78"
            first, last = (last, first) if fault == "other_mixed" else (first, last)
            meta.update(stamps((first, 1), (last, 2)))
        return answers

    async def _score(self, request: web.Request, body: dict) -> web.Response:
        fault = await self._fault(request, "score")
        logp = toy_logp(self._held_by(body.get("lora_path", "")))
        answers = []
        for row in body["input_ids"]:
            named = [token if token < VOCAB - 1 else 0 for token in row]  # as the real one
            scores = [[None, named[0], None]]
            scores += [[float(logp[i, row[i]]), named[i], None] for i in range(1, len(row))]
            if fault in ("stale", "nan"):
                scores[-1][0] -= 0.01 if fault == "stale" else float("nan")
            says = "75" if fault == "wrong_version" else self.says
            meta = {"input_token_logprobs": scores, "weight_version": says}
            answers.append({"output_ids": [], "meta_info": meta})
        if fault == "few":
            answers.pop()
        return web.json_response(answers)

    def _answer(self, call: str, content: Callable[[], dict]):
        async def route(request: web.Request) -> web.Response:
            await self._fault(request, call)
            return web.json_response(content())

        return route

    def _list_workers(self) -> dict:
        return {"workers": [{"id": str(i), "url": url} for i, url in enumerate(self.workers)]}

    async def _model_info(self, request: web.Request) -> web.Response:
        fault = await self._fault(request, "info")
        info = {"model_path": str(self.model_path), "model_type": MODEL.model_type}
        info["weight_version"] = "76" if fault == "wrong_version" else self.says
        return web.json_response(info)

    async def _update(self, request: web.Request) -> web.Response:
        """Blocks until nothing runs, as the real one."""
        body, begin = await request.json(), self._loop.time()
        try:
            await self._idle.wait()
            fault = await self._fault(request, "update")
            if self._loop.time() < self._busy_until:
                fault = "half"
            refusal = {"success": False, "message": "injected"}
            if fault in ("refuse", "no"):
                return web.json_response(refusal, status=400 if fault == "refuse" else 200)
            manifest = json.loads((epath.Path(body["model_path"]) / MANIFEST).read_text())
            self.loads.append(manifest["version"])
            if fault != "half":  # new weights under the old name, as the real one when not idle
                self.says = body["weight_version"]
            if fault != "stale":  # it keeps the old weights and says that it has the new ones
                self.held = manifest["version"]
            if fault == "misnamed":
                self.says = "79"
            if fault in ("half", "late_no"):
                return web.json_response(refusal, status=400)
            await asyncio.sleep(self.update_seconds)
        finally:
            self.updates.append((begin, self._loop.time()))
        return web.json_response({"success": True, "message": "done"})

    def _held_by(self, name: str) -> int:
        if name and name not in self.adapters:
            raise web.HTTPBadRequest(text="an adapter that has never been loaded")
        return self.adapters[name] if name else self.held

    async def _load_adapter(self, request: web.Request) -> web.Response:
        """Waits for no request, as the real one."""
        body, fault = await request.json(), await self._fault(request, "adapter")
        if fault == "refuse" or body["lora_name"] in self.adapters:
            return web.json_response({"success": False, "error_message": "injected"}, status=400)
        manifest = json.loads((epath.Path(body["lora_path"]) / MANIFEST).read_text())
        self.adapters[body["lora_name"]] = manifest["version"]
        self.loads.append(manifest["version"])
        return web.json_response({"success": True})

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        """Waits for the adapter's requests, as the real one."""
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return web.json_response({"success": False, "error_message": "absent"}, status=400)
        while self._sampling[name]:
            await asyncio.sleep(0.01)
        del self.adapters[name]
        return web.json_response({"success": True})

    async def _flush(self, request: web.Request) -> web.Response:
        fault = await self._fault(request, "flush")
        if self.running or fault == "busy" or self._loop.time() < self._busy_until:
            return web.Response(status=400, text="Flush cache failed.")
        return web.Response(text="Cache flushed.")

    async def _abort(self, request: web.Request) -> web.Response:
        await self._fault(request, "abort")
        self._busy_until = self._loop.time() + LINGERS
        self._aborting.set()
        self._aborting = asyncio.Event()
        return web.Response()

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": [ord(letter) % VOCAB for letter in body["prompt"]]})
