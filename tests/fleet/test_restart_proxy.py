"""The supervisor: with a real SGLang server, and in its corners with a stand-in for one."""

import argparse
import asyncio
import contextlib
import json
import pathlib
import shutil
import signal
import sys
import time

import aiohttp
import numpy as np
import pytest
from fleets import REAL_SAMPLING, Taker, assert_published, open_real_fleet

from oapl_jax.errors import RunError, UserError
from oapl_jax.fleet.restart_proxy import __main__ as supervise
from oapl_jax.fleet.restart_proxy.__main__ import first_version, serve
from oapl_jax.structs import Prompt
from oapl_jax.weights.publisher import COMMITTED, MANIFEST

STAND_IN = pathlib.Path(__file__).parent / "stand_in.py"
PATIENCE = 30.0  # seconds until a test gives up
START = 240.0  # seconds for a real server to start
PROMPT = [4, 11, 6, 12, 3, 14]


@pytest.fixture
def versions(published, tmp_path):
    """Paths of copies of versions 1, 2 and 3, to be damaged."""
    for version in (1, 2, 3):
        shutil.copytree(published.path(version), tmp_path / str(version))
    return lambda version: tmp_path / str(version)


class Caller:
    """Calls the supervisor that `task` serves."""

    def __init__(self, session, port, task):
        self.task = task
        self._session, self._url = session, f"http://127.0.0.1:{port}"

    async def __call__(self, path, body=None):
        """Status and answer of a GET, or of a POST of `body`."""
        method = "GET" if body is None else "POST"
        async with self._session.request(method, self._url + path, json=body) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await (answer.json() if is_json else answer.text())

    async def ask(self, path, body=None):
        status, answer = await self(path, body)
        assert status == 200, f"{path}: {status} {answer}"
        return answer

    async def generate(self, n=1, **more):
        return await self("/generate", {"input_ids": [2, 3], "n": n, **more})

    async def update(self, path, name):
        body = {"model_path": str(path), "weight_version": name}
        return await self("/update_weights_from_disk", body)

    async def version(self):
        info = await self.ask("/model_info")
        return info["weight_version"], info["model_path"], info["pids"]

    async def ready(self):
        while not self.task.done():
            with contextlib.suppress(aiohttp.ClientConnectionError):
                if (await self("/health"))[0] == 200:
                    return
            await asyncio.sleep(0.05)
        self.task.result()


@contextlib.asynccontextmanager
async def supervised(model, free_port, **changed):
    """A stand-in under a supervisor, in this process; its Caller."""
    arguments = {
        "host": "127.0.0.1",
        "port": free_port(),
        "server_port": free_port(),
        "deadline": PATIENCE,
        "drain_deadline": PATIENCE,
        "stop_deadline": PATIENCE,
        "restarts": 1,
        "window": 600.0,
        "command": [sys.executable, str(STAND_IN), "{model}", "{port}"],
        **changed,
    }
    serving = serve(argparse.Namespace(**arguments), first_version(str(model)))
    task = asyncio.ensure_future(serving)
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(3 * PATIENCE):
            caller = Caller(session, arguments["port"], task)
            await caller.ready()
            yield caller
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RunError):
            await task


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def wait_gone(pids):
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_answers_pass_through_with_their_version(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            for n in (1, 3):
                _, answer = await call.generate(n=n)
                for response in answer if n > 1 else [answer]:
                    assert response == {
                        "output_ids": [5, 1],
                        "meta_info": {
                            "weight_version": "1",
                            "weight_versions": [{"version": "1", "start": 0, "end": 2}],
                            "read": str(versions(1)),
                        },
                    }
            for path in supervise.INFOS:
                info = await call.ask(path)
                assert (info["weight_version"], info["model_path"]) == ("1", str(versions(1)))
                assert set(info["supervisor"].values()) == {0}
            refused = {"error": {"message": "too long"}}
            assert await call.generate(answer=refused, status=400) == (400, refused)
            assert (await call.generate(answer={"a": 1}, status=200))[0] == 502
            assert (await call("/update_weights_from_disk"))[0] == 405  # the route is there
            for path in ("/release_memory_occupation", "/pause_generation"):
                assert (await call(path, {}))[0] == 404

    asyncio.run(body())


def test_a_new_version_is_served_by_a_new_process(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            *_, old = await call.version()
            assert (await call.update(versions(2), "2"))[0] == 200
            *held, new = await call.version()
            assert held == ["2", str(versions(2))]
            assert not set(old) & set(new)
            assert not any(map(alive, old))  # the worker neither
            _, answer = await call.generate()
            assert answer["meta_info"]["read"] == str(versions(2))
            assert answer["meta_info"]["weight_version"] == "2"
            assert (await call("/flush_cache", {}))[0] == 200

            assert (await call.update(versions(2), "2"))[0] == 200
            assert (await call.version())[2] == new  # it serves already
            counts = (await call.ask("/server_info"))["supervisor"]
            assert counts == {"refreshes": 1, "failed_refreshes": 0, "deaths": 0, "given_up": 0}
        assert not any(map(alive, new))

    asyncio.run(body())


def test_a_version_that_was_published_again_is_taken_again(versions, free_port):
    """A run that was killed publishes a step again, and the weights may be others."""

    async def body():
        async with supervised(versions(1), free_port) as call:
            *_, old = await call.version()
            manifest = json.loads((versions(2) / MANIFEST).read_text())
            shutil.rmtree(versions(1))
            shutil.copytree(versions(2), versions(1))
            (versions(1) / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
            assert (await call.update(versions(1), "1"))[0] == 200
            *held, new = await call.version()
            assert held == ["1", str(versions(1))]
            assert not set(old) & set(new)

    asyncio.run(body())


def test_requests_in_flight_end_on_the_old_version_and_no_other_is_taken(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            slow = asyncio.ensure_future(call.generate(seconds=1.5))
            await asyncio.sleep(0.3)
            update = asyncio.ensure_future(call.update(versions(2), "2"))
            refused = set()
            while not update.done():
                for path, body in (("/generate", {"n": 1}), ("/health", None)):
                    status, answer = await call(path, body)
                    if status != 200:
                        refused.add((path, status, answer["error"]["message"]))
                await asyncio.sleep(0.02)
            assert update.result()[0] == 200
            assert slow.result()[1]["meta_info"]["weight_version"] == "1"
            assert refused == {
                (path, 503, f"the server is {state}")
                for path in ("/generate", "/health")
                for state in ("draining", "restarting")
            }

    asyncio.run(body())


def test_a_request_that_lasts_too_long_is_given_up_and_counted(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port, drain_deadline=0.5) as call:
            slow = asyncio.ensure_future(call.generate(seconds=600))
            await asyncio.sleep(0.3)
            assert (await call.update(versions(2), "2"))[0] == 200
            assert (await slow)[0] == 503
            assert (await call.ask("/server_info"))["supervisor"]["given_up"] == 1

    asyncio.run(body())


def test_a_caller_that_hangs_up_ends_its_request(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            slow = asyncio.ensure_future(call.generate(seconds=600))
            await asyncio.sleep(0.3)
            slow.cancel()
            while not (versions(1) / "hung_up").exists():
                await asyncio.sleep(0.05)
            assert (await call.update(versions(2), "2"))[0] == 200  # nothing to wait for
            assert (await call.ask("/server_info"))["supervisor"]["given_up"] == 0

    asyncio.run(body())


def test_an_update_goes_on_when_its_caller_hangs_up(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            update = asyncio.ensure_future(call.update(versions(2), "2"))
            while (await call("/health"))[0] == 200:
                await asyncio.sleep(0.02)
            update.cancel()
            await call.ready()
            assert (await call.version())[0] == "2"

    asyncio.run(body())


def damage(path):
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (damage, "2", "model.safetensors is missing"),
        (lambda path: (path / COMMITTED).unlink(), "2", "not written to its end"),
        (lambda path: (path / MANIFEST).write_text("{"), "2", f"{MANIFEST} is missing"),
        (shutil.rmtree, "2", "is missing"),
        (lambda path: None, "3", "holds version 2, not 3"),
    ],
)
def test_a_damaged_version_is_refused_and_the_old_one_goes_on(
    versions, free_port, spoil, name, reason
):
    async def body():
        async with supervised(versions(1), free_port) as call:
            before = await call.version()
            spoil(versions(2))
            status, answer = await call.update(versions(2), name)
            assert (status, answer["success"]) == (400, False)
            assert reason in answer["message"]
            assert await call.version() == before  # the same process

    asyncio.run(body())


def test_a_request_without_a_version_is_refused(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            for wrong in ({"model_path": str(versions(2))}, [], "2"):
                assert (await call("/update_weights_from_disk", wrong))[0] == 400

    asyncio.run(body())


@pytest.mark.parametrize(("fault", "reason"), [("refuses", "code 3"), ("never", "within 10 s")])
def test_a_version_that_does_not_start_brings_the_old_one_back(versions, free_port, fault, reason):
    async def body():
        async with supervised(versions(1), free_port, deadline=10.0) as call:
            *_, old = await call.version()
            (versions(2) / fault).touch()
            status, answer = await call.update(versions(2), "2")
            assert (status, answer["success"]) == (500, False)
            assert reason in answer["message"]
            assert "version 1 serves again" in answer["message"]
            version, _, new = await call.version()
            assert version == "1"
            assert not set(old) & set(new)
            assert (await call.ask("/server_info"))["supervisor"]["failed_refreshes"] == 1

    asyncio.run(body())


def test_it_gives_up_if_the_old_version_does_not_come_back_either(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            for version in (1, 2):
                (versions(version) / "refuses").touch()
            status, answer = await call.update(versions(2), "2")
            assert status == 500
            assert "nor does version 1" in answer["message"]
            with pytest.raises(RunError, match="code 3"):
                await call.task

    asyncio.run(body())


def test_versions_are_taken_one_after_the_other(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            updates = [call.update(versions(v), str(v)) for v in (2, 3, 1)]
            assert [status for status, _ in await asyncio.gather(*updates)] == [200] * 3
            assert (await call.ask("/server_info"))["supervisor"]["refreshes"] == 3

    asyncio.run(body())


def test_a_server_that_dies_comes_back_on_its_version_but_not_for_ever(versions, free_port):
    async def body():
        async with supervised(versions(1), free_port) as call:
            await call.update(versions(2), "2")
            *_, old = await call.version()
            await call("/tokenize", {})  # the stand-in dies of it
            while (await call("/health"))[0] == 200:
                await asyncio.sleep(0.02)
            await call.ready()
            version, _, new = await call.version()
            assert version == "2"
            assert not any(map(alive, old))
            assert (await call.ask("/server_info"))["supervisor"]["deaths"] == 1
            await call("/tokenize", {})
            with pytest.raises(RunError, match=r"died 2 times within 600 s \(--restarts=1\)"):
                await call.task
            assert not any(map(alive, new))

    asyncio.run(body())


def test_a_server_that_does_not_end_is_killed(versions, free_port):
    async def body():
        (versions(1) / "stubborn").touch()
        async with supervised(versions(1), free_port, stop_deadline=0.5) as call:
            *_, old = await call.version()
            assert (await call.update(versions(2), "2"))[0] == 200
            assert not any(map(alive, old))

    asyncio.run(body())


def test_a_first_version_that_does_not_start_is_an_error(versions, free_port):
    async def body():
        (versions(1) / "refuses").touch()
        with pytest.raises(RunError, match="ended with code 3"):
            async with supervised(versions(1), free_port):
                pass

    asyncio.run(body())


def test_a_plain_checkpoint_is_a_version_without_a_name(versions, tmp_path):
    (versions(1) / MANIFEST).unlink()
    assert first_version(str(versions(1))).name == "default"
    damage(versions(2))
    with pytest.raises(UserError, match="damaged"):
        first_version(str(versions(2)))
    with pytest.raises(UserError, match=r"has no config\.json"):
        first_version(str(tmp_path))


# The command


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["python", "serve"], "no {model}"),
        (["no_such_program", "{model}"], "no program no_such_program"),
    ],
)
def test_a_mistaken_command_is_refused(versions, monkeypatch, free_port, command, message):
    flags = [f"--port={free_port()}", f"--server_port={free_port()}", f"--model={versions(1)}"]
    monkeypatch.setattr(sys, "argv", ["supervise", *flags, "--", *command])
    with pytest.raises(UserError, match=message):
        supervise.main()


def test_a_taken_port_is_refused(versions, free_port):
    async def body():
        port, other = free_port(), free_port()
        async with supervised(versions(1), free_port, port=port, server_port=other):
            taken = argparse.Namespace(command=["python", "{model}"], server_port=other)
            with pytest.raises(UserError, match=f"--server_port={other}"):
                supervise.check_arguments(taken)
            with pytest.raises(UserError, match=f"--port={port}"):
                async with supervised(versions(1), free_port, port=port):
                    pass

    asyncio.run(body())


def start_supervisor(start_process, free_port, model, server, **flags):
    """A supervisor in a process of its own, in front of the command `server`."""
    port = free_port()
    command = [sys.executable, "-m", "oapl_jax.fleet.restart_proxy", f"--port={port}"]
    command += [f"--server_port={free_port()}", f"--model={model}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    process = start_process("supervisor", [*command, "--", *server], port)
    process.wait_ready()
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)]
)
def test_the_server_ends_with_its_supervisor(start_process, free_port, versions, number, code):
    command = [sys.executable, str(STAND_IN), "{model}", "{port}"]
    process = start_supervisor(start_process, free_port, versions(1), command)
    server, worker = process.ask("/model_info")["pids"]
    process.interrupt(number)
    assert process.wait_exit(PATIENCE) == code
    wait_gone([server] if number == signal.SIGKILL else [server, worker])


def test_a_real_server_takes_versions_by_restarts(
    start_process, free_port, published, versions, sglang_command
):
    command = sglang_command("serve.py")
    command += ["--model-path={model}", "--port={port}", "--skip-tokenizer-init"]
    process = start_supervisor(start_process, free_port, published.path(1), command)
    request = {
        "input_ids": PROMPT,
        "sampling_params": {"n": 4, "temperature": 1.0, "max_new_tokens": 32},
        "return_logprob": True,
    }

    def check(version):
        for response in process.ask("/generate", request):
            meta = response["meta_info"]
            span = {"version": version, "start": 0, "end": len(response["output_ids"])}
            assert (meta["weight_version"], meta["weight_versions"]) == (version, [span])
            got = [entry[0] for entry in meta["output_token_logprobs"]]
            expected = published.logp(int(version), PROMPT, response["output_ids"])
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
        assert process.ask("/model_info")["weight_version"] == version
        assert process.ask("/server_info")["weight_version"] == version
        assert process.ask("/v1/models")["data"][0]["max_model_len"] == 4096

    check("1")
    damage(versions(3))
    body = {"model_path": str(versions(3)), "weight_version": "3"}
    assert process.call("/update_weights_from_disk", body)[0] == 400
    check("1")
    # The fleet's client takes it for a server that can load weights.
    fleet = open_real_fleet(
        published, [process.url], update_deadline=START, no_server_deadline=2 * START
    )
    try:
        fleet.refresh(2, published.path(2))
        group = Prompt("p", 0, np.array(PROMPT, np.int32), "", "", "")
        taken = Taker(fleet, [group] * 4, REAL_SAMPLING, 2 * START).result()
    finally:
        fleet.close()
    assert_published(published, taken)
    assert {(s.rollouts[0].policy_version, s.attempts) for s in taken} == {(2, ())}
    check("2")
    process.interrupt(signal.SIGTERM)
    assert process.wait_exit(PATIENCE) == 0
