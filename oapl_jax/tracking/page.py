"""The run report as one HTML file that needs no network.

Charts are drawn by Plotly's basic bundle, which lies in assets/ beside its license. A
Content-Security-Policy admits the page's own scripts by their hashes and, but for `live`, no
connection; texts that a model wrote are never taken for HTML.
"""

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

ASSETS = resources.files("oapl_jax.tracking") / "assets"
NOWHERE, OWN_SERVER = "'none'", "'self'"
SCRIPTS = ("plotly-basic.min.js", "report.js")


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encodes a JSON header and arrays, compressed by gzip.

    The content is the header's length in bytes (uint32), the header, padded by spaces to a multiple
    of 4 bytes, and the arrays end to end, each padded likewise. The header's "arrays" lists name,
    dtype and length of each. All numbers are little-endian.
    """
    table = [[name, str(array.dtype), len(array)] for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": table}, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    bodies = [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays.values()]
    padded = [body + bytes(-len(body) % 4) for body in bodies]
    content = b"".join([np.uint32(len(text)).astype("<u4").tobytes(), text, *padded])
    return gzip.compress(content, compresslevel=6)


def page(data: bytes | None) -> str:
    """The HTML page of packed `data`; with None one that fetches it from its server, repeatedly."""
    scripts = {name: _asset(name) for name in SCRIPTS}
    hashes = (hashlib.sha256(text.encode()).digest() for text in scripts.values())
    allowed = " ".join(f"'sha256-{base64.b64encode(h).decode()}'" for h in hashes)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src {NOWHERE if data is not None else OWN_SERVER}"
    )
    html = _asset("report.html")
    for name, text in {
        "POLICY": policy,
        "STYLE": _asset("report.css"),
        "DATA": base64.b64encode(data).decode() if data is not None else "",
        "PLOTLY": scripts[SCRIPTS[0]],
        "SCRIPT": scripts[SCRIPTS[1]],
    }.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html


@functools.cache
def _asset(name: str) -> str:
    text = (ASSETS / name).read_text(encoding="utf-8")
    # An inline script ends at its first "</script", and its hash is of the text between the tags.
    assert "</script" not in text or not name.endswith(".js"), name
    return text
