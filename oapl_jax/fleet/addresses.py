"""Addresses and API keys of servers, as settings and files name them."""

import ipaddress
import os
import re
import stat
from urllib.parse import urlsplit

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import is_local

BOM = "\ufeff"
MAX_KEY_BYTES = 4096
AUTHORITY = re.compile(r"(\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[\w.-]+))(:(?P<port>\d{1,5}))?", re.ASCII)
API_ROUTES = {"v1", "generate", "health", "workers"}  # that a copied URL may have


def server_url(entry: str, *, of: str) -> str:
    """Returns the URL of a server without a slash at the end; scheme and host in lower case.

    Args:
      entry: one URL, such as http://10.0.0.2:30000 or https://[fd00::2]/sglang.
      of: the setting, or the line of a file, that names it.

    Raises:
      UserError: for an entry that no request can go to. A password in it is not shown.
    """
    text = entry.strip()
    if fault := _find_fault(text):
        shown = re.sub(r"\?.*", "?...", re.sub(r"(^|://).*@", r"\1...@", text))
        raise UserError(f"{of} names the server {shown!r}, which {fault}")
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _find_fault(text: str) -> str:
    """Names the first fault of an address and its remedy; "" if it is valid."""
    if text.startswith(BOM):
        return "begins with a byte order mark; save the file as UTF-8 without one"
    if not text.isascii() or not text.isprintable():
        return "has characters other than printable ASCII; write its ASCII form"
    if not text or text[0] in "[{('\"`":
        return "is no bare URL (JSON or quotes around it); write http://HOST:PORT"
    if re.search(r"[\s,;|]", text):
        return "is more than one word; write one URL an entry"
    if "://" not in text:
        return "has no scheme; write http://HOST:PORT (an IPv6 address in [])"
    scheme, _, rest = text.partition("://")
    authority, _, path = rest.partition("/")
    if scheme.lower() not in ("http", "https"):
        return "has a scheme other than http and https; name the server's HTTP port"
    if "@" in rest:
        return "has a user or password, which is logged; put a key into fleet.api_key_file"
    if re.search(r"[?#\\<>\"'{}^`]", rest):
        return "has a query, a fragment or a character that no URL has; write http://HOST:PORT"
    if authority.count(":") > 1 and "[" not in authority:
        return "is an IPv6 address without brackets; write http://[ADDRESS]:PORT"
    match = AUTHORITY.fullmatch(authority)
    if not match or not _is_host(**match.groupdict()):
        return "has no valid host and port; write http://HOST:PORT"
    if API_ROUTES & {*path.split("/")}:
        return "has a route of the server; leave the route out"
    return ""


def _is_host(ipv6: str | None, host: str | None, port: str | None) -> bool:
    """False for a port outside 1..65535 and a malformed IP address, such as 10.0.0.256."""
    try:
        if ipv6:
            ipaddress.IPv6Address(ipv6)
        elif host and not host.strip("0123456789."):
            ipaddress.IPv4Address(host)
    except ValueError:
        return False
    labels = (host or "-").removesuffix(".").split(".")
    named = all(0 < len(label) < 64 and not label.startswith("-") for label in labels)
    return bool(ipv6 or named) and (port is None or 0 < int(port) < 65536)


def read_server_list(path: str, *, of: str) -> list[str]:
    """Reads the URLs of a file: one a line; text after # is a comment.

    Raises:
      FileNotFoundError: if the file does not exist (yet).
      UserError: if it is no text file that can be read, or for a line that names no server.
    """
    try:
        text = epath.Path(path).read_text()
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{of}={path} is no UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{of}={path} can't be read: {error.strerror or error}") from error
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [
        server_url(line, of=f"line {number} of {path} ({of})")
        for number, line in enumerate(lines, 1)
        if line
    ]


def read_api_key(path: str, *, of: str) -> tuple[str, str]:
    """Reads a key from a file of one line.

    No message has the key, nor `path` unless it is a file: it may be the key, given by mistake.

    Returns:
      The key, and a warning if other users of this machine can read the file, else "".

    Raises:
      UserError: if the file is missing, unreadable or empty, or holds more than one word.
    """
    file = epath.Path(path)
    try:
        if not file.exists() or file.is_dir():  # a pipe is fine
            raise UserError(f"{of} names no file; write the key into a file and give its path")
        with file.open("rb") as opened:
            content = opened.read(MAX_KEY_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{of} names a file that can't be read: {reason}") from error
    key = content.strip()
    if not key:
        raise UserError(f"{of}={path} is empty; write the key of --api-key into it")
    if len(content) > MAX_KEY_BYTES or not re.fullmatch(rb"[!-~]+", key):
        raise UserError(
            f"{of}={path} must hold the key alone: one word of printable ASCII, "
            "without a byte order mark"
        )
    mode = os.stat(path).st_mode if is_local(path) else 0
    shared = mode & (stat.S_IRGRP | stat.S_IROTH)
    warning = f"{of}={path} can be read by other users of this machine; chmod 600 it"
    return key.decode(), warning if shared else ""
