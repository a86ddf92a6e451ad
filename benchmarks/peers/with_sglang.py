"""An SGLang server on the CPU (`make sglang`) that receives all sequences in one request."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import work

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE = 240.0  # seconds for the server to be ready


@contextlib.contextmanager
def server(path: str) -> Iterator[tuple[str, int]]:
    """Starts a server; yields its URL and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    room = 2 * work.TOKENS
    command = [
        *("setpriv", "--pdeathsig=KILL", str(ROOT / ".venv-sglang/bin/python")),
        *("cpu_setup/serve.py", f"--model-path={path}", f"--port={port}"),
        *("--skip-tokenizer-init", "--mem-fraction-static=0.5"),
        *(f"--max-running-requests={work.SEQUENCES}", f"--max-total-tokens={room}"),
        f"--chunked-prefill-size={work.SEQUENCES * work.PROMPT}",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + DEADLINE
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=30).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server did not start: {log.read()[-2000:].decode()}")
                time.sleep(1.0)
            yield url, process.pid
        finally:
            process.kill()
            process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *[member for child in children for member in family(int(child))]]


def sampler(path: str, steps: int, rollouts: str) -> None:
    body = {
        "input_ids": work.make_rollouts().prompts.tolist(),
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": work.RESPONSE,
            "ignore_eos": True,
        },
        "return_logprob": True,
    }
    found = {}

    def sample() -> None:
        request = urllib.request.Request(
            f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            said = [one["meta_info"]["output_token_logprobs"] for one in json.loads(answer.read())]
        found["tokens"] = [[entry[1] for entry in one] for one in said]
        found["logp"] = [[entry[0] for entry in one] for one in said]

    with server(path) as (url, pid):
        sample()
        taken = work.seconds(sample, steps)
        peak = max(map(work.peak_mb, family(pid)))  # the process that holds the model
    work.save_rollouts(rollouts, **found)
    work.report(seconds=taken, peak_mb=peak)


if __name__ == "__main__":
    given = work.arguments()
    sampler(given.model, given.steps, given.rollouts)
