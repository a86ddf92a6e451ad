"""The restart proxy, in front of a stub server and of a real SGLang server."""

import argparse
import asyncio
import contextlib
import itertools
import json
import pathlib
import shutil
import signal
import sys

import aiohttp
import numpy as np
import pytest
from etils import epath
from fleets import PATIENCE, assert_published, damage, open_real_fleet, wait_until
from server_processes import find_port, sglang_program

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import write_file
from oapl_jax.fleet import restart_proxy
from oapl_jax.fleet.client import bearer
from oapl_jax.fleet.restart_proxy import INFO_ROUTES, Supervisor, first_version
from oapl_jax.model import hf
from oapl_jax.structs import Prompt
from oapl_jax.weights.publisher import COMMITTED, MANIFEST

STUB = [sys.executable, str(pathlib.Path(__file__).parent / "stub_server.py"), "{model}", "{port}"]
START = 240.0  # seconds for a real server to start
PROMPT = [4, 11, 6, 12, 3, 14]


@pytest.fixture
def versions(published, tmp_path):
    """Paths of copies of versions 1, 2 and 3, to be damaged."""
    for version in (1, 2, 3):
        shutil.copytree(published.path(version), tmp_path / str(version))
    return lambda version: tmp_path / str(version)


class Caller:
    """Client of the proxy that `task` serves."""

    def __init__(self, session, port, task):
        self.task, self.key = task, ""
        self._session, self._url = session, f"http://127.0.0.1:{port}"

    async def __call__(self, path, body=None):
        """Returns status and content of a GET, or of a POST of `body`."""
        method = "GET" if body is None else "POST"
        where = dict(url=self._url + path, headers=bearer(self.key))
        async with self._session.request(method, json=body, **where) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    async def ask(self, path, body=None):
        status, content = await self(path, body)
        assert status == 200, f"{path}: {status} {content}"
        return content

    async def generate(self, n=1, **more):
        return await self("/generate", {"input_ids": [2, 3], "n": n, **more})

    async def start_generate(self, seconds):
        """Returns the task of a request that is in flight."""
        task = asyncio.ensure_future(self.generate(seconds=seconds))
        await asyncio.sleep(0.3)
        return task

    async def update(self, path, name):
        body = {"model_path": str(path), "weight_version": name}
        return await self("/update_weights_from_disk", body)

    async def version(self):
        info = await self.ask("/model_info")
        return info["weight_version"], info["model_path"], info["pids"]

    async def counts(self):
        return (await self.ask("/server_info"))["supervisor"]

    async def wait_down(self):
        while (await self("/health"))[0] == 200:
            await asyncio.sleep(0.02)

    async def wait_ready(self):
        while not self.task.done():
            with contextlib.suppress(aiohttp.ClientConnectionError):
                if (await self("/health"))[0] == 200:
                    return
            await asyncio.sleep(0.05)
        self.task.result()


def new_supervisor(model, **changed):
    settings = dict.fromkeys(("start_deadline", "drain_deadline", "stop_deadline"), PATIENCE)
    settings |= {"command": STUB, "restarts": 1, "window": 600.0, **changed}
    return Supervisor(version=first_version(str(model)), **settings)


@contextlib.asynccontextmanager
async def supervise(model, port=None, api_key="", **changed):
    """Serves a proxy with a stub server of a model directory; yields its caller."""
    port = port or find_port()
    supervisor = new_supervisor(model, **{"server_port": find_port(), **changed})
    task = asyncio.ensure_future(restart_proxy.serve(supervisor, "127.0.0.1", port, api_key))
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(3 * PATIENCE):
            call = Caller(session, port, task)
            await call.wait_ready()
            yield call
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RunError):
            await task


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


async def test_a_key_is_demanded_of_every_route_but_health(versions):
    async with supervise(versions(1), api_key="sk-1") as call:
        for call.key in ("", "sk-2", "sk-1x"):
            assert (await call("/health"))[0] == 200
            for path in ("/model_info", "/v1/models", "/nowhere"):
                assert (await call(path))[0] == 401
            assert (await call.generate())[0] == 401
            assert (await call.update(versions(2), "2"))[0] == 401
        call.key = "sk-1"
        assert (await call.generate())[0] == 200
        assert (await call.update(versions(2), "2"))[0] == 200
        assert (await call.version())[0] == "2"


async def test_responses_are_forwarded_with_their_version(versions):
    async with supervise(versions(1)) as call:
        for n in (1, 3):
            _, content = await call.generate(n=n)
            spans = [{"version": "1", "start": 0, "end": 2}]
            meta = {"weight_version": "1", "weight_versions": spans, "read": str(versions(1))}
            for response in content if n > 1 else [content]:
                assert response == {"output_ids": [5, 1], "meta_info": meta}
        for path in INFO_ROUTES:
            info = await call.ask(path)
            assert (info["weight_version"], info["model_path"]) == ("1", str(versions(1)))
            assert set(info["supervisor"].values()) == {0}
        refused = {"error": {"message": "too long"}}
        assert await call.generate(content=refused, status=400) == (400, refused)
        assert (await call.generate(content={"a": 1}, status=200))[0] == 502
        assert (await call("/update_weights_from_disk"))[0] == 405  # the route exists
        for path in ("/release_memory_occupation", "/pause_generation"):
            assert (await call(path, {}))[0] == 404
        for wrong in ({"model_path": str(versions(2))}, [], "2"):
            assert (await call("/update_weights_from_disk", wrong))[0] == 400


@pytest.mark.parametrize("ignores_sigterm", [False, True])
async def test_a_new_version_is_served_by_a_new_process(versions, ignores_sigterm):
    if ignores_sigterm:
        (versions(1) / "stubborn").touch()
    async with supervise(versions(1), stop_deadline=0.5 if ignores_sigterm else PATIENCE) as call:
        *_, old = await call.version()
        assert (await call.update(versions(2), "2"))[0] == 200
        *held, new = await call.version()
        assert held == ["2", str(versions(2))]
        assert not set(old) & set(new)
        assert not any(map(alive, old))  # nor its worker
        _, content = await call.generate()
        assert content["meta_info"]["read"] == str(versions(2))
        assert content["meta_info"]["weight_version"] == "2"
        assert (await call("/flush_cache", {}))[0] == 200

        assert (await call.update(versions(2), "2"))[0] == 200
        assert (await call.version())[2] == new  # it is served already
        counts = {"refreshes": 1, "failed_refreshes": 0, "deaths": 0, "aborted": 0}
        assert await call.counts() == counts
    assert not any(map(alive, new))


async def test_a_version_that_was_published_again_is_loaded_again(versions):
    """A killed run publishes a step again, maybe with other weights."""

    async with supervise(versions(1)) as call:
        *_, old = await call.version()
        manifest = json.loads((versions(2) / MANIFEST).read_text())
        shutil.rmtree(versions(1))
        shutil.copytree(versions(2), versions(1))
        (versions(1) / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
        assert (await call.update(versions(1), "1"))[0] == 200
        *held, new = await call.version()
        assert held == ["1", str(versions(1))]
        assert not set(old) & set(new)


async def test_a_restart_drains_requests_and_rejects_new_ones(versions):
    async with supervise(versions(1)) as call:
        slow = await call.start_generate(1.5)
        update = asyncio.ensure_future(call.update(versions(2), "2"))
        rejected = set()
        while not update.done():
            for path, content in (("/generate", {"n": 1}), ("/health", None)):
                status, response = await call(path, content)
                if status != 200:
                    rejected.add((path, status, response["error"]["message"].split()[-1]))
            await asyncio.sleep(0.02)
        assert update.result()[0] == 200
        assert slow.result()[1]["meta_info"]["weight_version"] == "1"
        states = itertools.product(("/generate", "/health"), (503,), ("draining", "restarting"))
        assert rejected == set(states)


async def test_a_request_beyond_the_drain_deadline_is_aborted(versions):
    async with supervise(versions(1), drain_deadline=0.5) as call:
        slow = await call.start_generate(600)
        assert (await call.update(versions(2), "2"))[0] == 200
        assert (await slow)[0] == 503
        assert (await call.counts())["aborted"] == 1


async def test_a_caller_that_hangs_up_ends_its_request(versions):
    async with supervise(versions(1)) as call:
        slow = await call.start_generate(600)
        slow.cancel()
        while not (versions(1) / "hung_up").exists():
            await asyncio.sleep(0.05)
        assert (await call.update(versions(2), "2"))[0] == 200  # nothing to drain
        assert (await call.counts())["aborted"] == 0


async def test_an_update_continues_when_its_caller_hangs_up(versions):
    async with supervise(versions(1)) as call:
        update = asyncio.ensure_future(call.update(versions(2), "2"))
        await call.wait_down()
        update.cancel()
        await call.wait_ready()
        assert (await call.version())[0] == "2"


def merge(path):
    """Makes a version of adapters with their base merged: the adapters lie in a directory below."""
    below, manifest = path / hf.MERGED_BELOW, json.loads((path / MANIFEST).read_text())
    below.mkdir()
    for name in (hf.ADAPTER, hf.ADAPTER_CONFIG):
        entry = write_file(epath.Path(below / name), [b"{}"])
        manifest["files"][f"{hf.MERGED_BELOW}/{name}"] = entry
    (path / MANIFEST).write_text(json.dumps(manifest))


async def test_a_merged_version_is_served(versions):
    merge(versions(2))
    async with supervise(versions(1)) as call:
        assert (await call.update(versions(2), "2"))[0] == 200
        assert (await call.version())[:2] == ("2", str(versions(2)))


def lose_adapters(path):
    merge(path)
    (path / hf.MERGED_BELOW / hf.ADAPTER).unlink()


@pytest.mark.parametrize(
    ("spoil", "name", "entity"),
    [
        (damage, "2", "model.safetensors"),
        (lose_adapters, "2", hf.ADAPTER),
        (lambda path: (path / COMMITTED).unlink(), "2", "version"),
        (lambda path: (path / MANIFEST).write_text("{"), "2", MANIFEST),
        (shutil.rmtree, "2", "version"),
        (
            lambda path: (path / hf.SINGLE).rename(path / f"{hf.SINGLE}{hf.DELTA}"),
            *("2", "delta"),
        ),
        (lambda path: None, "3", "version 2"),
    ],
)
async def test_a_damaged_version_is_refused_and_the_old_one_stays(versions, spoil, name, entity):
    async with supervise(versions(1)) as call:
        before = await call.version()
        spoil(versions(2))
        status, content = await call.update(versions(2), name)
        assert (status, content["success"]) == (400, False)
        assert entity in content["message"]
        assert await call.version() == before  # the same process


@pytest.mark.parametrize("fault", ["refuses", "never"])
async def test_a_version_that_does_not_start_brings_the_old_one_back(versions, fault):
    async with supervise(versions(1), start_deadline=10.0) as call:
        *_, old = await call.version()
        (versions(2) / fault).touch()
        status, content = await call.update(versions(2), "2")
        assert (status, content["success"]) == (500, False)
        assert "version 1" in content["message"]
        version, _, new = await call.version()
        assert version == "1"
        assert not set(old) & set(new)
        assert (await call.counts())["failed_refreshes"] == 1


async def test_the_proxy_ends_if_the_old_version_does_not_start_either(versions):
    async with supervise(versions(1)) as call:
        for version in (1, 2):
            (versions(version) / "refuses").touch()
        assert (await call.update(versions(2), "2"))[0] == 500
        with pytest.raises(RunError):
            await call.task


async def test_updates_run_one_after_the_other(versions):
    async with supervise(versions(1)) as call:
        updates = [call.update(versions(v), str(v)) for v in (2, 3)]
        assert [status for status, _ in await asyncio.gather(*updates)] == [200] * 2
        assert (await call.counts())["refreshes"] == 2


async def test_a_server_that_dies_is_restarted_on_its_version_a_limited_number_of_times(versions):
    async with supervise(versions(1)) as call:
        await call.update(versions(2), "2")
        *_, old = await call.version()
        await call("/tokenize", {})  # kills the stub server
        await call.wait_down()
        await call.wait_ready()
        version, _, new = await call.version()
        assert version == "2"
        assert not any(map(alive, old))
        assert (await call.counts())["deaths"] == 1
        await call("/tokenize", {})
        with pytest.raises(RunError, match="--restarts"):
            await call.task
        assert not any(map(alive, new))


async def test_a_first_version_that_does_not_start_is_an_error(versions):
    (versions(1) / "refuses").touch()
    with pytest.raises(RunError):
        async with supervise(versions(1)):
            pass


def test_first_version(versions, tmp_path):
    (versions(1) / MANIFEST).unlink()
    assert first_version(str(versions(1))).name == "default"
    damage(versions(2))
    for wrong in (versions(2), tmp_path):
        with pytest.raises(UserError):
            first_version(str(wrong))


@pytest.mark.parametrize(
    ("command", "name"),
    [(["python", "serve"], "{model}"), (["no_such_program", "{model}"], "no_such_program")],
)
def test_a_wrong_command_is_refused(versions, monkeypatch, command, name):
    flags = [f"--port={find_port()}", f"--server_port={find_port()}", f"--model={versions(1)}"]
    monkeypatch.setattr(sys, "argv", ["restart_proxy", *flags, "--", *command])
    with pytest.raises(UserError, match=name):
        restart_proxy.main()


async def test_a_port_in_use_is_refused(versions):
    port, other = find_port(), find_port()
    async with supervise(versions(1), port=port, server_port=other):
        used = argparse.Namespace(command=["python", "{model}"], server_port=other)
        with pytest.raises(UserError, match="--server_port"):
            restart_proxy.check_arguments(used)
        supervisor = new_supervisor(versions(1), server_port=find_port())
        with pytest.raises(UserError, match=f"--port={port}"):
            await restart_proxy.serve(supervisor, "127.0.0.1", port)


def start_proxy(start_process, model, server):
    port = find_port()
    command = [sys.executable, "-m", "oapl_jax.fleet.restart_proxy", f"--port={port}"]
    command += [f"--server_port={find_port()}", f"--model={model}", "--", *server]
    process = start_process("restart proxy", command, port)
    process.wait_ready()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_server_ends_with_the_proxy(start_process, versions, number):
    process = start_proxy(start_process, versions(1), STUB)
    server, worker = process.ask("/model_info")["pids"]
    process.interrupt(number)
    assert process.wait_exit(PATIENCE) == (-9 if number == signal.SIGKILL else 0)
    ended = [server] if number == signal.SIGKILL else [server, worker]
    wait_until(lambda: not any(map(alive, ended)), "the end of the server")


def test_a_real_server_loads_versions_by_restarts(start_process, published, versions):
    command = sglang_program("serve.py")
    command += ["--model-path={model}", "--port={port}", "--skip-tokenizer-init"]
    process = start_proxy(start_process, published.path(1), command)
    sampling = {"n": 4, "temperature": 1.0, "max_new_tokens": 32}
    request = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}

    def check(version):
        for response in process.ask("/generate", request):
            meta = response["meta_info"]
            span = {"version": version, "start": 0, "end": len(response["output_ids"])}
            assert (meta["weight_version"], meta["weight_versions"]) == (version, [span])
            got = [entry[0] for entry in meta["output_token_logprobs"]]
            expected = published.logp(int(version), PROMPT, response["output_ids"])
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
        for path in ("/model_info", "/server_info"):
            assert process.ask(path)["weight_version"] == version
        assert process.ask("/v1/models")["data"][0]["max_model_len"] == 4096

    check("1")
    damage(versions(3))
    body = {"model_path": str(versions(3)), "weight_version": "3"}
    assert process.call("/update_weights_from_disk", body)[0] == 400
    check("1")
    # To the fleet's client it is a server that can load weights.
    settings = dict(patience=2 * START, update_deadline=START, no_server_deadline=2 * START)
    with contextlib.closing(open_real_fleet(published, [process.url], **settings)) as fleet:
        fleet.refresh(2, published.path(2))
        group = Prompt("p", 0, np.array(PROMPT, np.int32), "", "", "")
        taken = fleet.take([group] * 4).result()
    assert_published(published, taken)
    assert {(s.rollouts[0].policy_version, s.attempts) for s in taken} == {(2, ())}
    check("2")
    process.interrupt(signal.SIGTERM)
    assert process.wait_exit(PATIENCE) == 0
