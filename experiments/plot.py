"""The pictures of docs/comparison.md, and the page itself.

    python -m experiments.plot [--root=runs/comparison] [--to=docs] [--quick]

draws what the results file holds by now. The commands of the comparison do so at their end.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from etils import epath

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import tables
from experiments.arms import Plan
from experiments.findings import LEVELS, Cell, Spread, difference
from experiments.grid import RESULTS, Grid, as_line, read_arguments
from experiments.objectives import FULL, QUICK
from experiments.page import by_hand, page
from oapl_jax.errors import exit_with_code
from oapl_jax.tracking.progress import say

DIRECTORY = "comparison"  # of the pictures, beside comparison.md
COLORS = (*(f"C{i}" for i in range(7)), "black")  # of the core


def render(grid: Grid, to: epath.Path, quick: bool) -> None:
    """Writes comparison.md, keeping what is by hand, the pictures for which there are results, and
    beside them the lines of all runs."""
    plan = QUICK if quick else FULL
    (to / DIRECTORY).mkdir(parents=True, exist_ok=True)
    pictures = draw(grid, plan, to / DIRECTORY)
    file = to / "comparison.md"
    conclusions = by_hand(file.read_text()) if file.exists() else ""
    file.write_text(page(grid, plan, pictures, conclusions))
    (to / DIRECTORY / RESULTS).write_text("".join(map(as_line, tables.behind(grid, plan))))
    say(f"written: {file}")


def draw(grid: Grid, plan: Plan, to: epath.Path) -> dict[str, str]:
    """Draws what can be drawn; captions by file name, as seen from beside the directory."""
    found = tables.collect(grid, plan)
    live = {arm: methods for arm, methods in found.items() if arm.source == "live"}
    surfaces = tables.surfaces(grid, plan)
    by_lag = {title: cells for title, (t, cells) in surfaces.items() if math.isfinite(t.lag)}
    n, captions = len(plan.seeds), {}

    def save(name: str, figure, caption: str) -> None:
        with (to / name).open("wb") as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        captions[f"{to.name}/{name}"] = caption

    means = f"Means of {n} seeds"
    others = " Gray: the other methods." if plan.rest else ""
    whiskers = f"{means}; the differences with 95 % intervals"
    if found:
        save(
            "methods.png",
            methods(found, plan),
            f"pass@1 of every method minus that of oapl, by the {n} seeds, with 95 % intervals.",
        )
    if live:
        gaps = "; no entropy where a run failed" if without(live, plan) else ""
        caption = f"Live, by lag, at each method's choice. {whiskers}{gaps}.{others}"
        save("lags.png", lags(live, plan), caption)
        save("pass_at_k.png", passes(live, plan), f"pass@k by lag, test split. {means}.")
        save(
            "generations.png",
            generations(live, plan),
            f"pass@1 on the validation split by rollouts sampled. {means}{without(live, plan)}. "
            f"Dashed: {' and '.join(map(str, LEVELS.values()))}.",
        )
    if by_lag:
        seeds = len(next(iter(next(iter(by_lag.values())).values()))["0.001"].lines)
        save(
            "rates.png",
            rates(by_lag),
            f"pass@1 on the test split by learning rate. Means of {seeds} seeds; bars reach from "
            "the smallest to the largest.",
        )
    if drifting := {title: by_lag[title] for title in by_lag if surfaces[title][0].lag > 1}:
        save(
            "drift.png",
            drifts(drifting),
            "KL(pi_lag || pi), nats a token, in every eighth step at a learning rate of 0.001; one "
            "run (the first seed) each. It falls with the learning rate, too.",
        )
    return captions


def methods(found: tables.Arms, plan: Plan):
    """Every method's differences to OAPL's pass@1, a panel for each arm."""
    names = [name for name in (*plan.core, *plan.rest) if name != tables.OURS]
    size = 1.7 * len(found) + 1.5, 0.22 * len(names) + 1.2
    figure, panels = plt.subplots(
        1, len(found), figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for panel, (arm, of) in zip(panels[0], found.items(), strict=True):
        for row, name in enumerate(names):
            if name in of and tables.OURS in of:
                mean, *ends = difference(of[name][1], of[tables.OURS][1], "pass@1")
                panel.plot(ends, [row, row], color="0.3", linewidth=1)
                panel.plot(mean, row, color="0.3", marker=".")
        panel.axvline(0, color="C0")
        panel.set_title(arm.name.replace(", ", ",\n"), fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    panels[0][0].set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    panels[0][0].set_yticklabels(names, fontsize=8)
    figure.set_layout_engine("constrained")
    return figure


def lags(live: tables.Arms, plan: Plan):
    """pass@1 and entropy against the lag, and between them the differences to OAPL's pass@1."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    for panel, measure in zip(panels[::2], ("pass@1", "entropy"), strict=True):
        for name in (*plan.rest, *plan.core):
            means = {a.lag: of[name][1].mean(measure) for a, of in live.items() if name in of}
            label = name if name in plan.core else "_"  # without a place in the legend
            panel.plot([*means], [*means.values()], label=label, marker=".", **_style(name, plan))
        panel.set(title=f"{measure}, test split")
    for place, name in enumerate(plan.core[1:]):
        aside = 1.05 ** (place - len(plan.core) / 2)  # so that whiskers are not upon each other
        points: dict[float, Spread] = {
            arm.lag * aside: difference(of[name][1], of[tables.OURS][1], "pass@1")
            for arm, of in live.items()
            if name in of and tables.OURS in of
        }
        with_whiskers(panels[1], points, name, _style(name, plan))
    panels[1].axhline(0, color="C0")
    panels[1].set(title="pass@1 minus that of oapl, by seeds")
    for panel in panels:
        panel.set(xlabel="lag L (steps of a window)")
        powers_of_two(panel, [arm.lag for arm in live])
    return finish(figure, panels[0])


def passes(live: tables.Arms, plan: Plan):
    """pass@k against k, a panel for each lag."""
    figure, panels = plt.subplots(1, len(live), figsize=_row(live), squeeze=False)
    for panel, (arm, methods) in zip(panels[0], live.items(), strict=True):
        for name in plan.core:
            if name in methods:
                means = [methods[name][1].mean(f"pass@{k}") for k in (1, 8, 64)]
                panel.plot([1, 8, 64], means, label=name, marker=".", **_style(name, plan))
        panel.set(xlabel="k", title=arm.name)
        powers_of_two(panel, [1, 8, 64])
    return finish(figure, panels[0][0])


def generations(live: tables.Arms, plan: Plan):
    """pass@1 on the validation split against rollouts sampled, a panel for each lag."""
    figure, panels = plt.subplots(1, len(live), figsize=_row(live), squeeze=False)
    for panel, (arm, methods) in zip(panels[0], live.items(), strict=True):
        for name in plan.core:
            ended = _ended(methods[name][1]) if name in methods else []
            if ended:
                made = [point[1] / 1000 for point in ended[0]["progress"]]
                values = np.array([[point[2] for point in line["progress"]] for line in ended])
                panel.plot(made, values.mean(axis=0), label=name, **_style(name, plan))
        for level in LEVELS.values():
            panel.axhline(level, color="0.5", linestyle="--", linewidth=1)
        panel.set(xlabel="thousands of rollouts", title=arm.name)
    return finish(figure, panels[0][0])


def rates(by_lag: Mapping[str, Mapping[str, Mapping[str, Cell]]]):
    """pass@1 against the learning rate, a panel for each lag."""
    styles = _variants(tables.names_of(by_lag))
    figure, panels = plt.subplots(1, len(by_lag), figsize=_row(by_lag), squeeze=False)
    for panel, (title, cells) in zip(panels[0], by_lag.items(), strict=True):
        for name, row in cells.items():
            points: dict[float, Spread] = {}
            for rate, cell in row.items():
                values = cell.of("pass@1")
                points[float(rate)] = (cell.mean("pass@1"), min(values), max(values))
            with_whiskers(panel, points, name, styles[name])
        panel.set(xscale="log", xlabel="learning rate", title=title, ylim=(0, 1))
    return finish(figure, panels[0][-1])


def drifts(by_lag: Mapping[str, Mapping[str, Mapping[str, Cell]]]):
    """The distance to pi_lag over the steps, a panel for each lag above 1, where there is one."""
    styles = _variants(tables.names_of(by_lag))
    figure, panels = plt.subplots(1, len(by_lag), figsize=_row(by_lag), squeeze=False)
    for panel, (title, cells) in zip(panels[0], by_lag.items(), strict=True):
        for name, row in cells.items():
            line = row["0.001"].lines[0]
            if "curve" in line:  # not of a run that failed at its first step
                kl = np.maximum(line["curve"]["kl"], 1e-7)
                panel.plot(8 * np.arange(1, len(kl) + 1), kl, label=name, lw=1, **styles[name])
        panel.set(yscale="log", xlabel="gradient step", title=title)
    return finish(figure, panels[0][-1])


def with_whiskers(panel, points: Mapping[float, Spread], name: str, style: dict) -> None:
    if points:
        x, (mean, low, high) = list(points), np.array(list(points.values())).T
        bars = np.nan_to_num(np.maximum([mean - low, high - mean], 0))  # one seed has none
        panel.errorbar(x, mean, yerr=bars, label=name, marker=".", capsize=2, **style)


def powers_of_two(panel, values: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values])


def finish(figure, named):
    """Beside the panels the names of what the panel `named` shows."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.set_layout_engine("constrained")
    figure.legend(*named.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _row(panels: Mapping) -> tuple[float, float]:
    """The size of a row of panels, and of the names beside it."""
    return 3.3 * len(panels) + 1.7, 3.6


def _style(name: str, plan: Plan) -> dict:
    if name in plan.core:
        return dict(color=COLORS[plan.core.index(name)], linewidth=1.6)
    return dict(color="0.8", linewidth=0.8)


def _variants(names: Sequence[str]) -> dict[str, dict]:
    """A color for each objective, that of the core, and a line for each of its variants."""
    styles: dict[str, dict] = {}
    for name in names:
        base = name.partition(",")[0]
        variant = sum(other.partition(",")[0] == base for other in styles)
        color = COLORS[FULL.core.index(base)]
        styles[name] = dict(color=color, linestyle=("-", "--", ":")[variant])
    return styles


def without(live: tables.Arms, plan: Plan) -> str:
    """Which runs a mean over the steps leaves out."""
    failed = [
        f"{len(of[name][1].lines) - len(_ended(of[name][1]))} of {name} at {arm.name}"
        for arm, of in live.items()
        for name in plan.core
        if name in of and len(_ended(of[name][1])) < len(of[name][1].lines)
    ]
    return f", without runs that failed ({', '.join(failed)})" if failed else ""


def _ended(cell: Cell) -> Sequence[dict]:
    return [line for line in cell.lines if line["outcome"] == "ended"]


def main() -> None:
    given = read_arguments(__doc__ or "")
    render(Grid(given.root, jobs=given.jobs), given.to, given.quick)


if __name__ == "__main__":
    exit_with_code(main)
