"""Fetcher of versions: checksums, collection, and a fleet whose versions are in a bucket."""

import asyncio
import datetime
import errno
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import aiohttp
import pytest
from bucket import emulated
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from etils import epath
from fault_server import publish_toy
from fleets import ToyFleet, wait_until
from server_processes import find_port

from oapl_jax.errors import UserError
from oapl_jax.files import checksum, write_file
from oapl_jax.fleet import fetch
from oapl_jax.fleet.client import ServerError, SGLangClient
from oapl_jax.weights import delta
from oapl_jax.weights.publisher import (
    COMMITTED,
    MANIFEST,
    check_version,
    collect_fetched,
    fetch_version,
    read_manifest,
    version_path,
)

WEIGHTS = "model.safetensors"
HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def bucket():
    with emulated("versions") as bucket:
        yield bucket


@pytest.fixture
def versions(bucket, request):
    return bucket / f"{abs(hash(request.node.name))}"


@pytest.fixture
def start_fetcher(versions, tmp_path, stack):
    """Starts a fetcher; returns its port."""

    def start(*flags):
        port = find_port()
        command = [sys.executable, "-m", "oapl_jax.fleet.fetch", f"--from={versions}"]
        command += [f"--to={tmp_path}/copies", f"--port={port}", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.callback(process.kill)
        assert str(port) in process.stdout.readline()
        return port

    return start


@pytest.fixture
def publish_delta(tmp_path):
    """Publishes a version of the toy policy as a delta of another one of its directory."""

    def publish(directory, version, *, of):
        aside = epath.Path(tmp_path) / "whole"
        whole, base = publish_toy(aside, version), fetch_version(version_path(directory, of), aside)
        path = version_path(directory, version)
        path.mkdir(parents=True)
        for name in ("config.json", "probe.json"):
            (path / name).write_bytes((whole / name).read_bytes())
        changes = delta.encode(whole / WEIGHTS, base / WEIGHTS, itemsize=4)
        files = {WEIGHTS: write_file(path / f"{WEIGHTS}.xor.zst", changes)}
        about = {"version": of, "manifest": checksum(base / MANIFEST), "files": files}
        (path / MANIFEST).write_text(json.dumps(read_manifest(whole) | {"delta": about}))
        (path / COMMITTED).write_text("")
        return path

    return publish


def ask(port, body, **headers):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/fetch", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def certificate(tmp_path):
    """A certificate of 127.0.0.1 that it has signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now, address = datetime.datetime.now(datetime.UTC), ipaddress.ip_address("127.0.0.1")
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + 9 * HOUR)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(address)]), False)
    made = made.sign(key, hashes.SHA256())
    (tmp_path / "certificate.pem").write_bytes(made.public_bytes(Encoding.PEM))
    form = PrivateFormat.PKCS8, NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, *form))
    return tmp_path / "certificate.pem", tmp_path / "key.pem"


def fetch_as_a_learner(url, path, port, monkeypatch, authority):
    """What the client of a server at `url` gets from the fetcher beside it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))

    async def fetched():
        context = ssl.create_default_context()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            limits = dict(connect_deadline=10.0, deadline=10.0, api_key="word")
            client = SGLangClient(session, url, **limits)
            return await client.fetch(str(path), port=port, deadline=10.0)

    return asyncio.run(fetched())


def test_a_fetcher_of_servers_with_https_speaks_it_too(
    versions, start_fetcher, certificate, tmp_path, monkeypatch
):
    (tmp_path / "key").write_text("word")
    (tmp_path / "key").chmod(0o600)
    files = dict(zip(("certfile", "keyfile"), certificate, strict=True))
    flags = [f"--ssl_{name}={path}" for name, path in files.items()]
    port = start_fetcher(f"--api_key_file={tmp_path}/key", *flags)
    path, url = publish_toy(versions, 3), "https://127.0.0.1:1/of-a-server"
    check_version(epath.Path(fetch_as_a_learner(url, path, port, monkeypatch, certificate[0])))


def test_the_key_of_a_fleet_with_https_never_goes_out_in_clear_text(certificate, monkeypatch):
    received = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(1 << 16))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(ServerError):
            fetch_as_a_learner(
                "https://127.0.0.1:1", "gs://a/v1", port, monkeypatch, certificate[0]
            )
        thread.join()
    assert received[0]
    assert b"word" not in received[0]


def test_a_certificate_that_can_not_be_read_is_refused(tmp_path, monkeypatch):
    flags = [f"--from={tmp_path}", f"--to={tmp_path}", f"--ssl_certfile={tmp_path}/none"]
    monkeypatch.setattr(sys, "argv", ["fetch", *flags])
    with pytest.raises(UserError, match="--ssl_certfile"):
        fetch.main()


def test_a_version_is_fetched_once_and_whole(versions, tmp_path):
    to, path = epath.Path(tmp_path / "copies"), publish_toy(versions, 5)
    copy = fetch_version(path, to)
    check_version(copy)
    assert read_manifest(copy) == read_manifest(path)
    assert {p.name for p in copy.iterdir()} == {p.name for p in path.iterdir()}
    (copy / "kept").write_text("it is not made again")
    assert fetch_version(path, to) == copy
    assert (copy / "kept").exists()
    path.rmtree()
    again = fetch_version(publish_toy(versions, 5, off=1.0), to)  # by a run that was killed
    assert again != copy
    check_version(again)


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "uncommitted", "no manifest"])
def test_a_damaged_version_is_refused_and_leaves_nothing(versions, tmp_path, damage):
    path, to = publish_toy(versions, 7), epath.Path(tmp_path / "copies")
    name = {"uncommitted": "COMMITTED", "no manifest": "manifest.json"}.get(damage, "probe.json")
    content = (path / name).read_bytes()
    if damage in ("short", "changed"):
        (path / name).write_bytes(content[:-1] + (b"?" if damage == "changed" else b""))
    else:
        (path / name).unlink()
    with pytest.raises(UserError, match="v000007"):
        fetch_version(path, to)
    assert not to.exists() or not list(to.iterdir())


def test_a_copy_that_can_not_be_renamed_is_an_error(versions, tmp_path, monkeypatch):
    def rename(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        fetch_version(publish_toy(versions, 5), epath.Path(tmp_path / "copies"))
    assert not list((tmp_path / "copies").iterdir())


def test_the_last_used_copies_stay(versions, tmp_path):
    to = epath.Path(tmp_path / "copies")
    copies = [fetch_version(publish_toy(versions, version), to) for version in range(4)]
    fetch_version(version_path(versions, 0), to)
    assert collect_fetched(to, keep=2) == [copies[1].name, copies[2].name]
    assert sorted(to.iterdir()) == [copies[0], copies[3]]


def test_the_service_fetches_what_is_below_its_root_alone(versions, start_fetcher, tmp_path):
    (tmp_path / "key").write_text("word")
    (tmp_path / "key").chmod(0o600)
    port, key = start_fetcher("--keep=2", f"--api_key_file={tmp_path}/key"), "Bearer word"
    for version in range(4):
        path = publish_toy(versions, version)
        status, answer = ask(port, {"path": str(path)}, Authorization=key)
        assert status == 200
        check_version(epath.Path(answer["path"]))
    assert len(list((tmp_path / "copies").iterdir())) == 2
    assert ask(port, {"path": str(path)})[0] == 401
    for body in ({"path": "/etc"}, {"path": f"{versions}/../v000001"}, {}, []):
        assert ask(port, body, Authorization=key)[0] == 400


def test_one_version_is_fetched_by_a_command(versions, tmp_path, monkeypatch, capsys):
    publish_toy(versions, 3)
    flags = [f"--from={versions}", f"--to={tmp_path}", "--version=3"]
    monkeypatch.setattr(sys, "argv", ["fetch", *flags])
    fetch.main()
    check_version(epath.Path(capsys.readouterr().out.strip()))


def test_servers_load_fetched_copies(versions, start_fetcher, toy_servers, tmp_path, stack):
    made = toy_servers(2)
    servers = tuple(server.url for server in made)
    fleet = ToyFleet(versions, servers=servers, fetch_port=start_fetcher())
    stack.callback(fleet.close)
    for version in (4, 8):
        fleet.publish(version)
        wait_until(lambda: all(server.loads[-1:] == [version] for server in made))  # noqa: B023
        assert fleet.sample(10).versions == {version}
    damaged = publish_toy(versions, 12)
    (damaged / "model.safetensors").write_text(json.dumps({"version": 99}))
    fleet.refresh(12, damaged)
    refused = set()

    def each_has_refused():
        states = fleet.servers().items()
        refused.update(url for url, state in states if "v000012" in state["reason"])
        return refused == {*servers}

    wait_until(each_has_refused)
    assert all(server.loads == [4, 8] for server in made)


def test_servers_load_what_a_fetcher_makes_of_deltas(
    versions, start_fetcher, publish_delta, toy_servers, stack
):
    made = toy_servers(2)
    servers = tuple(server.url for server in made)
    fleet = ToyFleet(versions, servers=servers, fetch_port=start_fetcher("--keep=2"))
    stack.callback(fleet.close)
    fleet.publish(1)
    for version in (2, 3, 4):
        fleet.refresh(version, publish_delta(versions, version, of=version - 1))
        wait_until(lambda: all(server.loads[-1:] == [version] for server in made))  # noqa: B023
        assert fleet.sample(10).versions == {version}


def test_a_service_without_the_base_fetches_the_chain_or_refuses(
    versions, start_fetcher, publish_delta, tmp_path
):
    publish_toy(versions, 1)
    paths = [publish_delta(versions, version, of=version - 1) for version in (2, 3, 4)]
    port = start_fetcher()
    status, answer = ask(port, {"path": str(paths[1])})
    assert status == 200
    assert json.loads((epath.Path(answer["path"]) / WEIGHTS).read_text()) == {"version": 3}
    version_path(versions, 1).rmtree()
    assert ask(port, {"path": str(paths[2])})[0] == 200  # with the copy of version 3
    for copy in (tmp_path / "copies").iterdir():
        shutil.rmtree(copy)
    status, answer = ask(port, {"path": str(paths[2])})
    assert status == 400
    assert "v000001" in answer["message"]


def test_a_command_fetches_the_chain_and_says_so(
    versions, publish_delta, tmp_path, monkeypatch, capsys
):
    publish_toy(versions, 1)
    publish_delta(versions, 2, of=1)
    flags = [f"--from={versions}", f"--to={tmp_path / 'copies'}", "--version=2"]
    monkeypatch.setattr(sys, "argv", ["fetch", *flags])
    fetch.main()
    said = capsys.readouterr()
    check_version(epath.Path(said.out.strip()))
    assert "v000001" in said.err


def test_a_fleet_without_fetchers_refuses_a_delta(publish_delta, toy_servers, tmp_path, stack):
    versions = epath.Path(tmp_path / "versions")
    fleet = ToyFleet(versions, servers=tuple(server.url for server in toy_servers(1)))
    stack.callback(fleet.close)
    fleet.publish(1)
    with pytest.raises(UserError, match=r"fleet\.fetch_port"):
        fleet.refresh(2, publish_delta(versions, 2, of=1))


def test_versions_in_a_bucket_need_a_fetcher(versions, toy_servers, stack):
    fleet = ToyFleet(versions, servers=tuple(server.url for server in toy_servers(1)))
    stack.callback(fleet.close)
    with pytest.raises(UserError, match=r"fleet\.fetch_port"):
        fleet.publish(4)
