"""Manifest of a point: everything that its result depends on, and what became of it.

ROOT/manifests/IDENTITY.json has the settings and the resolved configuration, the commit and a
digest of the code, versions of the packages, seeds, checksums of the data sets, times, restarts,
the histogram of lags, and the outcome. A point whose manifest or result is of another configuration
or code than today's is stale: it is shown, and neither resumed nor averaged with others.
"""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import oapl_jax
from experiments.sweep import Point, Results
from oapl_jax.files import checksum, code_digest, write_atomically

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "transformers")
Manifest = dict[str, Any]


@functools.cache
def checkout() -> Manifest:
    """Commit, digest of the code and versions of the packages of this process."""
    here = map(Path(__file__).with_name, ("sweep.py", "execute.py"))
    package = sorted(Path(oapl_jax.__file__).parent.rglob("*.py"))
    there = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in there}
    return {
        "code": code_digest([*package, *here])[:12],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), **versions},
    }


def git(*words: str) -> str:
    """Output of a git command in this checkout; "" outside of one."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if not done.returncode else ""


def data_checksums(data_dir: str) -> dict[str, dict[str, str]]:
    """XXH3 of the files of each prepared data set below a data_dir."""
    sets = sorted(epath.Path(data_dir).glob("*/*/*/dataset_info.json"))
    return {
        path.parent.parent.name: {
            file.name: checksum(file) for file in sorted(path.parent.iterdir())
        }
        for path in sets
    }


def lag_histogram(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Rollouts by the lag at which they were trained on, over the lines of a metrics.jsonl."""
    counts: dict[int, int] = {}
    for line in lines:
        for lag, count in line.get("lag/histogram", {}).items():
            counts[int(lag)] = counts.get(int(lag), 0) + count
    return {str(lag): counts[lag] for lag in sorted(counts)}


class Manifests:
    """The manifests below a root, compared with today's configuration and code."""

    def __init__(self, root: epath.Path):
        self._root, self._now = root, checkout()

    def read(self, point: Point) -> Manifest | None:
        path = self._path(point)
        return json.loads(path.read_text()) if path.exists() else None

    def outcome(self, point: Point) -> str:
        """The outcome in the manifest, of today's code or another; "" without one."""
        return (self.read(point) or {"outcome": ""})["outcome"]

    def begin(self, point: Point, *, fresh: bool) -> None:
        """Writes the manifest of a point that starts, or counts its restart.

        `fresh` removes what another configuration or code left in its workdir. A workdir that
        another point has filled by today's code, with the same training and another grading, stays.
        """
        found = self.read(point)
        workdir = os.fspath(point.workdir(self._root))
        if fresh:
            point.outcome(self._root).unlink(missing_ok=True)
            old = {workdir, found["workdir"] if found else workdir}
            for directory in old - self._current_workdirs(point):
                epath.Path(directory).rmtree(missing_ok=True)
            found = None
        config = point.resolve(self._root).to_dict()
        manifest = {
            "key": point.key,
            "workdir": workdir,
            "settings": point.settings,
            "config": config,
            "seeds": {"seed": config["seed"], "data.seed": config["data"].get("seed", 0)},
            **self._now,
            "data": {},
            "lags": {},
            "started": found["started"] if found else now(),
            "ended": None,
            "restarts": found["restarts"] + 1 if found else 0,
            "outcome": "unfinished",
        }
        self._write(point, manifest)

    def end(self, point: Point, outcome: str, **measured: Any) -> None:
        """Adds the end of a point; `measured` has "data", "lags" or a "reason"."""
        found = self.read(point) or {}
        self._write(point, {**found, **measured, "ended": now(), "outcome": outcome})

    def state(self, point: Point, results: Results) -> str:
        """ "ended", "failed", "broken", "unfinished", "missing", or "stale: " and what changed."""
        if (line := results.line(point)) is not None:
            return line["outcome"]
        if changed := results.stale(point):
            return f"stale: {changed}"
        found = self.read(point)
        if found is None:
            return "missing"
        changed = self._changed(point, found)
        return f"stale: {changed}" if changed else found["outcome"]

    def _current_workdirs(self, point: Point) -> set[str]:
        """Workdirs of other points that started under today's code."""
        paths = set((self._root / "manifests").glob("*.json")) - {self._path(point)}
        found = [json.loads(path.read_text()) for path in paths]
        return {manifest["workdir"] for manifest in found if manifest["code"] == self._now["code"]}

    def _changed(self, point: Point, found: Manifest) -> str:
        if found["key"] != point.key:
            return "configuration"
        return "code" if found["code"] != self._now["code"] else ""

    def _path(self, point: Point) -> epath.Path:
        return self._root / "manifests" / f"{point.identity}.json"

    def _write(self, point: Point, manifest: Manifest) -> None:
        path = self._path(point)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [f"{json.dumps(manifest, indent=1)}\n".encode()])


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
