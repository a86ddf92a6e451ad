"""Figures of the run report, as Plotly's JSON: {"data": traces, "layout": layout}.

Runs that differ in their seeds alone are one series: its curve is the mean over seeds, with the
95 % interval of Student's t, or with the range of two runs. Colors are names ("c0", "c1/0.2" with
opacity) that the page replaces by those of its light or dark theme.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

POINTS = 400  # of a curve; longer runs are averaged over spans of steps
LONGEST = 1000  # steps of a curve that is not averaged, the last ones
SYNCS = 100  # that are marked
SCATTERED = 4000  # responses of a scatter plot and series
PARTS = (  # of a step, in their order; train.py
    *("publish", "groups", "pack", "recompute", "learn", "curriculum", "evaluate", "checkpoint"),
)
DASHES = ("solid", "dash", "dot", "dashdot")
COLORS = 8
Figure = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLog:
    """Values of a run that the figures show.

    Attributes:
      name: of the run.
      series: equal for runs that differ in their seeds alone.
      lines: of metrics.jsonl.
      balance: state -> rollouts, of the ledger.
      fitted: float[n, 3] of kept responses: log-ratio, its target, and 1 for a reward above 0.
    """

    name: str
    series: str
    lines: Sequence[Mapping[str, Any]]
    balance: Mapping[str, int]
    fitted: np.ndarray


Groups = Sequence[tuple[str, Sequence[RunLog]]]  # runs by series


def make_figures(runs: Sequence[RunLog]) -> list[Figure]:
    """All figures, each with its section, title and note; those without data have no traces."""
    series: dict[str, list[RunLog]] = {}
    for run in runs:
        series.setdefault(run.series, []).append(run)
    groups = list(series.items())
    curves = lambda *of, **layout: _curves(groups, *of, **layout)
    unit: dict[str, Any] = {"range": [-0.02, 1.02]}
    passes = sorted(
        {key for run in runs for line in run.lines for key in line if key.startswith("eval/pass@")},
        key=lambda key: int(key.partition("@")[2]),
    )
    if len(groups) > 1:
        passes = list(dict.fromkeys([*passes[:1], *passes[-1:]]))  # the smallest and the largest k
    sections = {
        "Learning": [
            curves(
                "Reward",
                "mean over responses",
                {"rollout/reward": "reward", "rollout/right_and_stopped": "right and stopped"},
                "Of the sampled responses; right and stopped: rewarded with 1 and not cut off.",
                yaxis={"rangemode": "tozero"},
            ),
            curves(
                "pass@k",
                "share of problems",
                {key: key[5:] for key in passes},
                "Of the validation split.",
                yaxis=unit,
            ),
            curves("Entropy", "nats a token", {"entropy": "entropy"}, "Of the policy."),
            curves("Loss", "loss", {"loss": "loss"}, "Of the global batch."),
            curves(
                "Gradient norm",
                "norm",
                {"grad_norm": "norm"},
                "Before clipping.",
                yaxis={"type": "log"},
            ),
            curves(
                "Effective sample size",
                "share of the batch",
                {"ess": "share"},
                "With the weights π / π_lag of whole responses.",
                yaxis=unit,
            ),
        ],
        "Lag": [
            _lag_histogram(groups),
            _sawtooth(groups),
            _kl_by_lag(groups),
        ],
        "Fit of the objective": [
            curves(
                "Residual by reward sign",
                "residual",
                {"residual/right": "reward > 0", "residual/wrong": "reward ≤ 0"},
                "β₂ times the log-ratio, less the advantage A: 0 at the fixed point.",
            ),
            _residuals_by_lag(groups),
            _fitted(groups),
            curves(
                "Log-ratio to the anchor",
                "nats a response",
                {"log_ratio/right": "reward > 0", "log_ratio/wrong": "reward ≤ 0"},
                "Mean of log(π / anchor).",
            ),
        ],
        "Responses": [
            curves("Length", "tokens", {"rollout/length": "tokens"}, "Of the sampled responses."),
            curves(
                "Truncated",
                "share",
                {"rollout/truncated": "truncated"},
                "Of the sampled responses: cut off at the longest length.",
                yaxis=unit,
            ),
            _balance(runs),
        ],
        "Time": [
            curves(
                "Throughput",
                "tokens a second",
                {"learner/tokens_per_second": "learner", "rollout/tokens_per_second": "sampler"},
                "Learner: prompts and responses. Sampler: responses.",
                yaxis={"type": "log"},
            ),
            curves(
                "Idle time",
                "seconds a step",
                {"learner/waiting_seconds": "learner", "rollout/waiting_seconds": "sampler"},
                "The learner waits for groups (without overlap, the sampler works then); the "
                "sampler waits for room in the buffer.",
            ),
            _parts_of_a_step(runs),
        ],
    }
    return [{"section": name} | figure for name, of in sections.items() for figure in of]


def curve(
    runs: Sequence[RunLog], value: Callable[[Mapping[str, Any]], float | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means over the runs and half-widths of their intervals (nan for a single run).

    Each run is averaged over equal spans of steps, so that at most POINTS are left; a span counts
    the runs that have a value in it.
    """
    last = max((line["step"] for run in runs for line in run.lines), default=1)
    width = -(-last // POINTS)
    spans: dict[int, list[float]] = {}
    for run in runs:
        of_run: dict[int, list[float]] = {}
        for line in run.lines:
            if (found := value(line)) is not None:
                of_run.setdefault(-(-line["step"] // width) * width, []).append(found)
        for span, values in of_run.items():
            spans.setdefault(span, []).append(float(np.mean(values)))
    steps = sorted(spans)
    means = [float(np.mean(spans[step])) for step in steps]
    return np.array(steps), np.array(means), np.array([half_width(spans[s]) for s in steps])


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of Student's t for a mean; nan for one value.

    Of two values half of their range: Student's factor for them, 12.7, would hide every curve.
    """
    if len(values) < 3:
        return (max(values) - min(values)) / 2 if len(values) == 2 else float("nan")
    from scipy import stats  # slow to import

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def _figure(title: str, data: list[Any], x: str, y: str = "", note: str = "", **layout) -> Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"title": title, "note": note, "data": data, "layout": {**axes, **layout}}


def _curves(
    groups: Groups, title: str, y: str, keys: Mapping[str, str], note: str, **layout: Any
) -> Figure:
    """Curves of metrics: a color a series and a dash a metric, or for one series a color each."""
    data = []
    for (i, (series, runs)), (j, (key, label)) in itertools.product(
        enumerate(groups), enumerate(keys.items())
    ):
        steps, means, reach = curve(runs, lambda line, key=key: line.get(key))
        if not len(steps):
            continue
        color, dash, name = _style(i, j, series, label if len(keys) > 1 else "", len(groups))
        known = np.isfinite(reach)
        low = means - reach
        if layout.get("yaxis", {}).get("type") == "log":
            low = np.maximum(low, means / 10)  # an interval may reach below 0
        data += _band(steps[known], low[known], (means + reach)[known], color)
        data.append(_line(steps, means, color, name, dash=dash, markers=len(steps) < 30))
    return _figure(title, data, "gradient step", y, note, **layout)


def _style(i: int, j: int, series: str, label: str, count: int) -> tuple[str, str, str]:
    """Color, dash and name of measure j in series i of `count`."""
    if count == 1:
        return _color(j), "solid", label
    return _color(i), DASHES[j % len(DASHES)], ", ".join(filter(None, (series, label)))


def _color(index: int) -> str:
    return f"c{index % COLORS}"


def _line(x: Any, y: Any, color: str, name: str, *, dash: str = "solid", markers: bool) -> Figure:
    return {
        "x": np.asarray(x).tolist(),
        "y": np.asarray(y).tolist(),
        "mode": "lines+markers" if markers else "lines",
        "line": {"color": color, "width": 1.6, "dash": dash},
        "marker": {"size": 5},
        "name": name,
        "showlegend": bool(name),
    }


def _band(x: Any, low: Any, high: Any, color: str) -> list[Figure]:
    """A filled band; no trace without points."""
    around = np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])
    look = {"fill": "toself", "fillcolor": f"{color}/0.2", "hoverinfo": "skip"}
    trace = _line(*around, color, "", markers=False) | look | {"line": {"color": color, "width": 0}}
    return [trace] if len(x) else []


def _bar(x: Any, y: Any, color: str, name: str, **more: Any) -> Figure:
    marker = {"color": color, "line": {"width": 0}}
    legend = {"name": name, "showlegend": bool(name)}
    return {"type": "bar", "x": x, "y": y, "marker": marker, **legend, **more}


def _stacked(title: str, of_part: Mapping[str, Sequence[float]], names: Any, x: str, note: str):
    """A horizontal bar a run, stacked of the parts that any run has."""
    parts = {part: list(values) for part, values in of_part.items() if any(values)}
    data = [
        _bar(values, list(names), _color(i), part, orientation="h")
        for i, (part, values) in enumerate(parts.items())
    ]
    axis = {"automargin": True, "type": "category"}
    return _figure(title, data, x, "", note, barmode="stack", bargap=0.5, yaxis=axis)


def _lines_of(runs: Sequence[RunLog]) -> Iterator[Mapping[str, Any]]:
    return itertools.chain.from_iterable(run.lines for run in runs)


def _lag_histogram(groups: Groups) -> Figure:
    data = []
    for i, (series, runs) in enumerate(groups):
        counts: Counter[int] = Counter()
        for line in _lines_of(runs):
            counts.update({int(lag): n for lag, n in line.get("lag/histogram", {}).items()})
        lags, total = sorted(counts), sum(counts.values())
        shares = [counts[lag] / total for lag in lags]
        if lags:
            data.append(_bar(lags, shares, _color(i), series if len(groups) > 1 else ""))
    note = "Learner's step less the version that sampled; all steps together."
    title = "Lag of the trained responses"
    return _figure(title, data, "lag, gradient steps", "share", note, barmode="group")


def _sawtooth(groups: Groups) -> Figure:
    """KL of each step, not averaged over steps, which would hide the teeth; lines where a newer
    version begins to be trained on."""
    data, shapes = [], []
    for i, (_, (run, *_)) in enumerate(groups):
        lines = [line for line in run.lines if "kl" in line][-LONGEST:]
        steps, kl = ([line[key] for line in lines] for key in ("step", "kl"))
        if lines:
            name = run.name if len(groups) > 1 else ""
            data.append(_line(steps, kl, _color(i), name, markers=False))
        lags = [line.get("lag/mean", 0.0) for line in lines]
        syncs = [step for step, a, b in zip(steps[1:], lags, lags[1:], strict=False) if b < a]
        if i == 0 and len(syncs) <= SYNCS:
            line = {"color": "muted", "width": 1, "dash": "dot"}
            ends = {"y0": 0, "y1": 1, "yref": "paper", "type": "line", "layer": "below"}
            shapes = [{"x0": step, "x1": step, **ends, "line": line} for step in syncs]
    note = "First run of each series; dotted: a newer version is trained on."
    y = "KL(π_lag || π), nats a token"
    return _figure("KL over sync windows", data, "gradient step", y, note, shapes=shapes)


def _kl_by_lag(groups: Groups) -> Figure:
    data = []
    for i, (series, runs) in enumerate(groups):
        of_lag: dict[int, list[float]] = {}
        for line in _lines_of(runs):
            if "kl" in line and "lag/mean" in line:
                of_lag.setdefault(round(line["lag/mean"]), []).append(line["kl"])
        lags = np.array(sorted(of_lag))
        if len(lags):
            quartiles = np.array([np.percentile(of_lag[lag], (25, 50, 75)) for lag in lags])
            low, mid, high = quartiles.T
            name = series if len(groups) > 1 else ""
            data += _band(lags, low, high, _color(i))
            data.append(_line(lags, mid, _color(i), name, markers=True))
    note = "All windows laid over each other: median and quartiles of the steps at each lag."
    y = "KL(π_lag || π), nats a token"
    return _figure("KL within a sync window", data, "lag, gradient steps", y, note)


def _residuals_by_lag(groups: Groups) -> Figure:
    """Mean and root mean square over all responses of a lag, from those of the steps."""
    data = []
    for i, (series, runs) in enumerate(groups):
        sums: dict[int, np.ndarray] = {}  # count; sum; sum of squares
        for line in _lines_of(runs):
            for lag, mean in line.get("residual/by_lag", {}).items():
                count, rms = line["lag/histogram"][lag], line["residual/rms_by_lag"][lag]
                of_step = count * np.array([1.0, mean, rms**2])
                sums[int(lag)] = sums.get(int(lag), np.zeros(3)) + of_step
        if not sums:
            continue
        lags = sorted(sums)
        count, total, squares = np.array([sums[lag] for lag in lags]).T
        measures = {"root mean square": np.sqrt(squares / count), "mean": total / count}
        for j, (label, values) in enumerate(measures.items()):
            color, dash, name = _style(i, j, series, label, len(groups))
            data.append(_line(lags, values, color, name, dash=dash, markers=True))
    note = "Over all trained responses of a lag."
    return _figure("Residual by lag", data, "lag, gradient steps", "residual", note)


def _fitted(groups: Groups) -> Figure:
    """Log-ratios of kept responses against their targets, with the diagonal of the fixed point."""
    data, ends = [], []
    for i, (series, runs) in enumerate(groups):
        points = np.concatenate([run.fitted for run in runs])
        points = points[:: -(-len(points) // SCATTERED) or 1]
        for j, label in enumerate(("reward > 0", "reward ≤ 0")):
            log_ratio, target = np.round(points[points[:, 2] == 1 - j, :2].T, 3)
            if len(target):
                ends += [target.min(), target.max()]
                color, _, name = _style(i, j, series, label, len(groups))
                marker = {"color": f"{color}/0.45", "size": 5, "symbol": ("circle", "x")[j]}
                trace = _line(target, log_ratio, color, name, markers=True)
                data.append(trace | {"mode": "markers", "marker": marker})
    if data:
        diagonal = [float(min(ends)), float(max(ends))]
        fixed = _line(diagonal, diagonal, "muted", "fixed point", dash="dash", markers=False)
        data.append(fixed)
    note = "Kept responses at the steps that trained on them; on the diagonal the residual is 0."
    x, y = "target: A / β₂", "log(π / anchor), nats"
    return _figure("Log-ratio against A / β₂", data, x, y, note)


def _parts_of_a_step(runs: Sequence[RunLog]) -> Figure:
    """Mean seconds of each part; the first steps, which compile, count too."""
    runs = [run for run in runs if run.lines]
    mean = lambda run, key: sum(line.get(key, 0.0) for line in run.lines) / len(run.lines)
    seconds = {part: [mean(run, f"seconds/{part}") for run in runs] for part in PARTS}
    note = (
        "Mean over all steps, compiling included. groups: sampling, or waiting for the sampler; "
        "recompute: log-probs of another policy."
    )
    names = [run.name for run in runs]
    return _stacked("Where a step's time goes", seconds, names, "seconds a step", note)


def _balance(runs: Sequence[RunLog]) -> Figure:
    states = dict.fromkeys(state for run in runs for state in run.balance)
    counts = {state: [run.balance.get(state, 0) for run in runs] for state in states}
    names = [run.name for run in runs]
    return _stacked("Ends of the rollouts", counts, names, "rollouts", "From the ledger.")
