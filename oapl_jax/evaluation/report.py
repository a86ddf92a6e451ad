"""Report of benchmarks: a Markdown table, and a plot of pass@k against k."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

Result = Mapping[str, Any]


def powers_of_two(n: int) -> list[int]:
    """Lists 1, 2, 4, .. below n, and n itself."""
    return [k for k in (2**i for i in range(n.bit_length())) if k < n] + [n]


def markdown(results: Mapping[str, Result]) -> str:
    """Formats a table with a column for each benchmark, and a sentence on sampling and intervals.

    The results are of one version and one number of samples (see benchmark.measure).
    """
    first = next(iter(results.values()))
    n, about, bootstrap = first["samples"], first["about"], first["bootstrap"]
    rows: dict[str, Callable[[Result], str]] = {
        f"pass@{k}": lambda r, k=k: _cell({part: v[k - 1] for part, v in r["pass@k"].items()})
        for k in powers_of_two(n)
    } | {
        f"avg@{n}": lambda r: _cell(r["avg@n"]),
        f"maj@{n}": lambda r: _cell(r["maj@n"]),
        "tokens of a response": lambda r: _cell(r["length"], "{:.1f}"),
        "truncated": lambda r: _cell(r["truncated"]),
        "entropy, nats a token": lambda r: _cell(r["entropy"]),
        "problems": lambda r: str(r["problems"]),
        "dropped, too long": lambda r: str(r["left_out"]),
        "samples of each": lambda r: str(r["samples"]),
        "verdicts": lambda r: ", ".join(f"{k} {v:g}" for k, v in r["verdicts"].items()) or "-",
        "seconds of sampling": lambda r: str(round(r["seconds"]["sampling"])),
        "seconds of grading": lambda r: str(round(r["seconds"]["grading"])),
    }
    lines = [["", *results], ["---", *("---:" for _ in results)]]
    lines += [[name, *map(cell, results.values())] for name, cell in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sentence = (
        f"Version {about['version']} (weights {about['weights'][:12]}), "
        f"sampler {about['sampler']}, temperature {about['temperature']:g}, "
        f"top_p {about['top_p']:g}, top_k {about['top_k']}, at most "
        f"{about['max_response_tokens']} tokens. In brackets: 95 % intervals by bootstrap over "
        f"problems, {bootstrap['resamples']} resamples."
    )
    return f"{table}\n\n{sentence}\n"


def plot(panels: Mapping[str, Mapping[str, Result]], path: epath.Path, *, title: str = "") -> None:
    """Plots pass@k against k, with 95 % intervals as bands, as a PNG.

    `panels` are benchmark -> label -> result; a single result needs no label.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 4.4 * columns, 0.6 + 3.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
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


def _cell(measured: Mapping[str, float], form: str = "{:.3f}") -> str:
    value, low, high = (form.format(measured[part]) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
