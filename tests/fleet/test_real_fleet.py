"""Fleet, evaluation, judge and the default job over real SGLang servers, against the own model."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bucket import emulated
from etils import epath
from fleets import CLOSE, Run, assert_published, difference, open_real_fleet, wait_until
from server_processes import ROOT, Process, find_port
from small_runs import opened

from configs import arithmetic, common
from oapl_jax import build
from oapl_jax.config import LanguageModelJudgeConfig
from oapl_jax.errors import UserError
from oapl_jax.evaluate import benchmark_prompts, evaluate_benchmarks
from oapl_jax.evaluation import pass_curve
from oapl_jax.preferences import Response
from oapl_jax.preferences.language_model import LanguageModelJudge
from oapl_jax.publish import publish_step
from oapl_jax.rewards.tasks import chain_sum
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

LAG = 16  # gradient steps between two versions, the default's
DEADLINE = 600.0  # seconds of a run
PROBLEMS = [("1+1=", "2"), ("9-8=", "1"), ("3+4-1=", "6"), ("8-5=", "3"), ("2+2+2=", "6")]
SAMPLES, VERSION = 8, 2  # of the evaluation
SUM_CLOSE = 2e-3  # nats between two sums of log-probs of a response
API_KEY = "sk-1234567890"
GREEDY = 1e-5  # a temperature at which sampling is greedy
VERDICTS = {"1": 1.0, "0": 0.25}


@pytest.fixture
def make_fleet(published, stack):
    def make(*args, version=None, **kwargs):
        fleet = open_real_fleet(published, *args, **kwargs)
        stack.callback(fleet.close)
        if version is not None:
            fleet.refresh(version, published.path(version))
            fleet.wait_ready()
        return fleet

    return make


def prompt(index):
    tokens = np.random.default_rng(index).integers(2, 16, 3 + index % 9).astype(np.int32)
    return Prompt(f"p{index}", index, tokens, "", "", "")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_learner(make_fleet, servers, published, temperature):
    fleet = make_fleet(servers.urls, version=2)
    sampling = Sampling(temperature, 1.0, 0, 20)
    taken = fleet.take(map(prompt, range(16)), sampling).result()
    taken.assert_each_once(16)
    assert taken.servers == set(servers.urls)
    at = temperature or 1.0  # greedy tokens have the log-probs of temperature 1
    assert max(difference(published, s, 2, at) for s in taken) < CLOSE
    assert min(difference(published, s, 1, at) for s in taken) > 0.1
    rollouts = [r for s in taken for r in s.rollouts]
    stops = set(published.policy.stop_ids)
    for rollout in rollouts:
        ended = int(rollout.tokens[-1]) in stops
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.tokens) == 20
    if temperature:
        assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert fleet.counts()["probe_gap"] < CLOSE


@pytest.fixture
def in_a_bucket(published, tmp_path, stack):
    """Paths of the versions in a bucket, and the port of a fetcher beside the servers."""
    bucket, port = stack.enter_context(emulated("published")), find_port()
    path = lambda version: bucket / published.path(version).name
    for version in (1, 2, 3):
        for file in published.path(version).iterdir():
            (path(version) / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "oapl_jax.fleet.fetch", f"--from={bucket}"]
    command += [f"--to={tmp_path}/copies", f"--port={port}"]
    fetcher = Process("the fetcher", command, port, tmp_path / "fetcher.log")
    stack.callback(fetcher.kill)
    fetcher.wait_ready()
    return path, port


@pytest.mark.parametrize(
    ("allow_older", "drain_deadline", "place"), [(False, 0.0, "disk"), (True, 60.0, "bucket")]
)
def test_a_refresh_under_load_mixes_no_group(
    make_fleet, servers, published, allow_older, drain_deadline, place, request
):
    path, port = published.path, 0
    if place == "bucket":
        path, port = request.getfixturevalue("in_a_bucket")
    how = dict(allow_older=allow_older, drain_deadline=drain_deadline, fetch_port=port)
    fleet = make_fleet(servers.urls, **how)

    def pull():
        """Refreshes from inside the pull, as a worker does."""
        for index in range(90):
            if index % 15 == 0:
                version = 1 + index // 15 % 3
                fleet.refresh(version, path(version))
            yield prompt(index)

    taken = fleet.take(pull()).result()
    taken.assert_each_once(90)
    assert_published(published, taken)
    sampled_from = taken.versions
    assert len(sampled_from) > 1 if allow_older else sampled_from == {1, 2, 3}
    assert set(taken.reasons) <= {"aborted"}
    found = fleet.counts()
    assert found["aborted"] == sum(len(s.attempts) for s in taken)
    assert found["aborted"] == 0 if allow_older else found["aborted"] > 0


def test_a_killed_server_comes_back(make_fleet, servers, published, start_server, tmp_path):
    """By the ledger no group is lost or duplicated; requests of the victim are retried.

    The victim demands an API key.
    """
    port, steady, key_file = find_port(), servers.servers[0], tmp_path / "key"
    victim = start_server(published.path(1), port, api_key=API_KEY)
    assert victim.call("/model_info")[0] == 401
    without = make_fleet([victim.url])
    without.refresh(1, published.path(1))
    with pytest.raises(UserError, match="api_key_file"):
        without.take(map(prompt, range(1))).result()
    key_file.touch(0o600)
    key_file.write_text(API_KEY)
    fleet = make_fleet([steady.url, victim.url], version=3, api_key_file=str(key_file))
    run = Run(fleet, epath.Path(tmp_path), published.policy.tokenizer, capacity=16)
    run.worker.start()
    run.train_until(
        lambda: fleet.of(victim, "sampled") > 3 and fleet.of(victim, "in_flight") > 1, "work"
    )
    victim.kill()
    run.train_until(lambda: fleet.of(victim, "state") == "lost", "the loss")
    before = [fleet.of(server, "sampled") for server in (victim, steady)]
    run.train_until(lambda: fleet.of(steady, "sampled") > before[1] + 3, "other work")
    # Without training, sampling stops soon: on two cores a server starts slowly beside a busy one.
    start_server(published.path(1), port, wait=False, api_key=API_KEY)
    wait_until(lambda: fleet.of(victim, "state") == "ready", "the return", fleet.patience)
    assert fleet.of(victim, "version") == 3
    run.train_until(lambda: fleet.of(victim, "sampled") > before[0] + 3, "new work")
    found = run.finish()

    assert_published(published, run.groups)
    assert {group.policy_version for group in run.groups} == {3}
    assert found.summary()["balance"]["failed"] == 0
    rows = {row.id: row for row in found.rollouts()}
    again = [row for row in rows.values() if row.state == "reissued"]
    assert again
    for row in again:
        assert (row.server, row.reason) == (victim.url, "failed")
        after = rows[row.reissued_as]
        assert after.state in ("trained", "held", "reissued")
    assert fleet.has_logged(f"{victim.url} is ready")
    assert not any(API_KEY in text for text in [*fleet.logged, repr(fleet.servers())])


def test_a_response_of_two_versions_is_retried(make_fleet, servers, published):
    """Another client changes the weights during a request."""
    server = servers.servers[0]
    fleet = make_fleet([server.url], version=1)
    greedy = Sampling(0.0, 1.0, 0, 400)

    def sample(index):
        return fleet.take([prompt(index)], greedy)

    # Random weights often repeat themselves up to the limit.
    long = next(d for d in range(50) if len(sample(d).result()[0].rollouts[0].tokens) == 400)
    begun = time.monotonic()
    sample(long).result()
    seconds = time.monotonic() - begun

    def change():
        server.ask("/pause_generation", {"mode": "in_place"})
        other = {"model_path": str(published.path(2)), "weight_version": "2"}
        try:
            server.ask("/update_weights_from_disk", {**other, "flush_cache": False})
        finally:
            server.ask("/continue_generation", {})

    def change_at(part):
        taker = sample(long)
        wait_until(lambda: fleet.counts()["in_flight"] == 1, patience=fleet.patience)
        time.sleep(part * seconds)
        change()
        return taker.result()

    # A try whose response had not begun at the change, or had ended, does not count.
    tries = map(change_at, np.random.default_rng(0).uniform(0.1, 0.9, 50))
    taken = next(taken for taken in tries if taken.reasons == ["mixed"])
    assert taken.versions == {1}
    assert fleet.counts()["mixed"] >= 1
    assert server.ask("/model_info")["weight_version"] == "1"  # brought back before


@pytest.fixture
def evaluate(servers, published, tmp_path):
    """Evaluates version 2 of the servers' model; returns result, responses and prompts."""
    rows = [json.dumps({"question": q, "target": a}) for q, a in PROBLEMS]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))

    def evaluate(sampler, temperature):
        config = arithmetic.get_config()
        sizes = dict(train_size=20, validation_size=2, test_size=2)
        sizes |= {"generator.min_terms": 2, "generator.max_terms": 2}
        settings = {f"data.{name}": size for name, size in sizes.items()}
        settings |= {"data.data_dir": str(tmp_path / "data"), "model.path": str(published.path(1))}
        settings |= {"rollout.sampler": sampler, "rollout.temperature": temperature}
        settings |= {"fleet.servers": tuple(servers.urls), "fleet.control_deadline": 60.0}
        config.update_from_flattened_dict(settings | {"group_size": 4})
        with config.unlocked():
            columns = dict(problem="question", answer="target")
            table = dict(kind="table", path=str(tmp_path / "sums.jsonl"), files=())
            options = {"task": "chain_sum", "columns": columns, "max_tests": 0}
            table |= dict(rows=len(PROBLEMS), part=(0, 100), options=options)
            config.benchmarks.sums = table
        source = dict(step=None, version_dir=str(published.path(VERSION)), n=SAMPLES)
        source |= dict(log=lambda text: None)
        to = epath.Path(tmp_path / f"{sampler}{temperature}")
        with contextlib.closing(opened(config, tmp_path / "workdir")) as run:
            directory, results = evaluate_benchmarks(run, ["sums"], to, **source)
            prompts = {p.id: p for p in benchmark_prompts(run, "sums")[0]}
        responses = {}
        for group in Dataset(directory / "sums" / "responses"):
            start = group.prompt.stream_index // len(prompts)
            for index, rollout in enumerate(group.rollouts, start):
                assert (group.prompt.id, index) not in responses
                responses[group.prompt.id, index] = rollout
        return results["sums"], responses, prompts

    return evaluate


def test_results_follow_from_the_log_probs_of_the_version(evaluate, published, monkeypatch):
    result, responses, prompts = evaluate("fleet", 1.0)
    tokens, logp, correct = 0, 0.0, dict.fromkeys(prompts, 0)
    for (name, _), rollout in responses.items():
        prompt, response = prompts[name], rollout.tokens.tolist()
        expected = published.logp(VERSION, prompt.tokens, response)
        total = rollout.behavior_logp.sum()
        assert total == pytest.approx(expected.sum(), abs=SUM_CLOSE)
        assert abs(total - published.logp(1, prompt.tokens, response).sum()) > SUM_CLOSE
        text = published.policy.tokenizer.decode(response, skip_special_tokens=True)
        correct[name] += rollout.finish_reason == "stop" and chain_sum(text, prompt.answer) == 1
        tokens, logp = tokens + len(response), logp + expected.sum()
    assert set(responses) == {(p, i) for p in prompts for i in range(SAMPLES)}
    assert {p["id"]: p["correct"] for p in result["per_problem"]} == correct
    assert result["entropy"]["value"] == pytest.approx(-logp / tokens, abs=1e-4)
    assert result["pass@k"]["value"][3] == pytest.approx(
        np.mean([pass_curve(SAMPLES, c)[3] for c in correct.values()])
    )
    assert (result["about"]["sampler"], result["about"]["version"]) == ("fleet", VERSION)

    monkeypatch.setattr(build.Run, "open_sampler", None)
    assert evaluate("fleet", 1.0)[0]["pass@k"] == result["pass@k"]  # nothing is sampled again


def test_greedy_responses_equal_those_of_the_embedded_decoder(evaluate):
    texts = {}
    for sampler in ("fleet", "local"):
        result, responses, _ = evaluate(sampler, GREEDY)
        texts[sampler] = {
            key: (rollout.tokens.tolist(), rollout.finish_reason)
            for key, rollout in responses.items()
        }
        texts[sampler]["measured"] = (result["avg@n"], result["length"], result["truncated"])
    assert texts["fleet"] == texts["local"]
    assert len(texts["local"]) == len(PROBLEMS) * SAMPLES + 1


@pytest.fixture
def judges(servers, published):
    """Both servers, on version 1."""
    body = {"model_path": str(published.path(1)), "weight_version": "1", "flush_cache": True}
    for server in servers.servers:
        assert server.ask("/update_weights_from_disk", body)["success"] is True
    return servers.urls


def test_preferences_are_those_of_the_learners_log_probs(judges, published):
    settings = common.preferences("prosper").language_model.to_dict()
    settings |= dict(servers=tuple(judges), tokenizer=str(published.path(1)))
    settings |= dict(template="{prompt}={first},{second}-{question}", verdicts=VERDICTS)
    settings |= dict(questions={"one": "7", "two": "88"}, questions_per_request=3)
    settings |= dict(min_verdict_mass=1e-4)  # the weights are fresh ones
    judge = LanguageModelJudge(LanguageModelJudgeConfig.from_dict(settings))
    prompt = Prompt("id0", 0, np.array([2], np.int32), "3+4", "7", "chain_sum")
    responses = [Response(text, lambda: 0.0) for text in ("07", "3,1")]
    comparators = [Response(text, lambda: 0.0) for text in ("07", "00", "1234,9")]
    found = judge.compare(prompt, responses, comparators)

    encode = lambda text: published.policy.tokenizer.encode(text, add_special_tokens=False)

    def first_wins(first, second, question):
        row = encode(f"3+4={first},{second}-{question}")
        logp = [published.logp(1, row, encode(verdict))[0] for verdict in VERDICTS]
        chances = np.exp(np.array(logp, np.float64))
        return chances @ np.array(list(VERDICTS.values())) / chances.sum()

    for j, question in enumerate(("7", "88")):
        for i, mine in enumerate(responses):
            for k, theirs in enumerate(comparators):
                first = first_wins(mine.text, theirs.text, question)
                second = 1 - first_wins(theirs.text, mine.text, question)
                assert found[j, i, k] == pytest.approx((first + second) / 2, abs=1e-4)
    assert found.std() > 1e-3
    metrics = judge.metrics()
    assert metrics["questions/asked"] == 24
    assert metrics["questions/unclear"] == metrics["questions/failed"] == 0


def train(workdir: Path, *overrides: str) -> tuple[dict, list[dict]]:
    """Results of the default job, and the lines of its metrics."""
    command = [sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"]
    command += [f"--workdir={workdir}", f"--config.data.data_dir={workdir.parent / 'data'}"]
    command += ["--config.evaluation.every=1000", "--config.checkpoint.every=1000", *overrides]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=DEADLINE)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return json.loads((workdir / "result.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Workdir, results and metrics of a run with the embedded sampler."""
    workdir = tmp_path_factory.mktemp("embedded") / "run"
    return workdir, *train(workdir, "--config.num_steps=120")


def test_the_default_job_learns(embedded):
    """Shortened: OAPL with lag 16 raises pass@1 on problems that it has not seen."""
    _, result, lines = embedded
    before, after = result["before"], result["after"]
    assert before["pass@1"] <= 0.30
    assert after["pass@1"] >= before["pass@1"] + 0.30
    assert after["pass@8"] >= before["pass@8"]
    assert max(line["lag/max"] for line in lines) == LAG - 1


def test_the_default_job_learns_on_a_fleet(servers, embedded, tmp_path):
    """With rollouts from two real SGLang servers, from the warmed-up policy of the other run."""
    start = publish_step(epath.Path(embedded[0]), 0, epath.Path(tmp_path / "start"), dtype=None)
    steps, workdir = 64, tmp_path / "run"
    overrides = [f"--config.num_steps={steps}", "--config.warmup.num_steps=0"]
    overrides += [f"--config.model.path={start}", "--config.rollout.sampler=fleet"]
    overrides += ["--config.rollout.overlap=True", f"--config.fleet.servers={tuple(servers.urls)}"]
    result, lines = train(workdir, *overrides)
    before, after = result["before"], result["after"]
    assert before["pass@1"] == embedded[1]["before"]["pass@1"]
    assert after["pass@1"] >= before["pass@1"] + 0.30, (before, after)
    assert max(line["lag/max"] for line in lines) == LAG - 1
    refreshed = max(line.get("fleet/refreshed", 0) for line in lines)
    assert refreshed >= 2 * 3, "each server loaded at least three versions"

    ledger = [sys.executable, "-m", "oapl_jax.report", str(workdir), "--json"]
    printed = subprocess.run(ledger, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=60)
    report = json.loads(printed.stdout)
    assert report["balanced"]
    assert report["balance"]["trained"] == steps * 32 * 8
    assert report["balance"]["failed"] == 0
    assert set(report["servers"]) == set(servers.urls)
