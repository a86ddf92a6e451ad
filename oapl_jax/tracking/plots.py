"""learning.png: rewards and pass@k, measured lag, and the drift of the policy."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath


def plot_learning(
    lines: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    path: epath.Path,
    *,
    title: str,
) -> None:
    """Draws four panels as a PNG, from the lines of metrics.jsonl and the evaluations of the test
    split before and after the run."""
    from matplotlib.figure import Figure  # slow to import, and not for every run

    figure = Figure(figsize=(11, 7))
    (learned, lagged), (moved, fitted) = figure.subplots(2, 2)
    last = lines[-1]["step"] if lines else 0

    gray = dict(color="0.75", linewidth=1)
    _plot(learned, lines, "rollout/reward", "reward of sampled responses", **gray)
    for color, key in (("C0", "pass@1"), ("C2", "pass@8")):
        _plot(learned, lines, f"eval/{key}", f"{key}, validation", color=color, marker=".")
        if key in before:
            learned.plot(
                [0, last], [before[key], after[key]], "*", color=color, label=f"{key}, test"
            )
    learned.set(ylim=(0, 1.02), title="What was learned")

    _plot(lagged, lines, "lag/mean", "mean", color="C0")
    _plot(lagged, lines, "lag/max", "largest", color="C1", linewidth=1)
    lagged.set(title="Measured lag (steps)", ylim=(0, None))

    _plot(moved, lines, "entropy", "entropy of the policy", color="C0")
    _plot(moved, lines, "kl", "KL(lagged policy || policy)", color="C3")
    moved.set(title="Nats a token", yscale="log", ylim=(1e-4, None))

    _plot(fitted, lines, "log_ratio/right", "right responses", color="C2")
    _plot(fitted, lines, "log_ratio/wrong", "wrong responses", color="C3")
    fitted.set(title="log(policy / lagged policy) of a response (nats)")

    for axis in (learned, lagged, moved, fitted):
        axis.set_xlabel("gradient step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _plot(axis, lines: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)
