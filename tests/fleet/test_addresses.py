"""Addresses, lists and API keys of servers, as settings and files name them."""

import pytest

from oapl_jax.errors import UserError
from oapl_jax.fleet.addresses import read_api_key, read_server_list, server_url

VALID = {
    "http://10.0.0.2:30000": "http://10.0.0.2:30000",
    " http://10.0.0.2:30000/ ": "http://10.0.0.2:30000",
    "HTTP://Gpu-0.example.org:30000": "http://gpu-0.example.org:30000",
    "http://gpu_0": "http://gpu_0",
    "https://gateway.example.org/Servers/1/": "https://gateway.example.org/Servers/1",
    "http://[::1]:30000": "http://[::1]:30000",
    "http://[fd00::2]": "http://[fd00::2]",
    "http://[fe80::1%25eth0]:30000": "http://[fe80::1%25eth0]:30000",
    "http://localhost:65535": "http://localhost:65535",
}
INVALID = {
    "IPv6": ("http://::1:30000", "http://fd00::2", "http://[::1", "http://[10.0.0.2]:3", "::1"),
    "scheme": ("localhost:30000", "10.0.0.2", "//10.0.0.2:30000", "http:/a:1", "http:a", "a"),
    "other scheme": ("grpc://a:1", "ftp://a", "tcp://a:1", "gs://a/b", "file:///tmp/a"),
    "byte order mark": ("\ufeffhttp://a:1", "\ufeff", "\ufeff[]"),
    "characters": ("http://ä:1", "http://a:1\0", "http://a\u200b:1", "http\uff1a//a:1"),
    "several": ("http://a:1,http://b:1", "http://a:1 http://b:1", "http://a:1;http://b:1"),
    "JSON": ('["http://a:1"]', '"http://a:1"', "'http://a:1'", '{"url": "http://a:1"}', "[", ""),
    "host": ("http://", "http://:1", "http://10.0.0.256:1", "http://10.0.1:1", "http://a..b"),
    "more hosts": ("http://*:1", "http://<host>:1", "http://${HOST}:1", "http://-a", "http:///a"),
    "port": ("http://a:0", "http://a:65536", "http://a:", "http://a:3x", "http://a:-1"),
    "route": (
        "http://a:1/v1",
        "http://a:1/v1/chat/completions",
        "http://a:1/v1/",
        "http://a:1/generate",
        "http://a:1/health",
    ),
    "query": ("http://a:1?b=c", "http://a:1/#b", "http://http://a:1"),
}


@pytest.mark.parametrize(("entry", "url"), VALID.items())
def test_a_valid_address(entry, url):
    assert server_url(entry, of="fleet.servers") == url
    assert server_url(url, of="fleet.servers") == url


@pytest.mark.parametrize("entry", [entry for kind in INVALID.values() for entry in kind])
def test_an_address_that_no_request_reaches_is_named(entry):
    with pytest.raises(UserError) as caught:
        server_url(entry, of="fleet.servers")
    assert "fleet.servers" in str(caught.value)
    assert repr(entry.strip().partition("?")[0])[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    ["http://me:secret@a:1", "https://secret@a", "me:secret@a:1", "http://me:sec/secret@a:1"],
)
def test_a_password_in_an_address_is_refused_and_not_shown(entry):
    with pytest.raises(UserError) as caught:
        server_url(entry, of="fleet.servers")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        server_url("http://a:1?api_key=secret", of="fleet.servers")
    assert "secret" not in str(caught.value)


def test_a_server_list(tmp_path):
    path = tmp_path / "servers.txt"
    read = lambda: read_server_list(str(path), of="fleet.servers_file")
    with pytest.raises(FileNotFoundError):
        read()
    path.write_text("# mine\n\nhttp://a:1/  # the first\r\n  http://b:1\n#http://c:1")
    assert read() == ["http://a:1", "http://b:1"]
    path.write_text("")
    assert read() == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"http://a:1\nb:1\n", "line 2 .*b:1"),
        (b"http://a:1, http://b:1\n", "line 1 .*http://b:1"),
        (b'[\n"http://a:1"\n]\n', "line 1 "),
        (b"\xef\xbb\xbfhttp://a:1\n", "line 1 "),
        (b"\xef\xbb\xbf# mine\nhttp://a:1\n", "line 1 "),
        ("http://a:1\n".encode("utf-16"), "servers.txt"),
        (b"http://a:1\n\0\0\0", "line 2 "),
    ],
)
def test_a_malformed_server_list_is_named(tmp_path, content, named):
    path = tmp_path / "servers.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){named}") as caught:
        read_server_list(str(path), of="fleet.servers_file")
    assert "fleet.servers_file" in str(caught.value)
    assert "servers.txt" in str(caught.value)


def test_a_directory_is_no_server_list(tmp_path):
    with pytest.raises(UserError, match=r"fleet\.servers_file"):
        read_server_list(str(tmp_path), of="fleet.servers_file")


def test_an_api_key(tmp_path):
    path = tmp_path / "key"
    path.touch(0o600)
    for content in ("sk-1+/=", "sk-1+/=\n", " sk-1+/=\r\n"):
        path.write_text(content)
        assert read_api_key(str(path), of="fleet.api_key_file") == ("sk-1+/=", "")
    for mode in (0o640, 0o604, 0o644):
        path.chmod(mode)
        _, warning = read_api_key(str(path), of="fleet.api_key_file")
        assert str(path) in warning


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" \n", b"two words", b"one\ntwo\n", b"k\0y", b"k" * 5000),
        *("schl\u00fcssel".encode(), b"\xef\xbb\xbfkey", b"\xff\xfe"),
    ],
)
def test_a_malformed_api_key_is_refused_and_not_shown(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"fleet\.api_key_file") as caught:
        read_api_key(str(path), of="fleet.api_key_file")
    assert str(path) in str(caught.value)
    word = content.decode(errors="replace").strip()
    assert not word or word not in str(caught.value)


def test_an_api_key_in_place_of_its_file_is_not_shown(tmp_path):
    for value in ("sk-secret", str(tmp_path / "sk-secret"), "sk-secret\0", "sk-secret" * 50):
        with pytest.raises(UserError, match=r"fleet\.api_key_file") as caught:
            read_api_key(value, of="fleet.api_key_file")
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"fleet\.api_key_file"):
        read_api_key(str(tmp_path), of="fleet.api_key_file")
