"""What people see of benchmarks: a Markdown table, and the picture of pass@k against k."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from etils import epath

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = Mapping[str, Any]


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, .. up to n, and n itself."""
    return [k for k in (2**i for i in range(n.bit_length())) if k < n] + [n]


def markdown(results: Mapping[str, Result]) -> str:
    """A table with a column for each benchmark, and a sentence on how its numbers came about.

    Args:
      results: by benchmark, of one version and one number of samples (see benchmark.measure).
    """
    first = next(iter(results.values()))
    n, about, bootstrap = first["samples"], first["about"], first["bootstrap"]
    rows = [(f"pass@{k}", _at(k), "{:.3f}") for k in powers_of_two(n)]
    rows += [
        (f"avg@{n}", lambda r: r["avg@n"], "{:.3f}"),
        (f"maj@{n}", lambda r: r["maj@n"], "{:.3f}"),
        ("tokens of a response", lambda r: r["length"], "{:.1f}"),
        ("cut off", lambda r: r["truncated"], "{:.3f}"),
        ("entropy, nats a token", lambda r: r["entropy"], "{:.3f}"),
    ]
    lines = [["", *results], ["---", *("---:" for _ in results)]]
    for name, pick, form in rows:
        lines.append([name, *(_cell(pick(result), form) for result in results.values())])
    for name, pick in (
        ("problems", lambda r: r["problems"]),
        ("left out, too long", lambda r: r["left_out"]),
        ("samples of each", lambda r: r["samples"]),
        ("verdicts", _verdicts),
        ("seconds of sampling", lambda r: round(r["seconds"]["sampling"])),
        ("seconds of grading", lambda r: round(r["seconds"]["grading"])),
    ):
        lines.append([name, *(str(pick(result)) for result in results.values())])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sentence = (
        f"Version {about['version']} (weights {about['weights'][:12]}), "
        f"sampler {about['sampler']}, temperature {about['temperature']:g}, "
        f"top_p {about['top_p']:g}, top_k {about['top_k']}, at most "
        f"{about['max_response_tokens']} tokens. In brackets: 95 % intervals by bootstrap over "
        f"problems, {bootstrap['resamples']} resamples."
    )
    return f"{table}\n\n{sentence}\n"


def draw(panels: Mapping[str, Mapping[str, Result]], path: epath.Path, *, title: str = "") -> None:
    """Draws pass@k against k, with 95 % intervals as bands.

    Args:
      panels: by benchmark, the results that share a panel, by label; a single one needs none.
      path: the PNG to write.
      title: of the picture.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.2 + 4.4 * columns, 0.6 + 3.6 * rows), squeeze=False, sharey=True
    )
    for axis, (name, results) in zip(axes.flat, panels.items(), strict=False):
        for color, (label, result) in enumerate(results.items()):
            curve, k = result["pass@k"], np.arange(1, result["samples"] + 1)
            marked = np.array(powers_of_two(result["samples"])) - 1
            style = {"color": f"C{color}", "markevery": marked.tolist()}
            axis.plot(k, curve["value"], "o-", markersize=4, label=label, **style)
            axis.fill_between(k, curve["low"], curve["high"], color=f"C{color}", alpha=0.2, lw=0)
        longest = max(result["samples"] for result in results.values())
        ticks = [2**i for i in range(longest.bit_length())]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(title=name, xlabel="k", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        if len(results) > 1:
            axis.legend(loc="lower right", fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("pass@k")
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _verdicts(result: Result) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in result["verdicts"].items()) or "-"


def _at(k: int):
    return lambda result: {part: values[k - 1] for part, values in result["pass@k"].items()}


def _cell(measured: Mapping[str, float], form: str) -> str:
    value, low, high = (form.format(measured[part]) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
