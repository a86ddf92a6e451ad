"""The run report: its files, its exit codes, and its page in Chromium."""

import gzip
import json
import re
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import Browser
from made_runs import SIZE, make_line, make_run

from oapl_jax import report
from oapl_jax.errors import RunError, UserError
from oapl_jax.tracking.live import make_server
from oapl_jax.tracking.page import pack, page


def run_report(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    report.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one run, and a run of another objective."""
    root = tmp_path_factory.mktemp("runs")
    other = {"objective": {"name": "grpo"}}
    return [
        make_run(root / "a0", seed=0),
        make_run(root / "a1", seed=1),
        make_run(root / "b", seed=0, config=other),
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


# The command


def test_the_page_goes_to_the_workdir_and_the_ledger_report_is_printed(runs, monkeypatch, capsys):
    run_report(monkeypatch, runs[0])
    printed = capsys.readouterr().out
    assert "96 rollouts requested" in printed
    assert str(runs[0] / "report.html") in printed
    html = (runs[0] / "report.html").read_text()
    assert len(html) < 2_000_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html.split("<script>")[0])


def test_several_runs_and_another_file(runs, monkeypatch, capsys, tmp_path):
    run_report(monkeypatch, *runs, f"--out={tmp_path / 'r.html'}")
    assert (tmp_path / "r.html").exists()
    assert not (runs[1] / "report.html").exists()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("a0", "a1", "b"))


def test_json_is_the_ledger_report_alone(runs, monkeypatch, capsys, tmp_path):
    workdir = make_run(tmp_path / "w", steps=2)
    run_report(monkeypatch, workdir, "--json")
    assert json.loads(capsys.readouterr().out)["requested"] == 4 * SIZE
    assert not (workdir / "report.html").exists()
    run_report(monkeypatch, *runs, "--json")
    assert set(json.loads(capsys.readouterr().out)) == {"a0", "a1", "b"}


def test_a_ledger_that_does_not_balance_is_an_error_after_the_page(monkeypatch, tmp_path):
    workdir = make_run(tmp_path / "w", steps=2)
    lines = (workdir / "ledger.jsonl").read_text().splitlines(keepends=True)
    (workdir / "ledger.jsonl").write_text("".join([lines[0], *lines]))
    with pytest.raises(RunError, match="twice"):
        run_report(monkeypatch, workdir)
    assert (workdir / "report.html").exists()


@pytest.mark.parametrize("named", ["no such run", "the same run twice"])
def test_workdirs_that_make_no_report(runs, monkeypatch, tmp_path, named):
    workdirs = [tmp_path / "none"] if named == "no such run" else [runs[0], runs[0]]
    with pytest.raises(UserError, match="workdir"):
        run_report(monkeypatch, *workdirs)


def test_runs_that_differ_in_their_seeds_alone_are_one_series(runs):
    opened = report.open_runs(runs, 0)
    series = report.series_of(opened)
    assert series == ["absent", "absent", "grpo"]
    assert report.differing(opened) == {
        "objective.name": ["absent", "absent", "grpo"],
        "seed": [0, 1, 0],
    }


@pytest.mark.parametrize(
    ("starts", "series"),
    [
        ({0: "a/v000000", 1: "b/v000000"}, 1),  # each seed from its own warm-up
        ({0: "Qwen3-4B", 1: "Llama-3.2-3B"}, 2),
    ],
)
def test_seeds_that_start_from_versions_of_their_own_are_one_series(tmp_path, starts, series):
    runs = [
        make_run(tmp_path / f"{seed}", steps=1, seed=seed, config={"model": {"path": start}})
        for seed, start in starts.items()
    ]
    assert len(set(report.series_of(report.open_runs(runs, 0)))) == series


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        # The objective's name tells them apart, whatever else goes with it.
        ([("oapl", 4, {}), ("grpo", 8, {})], ["oapl", "grpo"]),
        ([("oapl", 4, {}), ("oapl", 8, {})], ["steps=4", "steps=8"]),
        # Two settings together: the runs' own names.
        ([("oapl", 4, {}), ("oapl", 8, {}), ("grpo", 4, {})], ["0", "1", "2"]),
        ([("oapl", 4, {"data": {"task": "x" * 99}}), ("oapl", 4, {})], ["0", "1"]),
    ],
)
def test_a_series_has_the_shortest_label_that_tells_it_apart(tmp_path, configs, labels):
    runs = [
        make_run(
            tmp_path / f"{i}",
            steps=1,
            config={"objective": {"name": name}, "lag": {"steps": lag}, **more},
        )
        for i, (name, lag, more) in enumerate(configs)
    ]
    assert report.series_of(report.open_runs(runs, 0)) == labels


def test_two_starts_of_one_seed_are_two_series(tmp_path):
    paths = {"a": "x/v000000", "b": "y/v000000"}
    runs = [
        make_run(tmp_path / name, steps=1, config={"model": {"path": path}})
        for name, path in paths.items()
    ]
    assert len(set(report.series_of(report.open_runs(runs, 0)))) == 2


def test_packed_data_is_a_header_and_arrays_that_begin_at_multiples_of_four():
    arrays = {"a": np.array([1, -2, 3], np.int16), "b": np.array([7], np.int32)}
    content = gzip.decompress(pack({"text": "é"}, arrays))
    size = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + size])
    assert header == {"text": "é", "arrays": [["a", "int16", 3], ["b", "int32", 1]]}
    assert size % 4 == 0
    assert content[4 + size :] == b"\1\0\xfe\xff\3\0\0\0\7\0\0\0"


def test_a_run_that_has_written_no_shard_yet_has_a_page(monkeypatch, tmp_path):
    workdir = make_run(tmp_path / "w", steps=2, kept=0)
    assert json.loads((workdir / "rollouts" / "manifest.json").read_text())["shards"] == {}
    run_report(monkeypatch, workdir)
    assert (workdir / "report.html").exists()


def test_the_page_admits_its_own_scripts_only():
    static, live = page(b"data"), page(None)
    policy = re.search(r'Policy" content="([^"]*)"', static)
    assert policy
    assert "'unsafe-inline'" not in policy[1].partition("style-src")[0]
    assert "connect-src 'none'" in static
    assert "connect-src 'self'" in live


# The page


@pytest.fixture(scope="module")
def opened(runs, browser, tmp_path_factory):
    """The page of the three runs."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(report.report_data(report.open_runs(runs, 0), 0, 10**6, "")))
    browser.open(path.as_uri())
    return browser


def count(browser):
    text = browser.evaluate("document.getElementById('where').textContent")
    return int(text.split(" of ")[0].replace(",", ""))


def test_it_loads_without_errors_and_asks_for_nothing_else(opened):
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    figures = "document.querySelectorAll('.figure .plot svg.main-svg').length"
    assert opened.evaluate(figures) >= 15
    titles = opened.evaluate("[...document.querySelectorAll('.figure h4')].map(e => e.textContent)")
    assert {"Reward", "KL over sync windows", "Residual by lag", "Log-ratio against A / β₂"} <= set(
        titles
    )
    assert "objective.name" in opened.evaluate("document.getElementById('differences').textContent")
    assert "Balanced" in opened.evaluate("document.getElementById('ledger-tables').textContent")


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({}, 3 * 24 * SIZE),
        ({"run": "a1"}, 24 * SIZE),
        ({"run": "b", "finish": "length"}, 24),
        ({"verdict": "right"}, 3 * 48),
        ({"reward-min": "0.5", "run": "a0"}, 48),
        ({"reward-max": "0.5", "run": "a0"}, 48),
        ({"step-min": "2", "step-max": "3", "run": "a0"}, 4 * SIZE),
        ({"version-min": "8", "run": "a0"}, 8 * SIZE),
        ({"length-max": "1", "run": "a0"}, 48),
        ({"prompt": "sum-23", "run": "a0"}, SIZE),
        ({"search": "answer 3", "run": "a0"}, 24),
        ({"search": "no such text"}, 0),
        ({"state": "trained", "run": "a0"}, 24 * SIZE),
    ],
)
def test_filters_leave_the_responses_that_they_name(opened, filters, left):
    for name, value in filters.items():
        opened.fill(name, value)
    assert count(opened) == left
    for name in filters:
        opened.fill(name, "")
    assert count(opened) == 3 * 24 * SIZE


def test_a_response_opens_its_group_side_by_side_with_verdicts_and_colors(opened):
    opened.evaluate("document.querySelector('#list tbody tr').click()")
    text = opened.evaluate("document.getElementById('group').textContent")
    assert all(part in text for part in ("answer 0", "wrong", "Reference", "A / β₂"))
    assert opened.evaluate("document.querySelectorAll('#side .box').length") == SIZE
    spans = "[...document.querySelectorAll('#side .response span')]"
    assert opened.evaluate(
        f"{spans}.every(e => e.style.backgroundColor && e.title.includes('gap'))"
    )
    backs = opened.evaluate(f"[...new Set({spans}.map(e => getComputedStyle(e).backgroundColor))]")
    assert len(backs) > 2


def test_themes_change_every_color_of_a_figure(opened):
    look = (
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.figure .xtick text')).fill,"
        " getComputedStyle(document.querySelector('.figure .js-line')).stroke]"
    )
    looks = []
    for theme in ("light", "dark"):
        opened.prefer(theme)
        opened.wait(f"document.documentElement.dataset.theme == {theme!r}")
        looks.append(opened.evaluate(look))
    light, dark = looks
    assert all(a != b for a, b in zip(light, dark, strict=True))
    opened.prefer("light")
    assert opened.errors == []


def test_texts_of_a_model_are_never_html(browser, tmp_path):
    evil = "</script><img src=x onerror=window.evil=1><b>"
    workdir = make_run(tmp_path / "w", steps=1)
    name = workdir / "rollouts" / "notes.jsonl"
    lines = [json.loads(line) for line in name.read_text().splitlines()]
    for line in lines:
        line |= {"grades": [[evil, evil, evil]] * SIZE}
    name.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "report.html"
    path.write_text(page(report.report_data(report.open_runs([workdir], 0), 0, 10**6, "")))
    browser.open(path.as_uri())
    browser.evaluate("document.querySelector('#list tbody tr').click()")
    assert evil in browser.evaluate("document.getElementById('group').textContent")
    assert browser.evaluate("window.evil === undefined && !document.querySelector('#group b')")
    assert browser.errors == []


def test_a_hundred_thousand_responses_stay_usable(browser, tmp_path):
    """12,500 groups of 8 are found, filtered and paged within seconds.

    A word of the cycle of a thousand is in one of fifty responses, which are right.
    """
    groups, size, length = 12_500, 8, 20
    responses, total = groups * size, groups * size * length
    group = dict(run="a", question="q", reference="r", version=0, state="trained", size=size)
    column = lambda value: [value] * responses
    data = {
        **{key: {"head": [], "rows": [], "none": ""} for key in ("runs", "differences")},
        **dict.fromkeys(("about", "curves_note", "kept_note", "stamp"), ""),
        **{key: [] for key in ("figures", "ledgers")},
        "groups": [dict(group, prompt=f"p{i}", index=i, step=i // 30) for i in range(groups)],
        "responses": {
            "length": column(length),
            "reward": [i % 2 for i in range(responses)],
            **{key: column("x") for key in ("finish", "extracted", "verdict", "reason")},
            **{key: column(None) for key in ("log_ratio", "target")},
        },
        "strings": [f"w{i} " for i in range(1000)],
    }
    tokens = np.arange(total, dtype=np.int32) % 1000
    zeros = np.zeros(total, np.int16)
    path = tmp_path / "report.html"
    path.write_text(page(pack(data, {"tokens": tokens, "logp": zeros, "gap": zeros})))
    browser.open(path.as_uri())
    assert count(browser) == responses
    for filters, left in (({"reward-min": "1"}, 50_000), ({"search": "w999"}, 2000)):
        for name, value in filters.items():
            begun = browser.evaluate("performance.now()")
            browser.fill(name, value)
            assert count(browser) == left
            assert browser.evaluate("performance.now()") - begun < 15_000
    assert browser.evaluate("document.querySelectorAll('#list tbody tr').length") == 50
    browser.evaluate("document.getElementById('later').click()")
    assert "page 2 of 40" in browser.evaluate("document.getElementById('where').textContent")


# Live


@pytest.fixture
def live(tmp_path):
    """A run, and the address of the server that follows it."""
    workdir = make_run(tmp_path / "w", steps=2)
    build = lambda stamp: report.report_data(report.open_runs([workdir], 0), 0, 1000, stamp)
    with make_server(0, lambda: report.stamp_of([workdir], 0), build) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield workdir, f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_live_serves_loopback_only_and_new_data_only(live):
    workdir, url = live
    assert get(url)[0] == 200
    assert get(f"{url}data")[0] == 200
    stamp = urllib.request.quote(report.stamp_of([workdir], 0))  # pyright: ignore
    assert get(f"{url}data?stamp={stamp}")[0] == 204
    assert get(url, Host="evil.example:80")[0] == 403
    assert get(f"{url}../metrics.jsonl")[0] == 404
    (workdir / "ledger.jsonl").write_text("damaged\n")
    status, sentence = get(f"{url}data?stamp={stamp}")
    assert status == 503
    assert b"ledger.jsonl" in sentence


def test_a_live_page_follows_the_run(live, browser):
    workdir, url = live
    browser.open(url)
    assert count(browser) == 4 * SIZE
    browser.fill("run", "w")
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(make_line(2, np.random.default_rng(0)) | {"step": 77}) + "\n")
    browser.wait("document.getElementById('runs').textContent.includes('77')")
    assert browser.evaluate("document.getElementById('run').value") == "w"  # filters stay
    assert browser.errors == []
