"""--push-to-hub, by the real client of the Hub against a stand-in for its HTTP API."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from etils import epath
from small_models import random_params, small_config

from oapl_jax.config import save_config
from oapl_jax.model.policy import open_policy
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.publisher import check_version

PROBE = {"tokens": [[3, 1]], "logp": [[-0.5]], "dtype": "float32"}
TOKEN = "hf_only_for_this_test"
LARGE = (".safetensors",)


class Hub:
    """Models as a Hub keeps them: regular files come in the commit, large ones before it."""

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.commits: list[str] = []
        self.cards: list[str] = []
        self.refuse = 0  # status of every answer, if not 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body, status=200):
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def handle_call(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.refuse:
                    return self.answer({"error": "refused"}, hub.refuse)
                if self.path.startswith("/large/"):
                    hub.large[self.path.rpartition("/")[2]] = content
                    return self.answer({})
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer({"error": "who are you?"}, 401)
                return self.answer(*hub.call(self.command, self.path.partition("?")[0], content))

            do_GET = do_POST = do_PUT = handle_call

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def call(self, method, path, content):
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.models:
                return {"error": "exists", "url": f"{self.url}/{name}"}, 409
            private = asked.get("private") or asked.get("visibility") == "private"
            self.models[name], self.private[name] = {}, private
            return ({"url": f"{self.url}/{name}"},)
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(content)["content"])
            return ({"errors": [], "warnings": []},)
        name = next(name for name in self.models if f"/{name}" in path)
        rest = path.partition(f"/{name}")[2]
        if rest.startswith("/preupload/"):
            mode = lambda file: "lfs" if file["path"].endswith(LARGE) else "regular"
            files = [
                {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return ({"files": files},)
        if rest == ".git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]
            return ({"transfer": "basic", "objects": objects},)
        if rest.startswith("/commit/"):
            return (self.commit(name, [json.loads(line) for line in content.splitlines()]),)
        if rest.startswith("/tree/"):
            return (
                [
                    {"type": "file", "path": p, "size": len(c), "oid": "0" * 40}
                    for p, c in self.models[name].items()
                ],
            )
        return (
            {
                "id": name,
                "sha": "0" * 40,
                "siblings": [{"rfilename": p} for p in self.models[name]],
            },
        )

    def commit(self, name, lines):
        files = self.models[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = f"{self.url}/{name}/commit/{'1' * 40}"
        return {"success": True, "commitOid": "1" * 40, "commitUrl": commit}


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def run(tmp_path):
    """A run's workdir: Orbax step 8, and its model with a tokenizer."""
    workdir = epath.Path(tmp_path / "run")
    sizes = small_config(intermediate_size=96).to_hf(dtype="float32")
    policy = open_policy(workdir / "model", path="", architecture=sizes, characters="0123456789+=")
    weights = Weights(workdir / "weights", deadline=60.0)
    weights.save(8, random_params(policy.config, 8), PROBE)
    weights.close()
    save_config(workdir, {"num_steps": 9, "model": {"path": ""}, "publish_dtype": "float32"})
    return workdir


def push(run, endpoint, name="me/sums", token=TOKEN):
    """Exit code, stdout and stderr of the command."""
    command = [sys.executable, "-m", "oapl_jax.publish", f"--from={run}", "--step=8"]
    home = run.parent / "home"  # without a token of the person who tests
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [*command, f"--to={run.parent}/published", f"--push-to-hub={name}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_version_is_pushed_whole_as_one_commit_and_again(hub, run, tmp_path):
    code, out, err = push(run, hub.url)
    assert code == 0, err
    version = epath.Path(out.splitlines()[0])
    assert out.splitlines()[1].startswith(f"{hub.url}/me/sums/commit/")
    assert hub.private == {"me/sums": True}
    assert hub.commits == ["step 8"]
    assert hub.cards[0].startswith("---\nlibrary_name")
    files = hub.models["me/sums"]
    assert files == {path.name: path.read_bytes() for path in version.iterdir()}
    for name, content in files.items():
        (tmp_path / "downloaded").mkdir(exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(content)
    check_version(epath.Path(tmp_path / "downloaded"))

    files |= {"model-00001-of-00002.safetensors": b"of an older version", "LICENSE": b"mine"}
    code, out, err = push(run, hub.url)
    assert code == 0, err
    assert hub.models["me/sums"].keys() == {path.name for path in version.iterdir()} | {"LICENSE"}


@pytest.mark.parametrize(
    ("status", "name", "token", "code"),
    [
        (0, "me/sums", "hf_of_nobody", 2),
        (403, "me/sums", TOKEN, 2),
        (0, "me/my sums", TOKEN, 2),
        (500, "me/sums", TOKEN, 1),
    ],
)
def test_a_push_that_is_refused_is_one_sentence_and_the_version_stays(
    hub, run, status, name, token, code
):
    hub.refuse = status
    found, _, err = push(run, hub.url, name, token)
    assert found == code, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    check_version(epath.Path(run.parent / "published" / "v000008"))


def test_a_hub_that_does_not_answer_ends_with_code_1(run):
    code, _, err = push(run, "http://127.0.0.1:9")
    assert code == 1, err
    assert err.count("\n") == 1
