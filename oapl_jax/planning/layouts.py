"""Layouts of a run on a slice (mesh, remat policy, micro-batches), and a resumable sweep."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from oapl_jax.files import code_digest, write_atomically
from oapl_jax.model.config import ModelConfig

PACKAGE = Path(__file__).parent.parent
# Sources that shape the compiled programs or read them.
SOURCES = (
    *("plan", "planning/*", "structs", "objectives/*", "model/*", "learner/*", "weights/probe"),
    *("rollout/decoding", "rollout/local_sampler", "rollout/token_sampling"),
)
BLOCK = 512  # tokens of a row that attention takes at a time; a device has a multiple of it
SIZES = (1, 2, 4, 8)  # of the mesh axes besides fsdp
Mesh = dict[str, int]
Plan = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    mesh: Mesh
    remat: str
    micro_batches: int

    def row_length(self, shortest: int) -> int:
        """`shortest` rounded up, so that each chip that shares a row has whole blocks."""
        return shortest + -shortest % (BLOCK * self.mesh["context"])

    def __str__(self) -> str:
        mesh = " ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        return f"{mesh or 'one chip'}, remat {self.remat}, {self.micro_batches} micro-batches"


def meshes(sequences: int, model: ModelConfig, chips: int) -> list[Mesh]:
    """Meshes of all chips that divide the sequences of a step and the model, largest fsdp first."""
    found = []
    for data, tensor, context in itertools.product(SIZES, repeat=3):
        fsdp, rest = divmod(chips, data * tensor * context)
        divides = not rest and fsdp and not sequences % (data * fsdp)
        if divides and not model.num_kv_heads % tensor and not model.hidden_size % fsdp:
            found.append(dict(data=data, fsdp=fsdp, context=context, tensor=tensor))
    return sorted(found, key=lambda mesh: chips // mesh["fsdp"])


def layouts_of(sequences: int, mesh: Mesh, remat: str) -> list[Layout]:
    """Layouts by number of micro-batches: more of them take less memory and move more weights."""
    rows, rest = divmod(sequences, mesh["data"] * mesh["fsdp"])
    splits = [m for m in range(1, rows + 1) if not rows % m]
    return [] if rest else [Layout(mesh, remat, m) for m in splits]


def sweep(
    meshes: Sequence[Mesh],
    remats: Sequence[str],
    family: Callable[[Mesh, str], list[Layout]],
    plan: Callable[[Layout], Plan],
    *,
    enough: int,
) -> list[tuple[Layout, Plan]]:
    """Finds layouts that fit, and returns the fastest first.

    Tries the meshes in order with the first remat policy until `enough` fit, then the fastest mesh
    with the other policies (unless `enough` is 1). If no mesh fits, tries all of them with the
    other policies. Of a family of layouts, the first that fits is taken.
    """
    seconds = lambda pair: pair[1]["roofline"]["seconds"]
    found = []

    def try_families(remats: Sequence[str], meshes: Sequence[Mesh], enough: int) -> None:
        for layouts in (family(mesh, remat) for remat in remats for mesh in meshes):
            if len(found) >= enough:
                break
            for layout in layouts:
                result = plan(layout)
                if result["fits"]:
                    found.append((layout, result))
                if result["chip_fits"]:
                    break  # more micro-batches do not help a host that is too small

    try_families(remats[:1], meshes, enough)
    if not found:
        try_families(remats[1:], meshes, enough)
    elif enough > 1:
        best = min(found, key=seconds)[0].mesh
        try_families(remats[1:], [best], len(found) + enough - 1)
    return sorted(found, key=seconds)


def plan_digest() -> str:
    """Digest of the code, library versions and compiler flags that kept plans depend on."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    sources = code_digest(path for name in SOURCES for path in sorted(PACKAGE.glob(f"{name}.py")))
    return hashlib.sha256((" ".join(versions) + flags + sources).encode()).hexdigest()[:12]


def kept_plan(path: epath.Path, key: str, make: Callable[[], Plan]) -> Plan:
    """The plan under this key of a JSON file; made and written there if it is missing."""
    plans: dict[str, Plan] = json.loads(path.read_text()) if path.exists() else {}
    if key not in plans:
        plans[key] = make()
        write_atomically(path, [f"{json.dumps(plans, indent=1)}\n".encode()])
    return plans[key]
