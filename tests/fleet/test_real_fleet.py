"""The fleet over real SGLang servers, against the learner's own model."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from fleets import CLOSE, Run, assert_published, difference, open_real_fleet, wait_until
from server_processes import ROOT, find_port

from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

STEPS = 64  # of the shortened default job
LAG = 16  # gradient steps between two versions, the default's
DEADLINE = 480.0  # seconds


@pytest.fixture
def make_fleet(published, stack):
    """Opens a fleet of real servers, which load `version` if it is given."""

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


@pytest.mark.parametrize(("allow_older", "drain_deadline"), [(False, 0.0), (True, 60.0)])
def test_a_refresh_under_load_mixes_no_group(
    make_fleet, servers, published, allow_older, drain_deadline
):
    fleet = make_fleet(servers.urls, allow_older=allow_older, drain_deadline=drain_deadline)

    def pull():
        """Refreshes from inside the pull, as a worker does."""
        for index in range(90):
            if index % 15 == 0:
                version = 1 + index // 15 % 3
                fleet.refresh(version, published.path(version))
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
    """By the ledger no group is lost or duplicated; requests of the victim are retried."""
    port, steady = find_port(), servers.servers[0]
    victim = start_server(published.path(1), port)
    fleet = make_fleet([steady.url, victim.url], version=3)
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
    back = start_server(published.path(1), port, wait=False)
    wait_until(lambda: fleet.of(victim, "state") == "ready", "the return", fleet.patience)
    assert back.ask("/model_info")["weight_version"] == "3"
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


def test_the_default_job_learns_on_a_fleet(servers, tmp_path):
    """Shortened, with rollouts from two real SGLang servers."""
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"),
        *(f"--workdir={workdir}", f"--config.data.data_dir={tmp_path}/data"),
        *(f"--config.num_steps={STEPS}", "--config.evaluation.every=1000"),
        *("--config.rollout.sampler=fleet", "--config.rollout.overlap=True"),
        f"--config.fleet.servers={tuple(servers.urls)}",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=DEADLINE)

    result = json.loads((workdir / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["pass@1"] >= before["pass@1"] + 0.30, (before, after)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lag/max" in line]
    assert max(line["lag/max"] for line in steps) == LAG - 1
    refreshed = max(line.get("fleet/refreshed", 0) for line in steps)
    assert refreshed >= 2 * 3, "each server loaded at least three versions"

    ledger = [sys.executable, "-m", "oapl_jax.report", str(workdir), "--json"]
    printed = subprocess.run(
        ledger, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, timeout=60
    ).stdout
    report = json.loads(printed)
    assert report["balanced"]
    assert report["balance"]["trained"] == STEPS * 32 * 8
    assert report["balance"]["failed"] == 0
    assert set(report["servers"]) == set(servers.urls)
