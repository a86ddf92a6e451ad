"""Paired comparison of two results on the same problems.

    python -m oapl_jax.evaluate --compare=A/result.json,B/result.json [--to=DIR]

The difference is B - A, with a bootstrap interval over problems and the p-value of a two-sided
sign-flip test (estimators.py). Results that were not sampled alike are refused.
"""

import argparse
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.evaluation import report
from oapl_jax.evaluation.benchmark import FORMAT
from oapl_jax.evaluation.estimators import intervals, pass_curve, sign_flip_test
from oapl_jax.files import flag_directory, read_json, write_atomically
from oapl_jax.rollout.dataset import differences

SAMPLING = ("temperature", "top_p", "top_k", "max_response_tokens")
Result = Mapping[str, Any]


def read_result(path: epath.Path) -> dict[str, Any]:
    """Reads a result.json; raises a UserError if it is none, or of another format."""
    found = read_json(path, ["format"], remedy="name the result.json of a benchmark")["format"]
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, not {FORMAT!r}; evaluate again")
    return json.loads(path.read_text())


def compare(a: Result, b: Result, *, resamples: int, seed: int) -> dict[str, Any]:
    """Compares B with A over the same problems; both are results of `benchmark.measure`.

    The bootstrap has `resamples`, the sign-flip test at most so many sign vectors.

    Returns:
      JSON-able: "pass@k" with lists "a", "b", "value" (B - A), "low", "high" and "p" for k = 1 ..
      n; "maj@n" with the same of one number; "better", "worse" and "equal" numbers of problems.

    Raises:
      UserError: for different problems, reference answers, sampling or numbers of samples.
    """
    check_pair(a, b)
    order = {problem["id"]: problem for problem in b["per_problem"]}
    pairs = [(mine, order[mine["id"]]) for mine in a["per_problem"]]
    n = a["samples"]

    def tested(of_a: np.ndarray, of_b: np.ndarray) -> dict[str, list[float]]:
        difference = of_b - of_a
        ones = np.ones((len(difference), 1))
        low, high = intervals(difference, ones, resamples=resamples, seed=seed)
        p = sign_flip_test(difference, flips=resamples, seed=seed)
        means = {"a": of_a.mean(axis=0), "b": of_b.mean(axis=0), "value": difference.mean(axis=0)}
        found = {**means, "low": low, "high": high, "p": p}
        return {name: values.tolist() for name, values in found.items()}

    curves = [np.array([pass_curve(n, p[side]["correct"]) for p in pairs]) for side in (0, 1)]
    votes = [np.array([[p[side]["majority"]] for p in pairs]) for side in (0, 1)]
    gained = [theirs["correct"] - mine["correct"] for mine, theirs in pairs]
    return {
        "benchmark": a["about"]["benchmark"],
        "versions": [a["about"]["version"], b["about"]["version"]],
        "weights": [a["about"]["weights"], b["about"]["weights"]],
        "problems": len(pairs),
        "samples": n,
        "pass@k": tested(*curves),
        "maj@n": _column(tested(*votes), 0),
        "better": sum(g > 0 for g in gained),
        "worse": sum(g < 0 for g in gained),
        "equal": sum(g == 0 for g in gained),
        "same_grader": all(a["graded"][k] == b["graded"][k] for k in ("grader", "libraries")),
        "resamples": resamples,
        "seed": seed,
    }


def check_pair(a: Result, b: Result) -> None:
    """Raises a UserError unless problems, reference answers, sampling and n are the same."""
    ids = [{problem["id"] for problem in result["per_problem"]} for result in (a, b)]
    only = [sorted(ids[0] - ids[1]), sorted(ids[1] - ids[0])]
    wrong = [
        f"{len(missing)} problems only in {name}, such as {missing[0]}"
        for name, missing in zip("AB", only, strict=True)
        if missing
    ]
    if not wrong and a["graded"]["answers"] != b["graded"]["answers"]:
        wrong.append("other reference answers")
    sampling = differences(b["about"], a["about"], SAMPLING)
    wrong += [sampling] if sampling else []
    if a["samples"] != b["samples"]:
        wrong.append(f"samples: {a['samples']} -> {b['samples']}")
    if wrong:
        raise UserError(
            f"the two results can't be compared ({'; '.join(wrong)}); evaluate both on the same "
            "benchmark with the same sampling and --n"
        )


def table(compared: Mapping[str, Any]) -> str:
    """Formats a comparison in Markdown, a row for each k that is a power of two."""
    lines = ["| | A | B | B - A | 95 % interval | p |", "|---|---:|---:|---:|---:|---:|"]
    n = compared["samples"]
    rows = {f"pass@{k}": _column(compared["pass@k"], k - 1) for k in report.powers_of_two(n)}
    rows[f"maj@{n}"] = compared["maj@n"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['a']:.3f} | {row['b']:.3f} | {row['value']:+.3f} "
            f"| [{row['low']:+.3f}, {row['high']:+.3f}] | {row['p']:.4f} |"
        )
    lines += [
        "",
        f"{compared['benchmark']}: {compared['problems']} problems, {n} samples of each; B is "
        f"better on {compared['better']}, worse on {compared['worse']}, equal on "
        f"{compared['equal']}.",
    ]
    if not compared["same_grader"]:
        lines.append("The two were graded by different sources or libraries: grade both again.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("oapl_jax.evaluate", description="Compares two results")
    parser.add_argument("--compare", required=True, help="A.json,B.json; the difference is B - A")
    to = functools.partial(flag_directory, "to")
    parser.add_argument("--to", type=to, help="directory for comparison.json and .png")
    parser.add_argument("--resamples", type=int, default=20_000, help="of bootstrap and test")
    parser.add_argument("--seed", type=int, default=0, help="of both")
    arguments = parser.parse_args()
    paths = arguments.compare.split(",")
    if len(paths) != 2 or arguments.resamples < 1:
        raise UserError("--compare takes two files, A.json,B.json, and --resamples at least 1")
    a, b = (read_result(epath.Path(path)) for path in paths)
    compared = compare(a, b, resamples=arguments.resamples, seed=arguments.seed)
    print(table(compared))
    if arguments.to:
        arguments.to.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.to / "comparison.json", [json.dumps(compared).encode()])
        before, after = compared["versions"]
        panel = {f"A: version {before}": a, f"B: version {after}": b}
        report.plot({compared["benchmark"]: panel}, arguments.to / "comparison.png")
    print(json.dumps(compared))


def _column(curves: Mapping[str, list[float]], index: int) -> dict[str, float]:
    return {name: values[index] for name, values in curves.items()}
