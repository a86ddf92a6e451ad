"""Properties that must hold after a soak: rows of a table, with the figures found."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from places import running
from scene import Scene
from server_processes import ROOT
from small_models import forward

from oapl_jax.model import hf
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.structs import Group

CLOSE = 1e-3  # nats between a server's log-probs and the learner's, fleet.probe_tolerance
VERSIONS, GROUPS = 20, 8  # versions whose log-probs are computed again; groups of each
LENGTH = 32  # tokens of the longest prompt and response, and more
END_DEADLINE = 30.0  # seconds for processes to end after the last one that was waited for
RISE = 32.0, 4.0  # MB and handles that a third of the undisturbed time may add


class Row(NamedTuple):
    property: str
    found: str
    holds: bool


def ends(scene: Scene) -> Iterator[Row]:
    """Every end of every part was a kill, a full disk's sentence, or asked for."""
    for part in scene.parts:
        how = ", ".join(f"{count} {end}" for end, count in sorted(part.ended.items()))
        found = "; ".join([f"{part.starts} starts: {how or 'no end'}", *part.faults])
        yield Row(f"ends of the {part.name}", found, not part.faults)
    yield Row("nothing else went wrong", "; ".join(scene.wrong) or "nothing", not scene.wrong)


def ledger(scene: Scene) -> Row:
    """`oapl_jax.report` finds the sums of rollouts balanced."""
    command = [sys.executable, "-m", "oapl_jax.report", "--json", str(scene.workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if not done.stdout:
        return Row("ledger balanced", done.stderr[-300:], False)
    report = json.loads(done.stdout)
    states = ", ".join(f"{count} {state}" for state, count in report["balance"].items() if count)
    found = f"{report['requested']} rollouts: {states}"
    return Row("ledger balanced", found, report["balanced"] and not done.returncode)


def groups(scene: Scene) -> Row:
    """Every recorded group is of one version: log-probs of that version's weights are its own."""
    dataset = Dataset(epath.Path(scene.workdir / "rollouts"))
    copies = {
        int(version): scene.copies / f"{version}-{digest}"
        for version, digest in dataset.manifest["weights"].items()
    }
    copies = {version: path for version, path in copies.items() if path.exists()}
    by_version: dict[int, list[Group]] = {}
    total = 0
    for group in dataset:
        total += 1
        by_version.setdefault(group.policy_version, []).append(group)
    chosen = sorted(copies.keys() & by_version)
    chosen = chosen[:: max(1, len(chosen) // VERSIONS)]
    gaps = []
    for version in chosen:
        config = hf.load_config(copies[version])
        params = hf.load_params(copies[version], config)
        gaps += [gap(group, config, params) for group in by_version[version][:GROUPS]]
    found = (
        f"{total} groups of {len(by_version)} versions; of {len(gaps)} groups of {len(chosen)} "
        f"versions the log-probs differ by {max(gaps, default=float('nan')):.1e} nats at most"
    )
    return Row("every group of one version", found, bool(gaps) and max(gaps) < CLOSE)


def gap(group: Group, config: Any, params: Any) -> float:
    """Largest difference between the log-probs of a group and those of weights, in nats."""
    rows = np.zeros((len(group.rollouts), LENGTH), np.int32)
    start = len(group.prompt.tokens)
    for row, rollout in zip(rows, group.rollouts, strict=True):
        whole = np.concatenate([group.prompt.tokens, rollout.tokens])
        row[: len(whole)] = whole
    table = np.asarray(jax.nn.log_softmax(forward(config, params, rows)))
    differences = []
    for scores, rollout in zip(table, group.rollouts, strict=True):
        at = np.arange(start - 1, start - 1 + len(rollout.tokens))
        differences.append(np.abs(scores[at, rollout.tokens] - rollout.behavior_logp).max())
    return float(max(differences))


def rounds(scene: Scene) -> Row:
    """Runs without overlap that were killed and resumed have an unbroken run's metrics."""
    count, resumes = scene.counts["rounds"], scene.counts["resumes in rounds"]
    found = f"{count} runs, resumed {resumes} times"
    differing = any(wrong.startswith("a round") for wrong in scene.wrong)
    return Row("metrics as of an unbroken run", found, count > 0 and resumes > 0 and not differing)


def evaluations(scene: Scene) -> Row:
    count = scene.counts["evaluations"]
    return Row("evaluations beside the run", f"{count} ended with a result", count > 0)


def levels(scene: Scene, since: float) -> Iterator[Row]:
    """Memory and handles of the undisturbed time do not rise."""
    for part in (scene.trainer, *scene.servers, scene.router):
        rise = scene.levels.rise(part.name, since)
        found = (
            "it did not run all the time" if rise is None else "{:+.1f} MB, {:+.1f}".format(*rise)
        )
        holds = rise is not None and all(a <= b for a, b in zip(rise, RISE, strict=True))
        yield Row(f"memory and file handles of the {part.name} level", found, holds)


def tidy(scene: Scene) -> Row:
    """The stopped run leaves the files of an unbroken one, what libraries said of faults (log.txt)
    and the checkpoints that it keeps."""
    workdir = scene.workdir
    strange = {path.name for path in workdir.iterdir()}
    strange -= {"log.txt"} | {path.name for path in scene.unbroken.iterdir()}
    temporary = re.compile(r"[.](tmp|writing|repair)$|orbax-checkpoint-tmp")
    strange |= {path.name for path in workdir.rglob("*") if temporary.search(path.name)}
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    states = {path.name for path in (workdir / "host_states").iterdir()}
    kept = f"{len(steps)} checkpoints, {len(scene.versions())} versions"
    found = f"{kept}; left over: {', '.join(sorted(strange)) or 'nothing'}"
    whole = steps <= states and len(states) <= len(steps) + 1  # the next save deletes one more
    return Row("workdir tidy", found, not strange and whole and len(steps) <= 3)


def nothing_runs() -> Row:
    """The process namespace holds no other process, END_DEADLINE seconds after the stop."""
    until = time.monotonic() + END_DEADLINE
    while (left := running()) and time.monotonic() < until:
        time.sleep(0.5)
    found = "; ".join(f"{pid} {command[:100]}" for pid, command in left.items())
    return Row("nothing left running", found or "nothing", not left)
