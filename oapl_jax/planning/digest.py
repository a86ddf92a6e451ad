"""What kept plans depend on beside their settings: plans of other code are made again."""

import hashlib
import importlib.metadata
import os
from pathlib import Path

from oapl_jax.files import code_digest

PACKAGE = Path(__file__).parent.parent
# What shapes the compiled programs, and what reads them.
SHAPING = (
    *("assemble", "check", "structs", "objectives/*"),
    *("learner/packing", "learner/train_step", "learner/optimizer", "weights/probe"),
    *("model/attention", "model/blockwise_attention", "model/config", "model/layout"),
    *("model/logprobs", "model/rope", "model/sharding", "model/splash", "model/transformer"),
    "planning/*",
)


def code() -> str:
    """A digest of that code, and of the versions and libtpu's flags that it compiles with."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    sources = code_digest(path for name in SHAPING for path in sorted(PACKAGE.glob(f"{name}.py")))
    return hashlib.sha256((" ".join(versions) + flags + sources).encode()).hexdigest()[:12]
