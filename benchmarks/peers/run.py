"""One learner step and one round of sampling, of this package and of others, on the same work.

    make peers
    python benchmarks/peers/run.py [learner sampler] [--rounds=3] [--results=runs/peers]

Contestants take turns, each in its own process with one round of warm-up, since a shared machine
drifts; the medians of the rounds' ratios count. Rounds are added to the results that exist
(learner.json, sampler.json). `work.py` defines the work. A check compares the log-probs of the
batch before and after a step, and a sampler's log-probs of its tokens, with our learner's.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import work

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
# Contestant -> environment and program; the others are compared with the first.
LEARNERS = {
    "oapl_jax": (".venv", "with_oapl_jax.py"),
    "torch by hand": (".venv-trl", "with_torch.py"),
    "google-tunix": (".venv-tunix", "with_tunix.py"),
    "TRL": (".venv-trl", "with_trl.py"),
}
SAMPLERS = {
    "oapl_jax": (".venv", "with_oapl_jax.py"),
    "transformers": (".venv-trl", "with_torch.py"),
    "google-tunix": (".venv-tunix", "with_tunix.py"),
    "SGLang": (".venv", "with_sglang.py"),
}
CLOSE = 1e-3  # nats: of a whole response for learners, of a token for samplers


def run(contestant: tuple[str, str], part: str, **options: Any) -> dict[str, Any]:
    environment, program = contestant
    command = [str(ROOT / environment / "bin/python"), "-Wignore", str(HERE / program), part]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def learner_round(model: str, check: bool) -> dict[str, Any]:
    if check:
        said = {name: run(one, "check", model=model) for name, one in LEARNERS.items()}
        for name, when in itertools.product(said, ("logp_before", "logp_after")):
            gap = np.abs(np.subtract(said[name][when], said["oapl_jax"][when])).max()
            print(f"{name}: {when} of a response is at most {gap:.1e} nats from ours")
            if gap > CLOSE:
                sys.exit(f"the gap is above {CLOSE} nats: the contestants do different work")
    return {name: run(one, "learner", model=model) for name, one in LEARNERS.items()}


def sampler_round(model: str, check: bool) -> dict[str, Any]:
    found = {}
    for name, one in SAMPLERS.items():
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            found[name] = run(one, "sampler", model=model, rollouts=file.name)
            if check:
                gap = run(SAMPLERS["oapl_jax"], "score", model=model, rollouts=file.name)["gap"]
                print(f"{name}: log-probs of tokens are at most {gap:.1e} nats from the learner's")
                if gap > CLOSE:
                    sys.exit(f"the gap is above {CLOSE} nats: the contestants do different work")
    return found


def table(rounds: list[dict[str, Any]], part: str) -> str:
    """Medians over the rounds; the share of the matrix peak is relative to the round's own peak."""
    learns = part == "learner"
    tokens = work.TOKENS if learns else work.RESPONSE_TOKENS
    names = [name for name in rounds[0] if name != "peak"]
    mean = lambda one: float(np.mean(one["seconds"]))
    rows = []
    for name in names:
        times = np.array([mean(found[name]) for found in rounds])
        ours = np.array([mean(found["oapl_jax"]) for found in rounds])
        speed = np.array([found["peak"]["gflops"] for found in rounds]) * times
        shares = [
            np.median(work.gflop(learner=learns, head_on_prompts=nominal) / speed)
            for nominal in (False, True)[: 1 + learns]
        ]
        memory = np.median([found[name]["peak_mb"] for found in rounds])
        rows.append(
            (
                name,
                f"{np.median(times):.1f}",
                f"{tokens / np.median(times):.0f}",
                f"{np.median(times / ours):.2f}",
                f"{memory:.0f}",
                *(f"{share:.3f}" for share in shares),
            )
        )
    columns = ["", "s", "tokens/s", "s / ours", "peak MB", "of matrix peak"]
    columns += ["nominal"] * learns
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["learner", "sampler"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "runs/peers")
    given = parser.parse_args()
    contestants = {**LEARNERS, **SAMPLERS}.values()
    missing = {name for name, _ in contestants if not (ROOT / name / "bin/python").exists()}
    if missing:
        sys.exit(f"{', '.join(sorted(missing))}: not installed; run make peers sglang")
    given.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as model:
        run(LEARNERS["oapl_jax"], "model", model=model)
        for part in given.parts:
            file = given.results / f"{part}.json"
            rounds = json.loads(file.read_text()) if file.exists() else []
            for _ in range(given.rounds):
                one_round = {"learner": learner_round, "sampler": sampler_round}[part]
                peaks = [run(LEARNERS["oapl_jax"], "peak")]
                found = one_round(model, check=not rounds)
                peaks.append(run(LEARNERS["oapl_jax"], "peak"))
                best = {"gflops": float(np.mean([one["gflops"] for one in peaks]))}
                rounds.append({**found, "peak": best})
                file.write_text(json.dumps(rounds, indent=1) + "\n")
            print(f"{part}, {len(rounds)} rounds\n\n{table(rounds, part)}\n")


if __name__ == "__main__":
    main()
