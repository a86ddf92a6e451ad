"""Figures of the run report: intervals, histograms and sums worked out by hand."""

import math

import numpy as np
import pytest

from oapl_jax.tracking.figures import POINTS, RunLog, curve, half_width, make_figures


def make_log(name, lines, *, series="s", balance=None, fitted=()):
    return RunLog(
        name=name,
        series=series,
        lines=[{"step": i + 1, **line} for i, line in enumerate(lines)],
        balance=balance or {},
        fitted=np.array(fitted, float).reshape(-1, 3),
    )


def figure(runs, title):
    (found,) = [f for f in make_figures(runs) if f["title"] == title]
    return found


def value(line):
    return line.get("loss")


def test_the_interval_of_a_mean_is_students():
    assert math.isnan(half_width([3.0]))
    assert half_width([1.0, 4.0]) == 1.5
    # t(0.975, 2) = 4.30265; standard error of 1, 2, 6 is sqrt(7 / 3).
    assert half_width([1.0, 2.0, 6.0]) == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)


def test_a_curve_is_the_mean_over_the_seeds_that_have_the_step():
    runs = [make_log("a", [{"loss": 1.0}, {"loss": 2.0}]), make_log("b", [{"loss": 3.0}, {}])]
    steps, means, reach = curve(runs, value)
    assert steps.tolist() == [1, 2]
    assert means.tolist() == [2.0, 2.0]
    assert reach[0] == 1.0
    assert math.isnan(reach[1])


def test_a_long_curve_is_averaged_over_spans_of_steps():
    run = make_log("a", [{"loss": float(i % 2)} for i in range(3 * POINTS)])
    steps, means, _ = curve([run], value)
    assert len(steps) <= POINTS
    assert steps[-1] == 3 * POINTS
    assert means.mean() == pytest.approx(0.5)


def test_only_series_of_several_runs_have_a_band():
    lines = [{"loss": 1.0}, {"loss": 2.0}]
    runs = [make_log("a", lines), make_log("b", lines), make_log("c", lines, series="t")]
    data = figure(runs, "Loss")["data"]
    bands = [trace for trace in data if trace.get("fill")]
    curves = [trace["name"] for trace in data if not trace.get("fill")]
    assert len(bands) == 1
    assert curves == ["s", "t"]


def test_a_band_on_a_logarithmic_axis_stays_above_0():
    runs = [make_log(name, [{"grad_norm": x}]) for name, x in (("a", 1.0), ("b", 1.0), ("c", 10.0))]
    band, _ = figure(runs, "Gradient norm")["data"]
    assert min(band["y"]) == pytest.approx(0.4)  # mean 4, interval 4 +- 12.9


def test_curves_of_several_series_have_the_smallest_and_the_largest_k():
    line = {f"eval/pass@{k}": 0.5 for k in (1, 2, 16, 4)}
    name = lambda runs: [trace["name"] for trace in figure(runs, "pass@k")["data"]]
    one, other = make_log("a", [line]), make_log("b", [line], series="t")
    assert name([one]) == ["pass@1", "pass@2", "pass@4", "pass@16"]
    assert name([one, other]) == ["s, pass@1", "s, pass@16", "t, pass@1", "t, pass@16"]


def test_lags_and_residuals_are_summed_over_all_steps():
    of = lambda counts, mean, rms: {
        "lag/histogram": counts,
        "residual/by_lag": mean,
        "residual/rms_by_lag": rms,
    }
    lines = [of({"0": 3, "10": 1}, {"0": 1.0, "10": 4.0}, {"0": 2.0, "10": 4.0})]
    lines += [of({"0": 1}, {"0": 5.0}, {"0": 5.0}), of({"10": 3}, {}, {})]
    (bars,) = figure([make_log("a", lines)], "Lag of the trained responses")["data"]
    assert (bars["x"], bars["y"]) == ([0, 10], [0.5, 0.5])
    rms, mean = figure([make_log("a", lines)], "Residual by lag")["data"]
    assert mean["y"] == [pytest.approx((3 * 1 + 5) / 4), pytest.approx(4.0)]
    assert rms["y"] == [pytest.approx(math.sqrt((3 * 4 + 25) / 4)), pytest.approx(4.0)]


def test_the_sawtooth_marks_the_steps_of_a_newer_version():
    lines = [{"kl": 0.1 * lag, "lag/mean": float(lag)} for lag in (0, 1, 2, 0, 1, 2, 0)]
    found = figure([make_log("a", lines)], "KL over sync windows")
    assert [shape["x0"] for shape in found["layout"]["shapes"]] == [4, 7]
    _, median = figure([make_log("a", lines)], "KL within a sync window")["data"]
    assert (median["x"], median["y"]) == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.2]))


def test_log_ratios_are_drawn_over_their_targets_by_the_sign_of_the_reward():
    fitted = [(1.0, 2.0, 1), (-1.0, -3.0, 0), (0.5, 2.0, 1)]
    above, below, line = figure([make_log("a", [], fitted=fitted)], "Log-ratio against A / β₂")[
        "data"
    ]
    assert (above["x"], above["y"]) == ([2.0, 2.0], [1.0, 0.5])
    assert (below["x"], below["y"]) == ([-3.0], [-1.0])
    assert line["x"] == line["y"] == [-3.0, 2.0]


def test_times_are_means_over_steps_and_the_balance_is_stacked_by_run():
    lines = [{"seconds/learn": 1.0}, {"seconds/learn": 2.0, "seconds/checkpoint": 4.0}]
    runs = [make_log("a", lines, balance={"trained": 3}), make_log("b", lines[:1])]
    parts = figure(runs, "Where a step's time goes")["data"]
    assert {part["name"]: part["x"] for part in parts} == {
        "checkpoint": [2.0, 0.0],
        "learn": [1.5, 1.0],
    }
    (trained,) = figure(runs, "Ends of the rollouts")["data"]
    assert (trained["y"], trained["x"]) == (["a", "b"], [3, 0])


def test_a_run_that_has_just_begun_has_no_figures():
    assert not any(figure["data"] for figure in make_figures([make_log("a", [])]))
