"""Sweeps on slices and on a cluster: the launcher, with stand-ins for gcloud, xpk and kubectl."""

import os
import subprocess
import sys

import pytest
from etils import epath
from fake_checkout import ROOT, program
from test_tpu_gke import CREATE, DONE, FAILED, NO_WORKLOAD, NOT_YET, Cluster
from test_tpu_slices import ALWAYS, Cloud

from experiments import cloud as clouds
from experiments import launch, manifest
from experiments.sweep import Results, point
from oapl_jax.errors import RunError, UserError

SLICE = ["--project=p", "--zone=z", "--topology=v6e:4x4", "--spot", "--share=10.0.0.2:/oapl"]
SLICE += ["--poll=0"]
CLUSTER = ["--project=p", "--zone=z", "--cluster=c", "--topology=v6e:8x8", "--poll=0"]
# A run that ends with a result in its own workdir; `start` counts the starts on this worker.
TRAINS = """
workdir = pathlib.Path([w.partition("=")[2] for w in sys.argv if w.startswith("--workdir=")][0])

def finish():
    print("done", flush=True)
    (workdir / "result.json").write_text('{"after": {}}')
"""
RESUMES = f"{TRAINS}\nfinish() if start > 1 else work()"


def points(*seeds):
    return [point("arithmetic", {"objective": "oapl", "seed": seed}) for seed in seeds]


def states(root, of):
    results = Results(root, code=manifest.checkout()["code"])
    return [manifest.Manifests(root).state(each, results) for each in of]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path)
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    yield cloud
    cloud.end()


def on_slices(cloud, root, of, *more, at_once=1):
    scripts = cloud.checkout / "tpu_setup"
    backend = clouds.Slices(root, [*SLICE, *more], at_once=at_once, scripts=scripts)
    launch.launch(lambda add: add(*of), "paper", root, backend, stale_points="show", clean=False)


@pytest.mark.parametrize(
    ("lives", "fail", "trainer"),
    [
        (["ACTIVE* SUSPENDED", "ACTIVE"], {}, RESUMES),  # preempted
        (["ACTIVE"], {"create": 2}, f"{TRAINS}\nfinish()"),  # no quota
        (["ACTIVE"], {"ssh_1": 2, "list": 1}, f"{TRAINS}\nfinish()"),  # no network
    ],
)
def test_a_point_survives_what_happens_to_slices(cloud, lives, fail, trainer):
    root = epath.Path(cloud.folder / "sweep")
    of = points(0)
    cloud.tell(*lives, trainer=trainer, workers=2, **fail)
    on_slices(cloud, root, of)
    assert states(root, of) == ["ended"]
    assert cloud.calls()[-1] == "delete"
    workdir = os.fspath(of[0].workdir(root))
    assert {f"--workdir={workdir}" in line for line in cloud.starts()} == {True}
    assert all("--config.seed=0" in line for line in cloud.starts())


def test_a_slice_goes_on_to_the_next_point_and_ended_ones_are_not_repeated(cloud):
    root = epath.Path(cloud.folder / "sweep")
    cloud.tell("ACTIVE", trainer=f"{TRAINS}\nfinish()", workers=1)
    on_slices(cloud, root, points(0, 1))
    assert cloud.calls("create") == ["create"]
    assert len(cloud.starts()) == 2
    cloud.tell("ACTIVE", trainer=f"{TRAINS}\nfinish()", workers=1)
    on_slices(cloud, root, points(0, 1, 2))
    assert len(cloud.starts()) == 3


def test_a_point_without_a_slice_is_broken_and_tried_again(cloud):
    root = epath.Path(cloud.folder / "sweep")
    cloud.tell("ACTIVE", trainer=f"{TRAINS}\nfinish()", workers=1, create=ALWAYS)
    with pytest.raises(RunError):
        on_slices(cloud, root, points(0), "--service-deadline=1")
    assert states(root, points(0)) == ["broken"]
    cloud.tell("ACTIVE", trainer=f"{TRAINS}\nfinish()", workers=1)
    on_slices(cloud, root, points(0))
    assert states(root, points(0)) == ["ended"]


def test_an_invalid_setting_breaks_its_point_alone(cloud):
    root = epath.Path(cloud.folder / "sweep")
    refuse = f"{TRAINS}\nsys.exit(2) if '--config.seed=0' in sys.argv else finish()"
    cloud.tell("ACTIVE", trainer=refuse, workers=1)
    with pytest.raises(RunError):
        on_slices(cloud, root, points(0, 1))
    assert states(root, points(0, 1)) == ["broken", "ended"]


STUB = """#!/bin/bash
echo "+$*" >>"{log}"
sleep 0.3
for word; do
  [[ $word == --workdir=* ]] || continue
  mkdir -p "${{word#*=}}"
  echo '{{"after": {{}}}}' >"${{word#*=}}/result.json"
done
echo - >>"{log}"
"""


def test_no_more_slices_than_allowed(tmp_path):
    log, root = tmp_path / "log", epath.Path(tmp_path / "sweep")
    for name in ("watch.sh", "delete.sh"):
        program(tmp_path / "scripts" / name, STUB.format(log=log))
    backend = clouds.Slices(root, [*SLICE, "--name=s"], at_once=2, scripts=tmp_path / "scripts")
    launch.launch(
        lambda add: add(*points(*range(5))),
        "paper",
        root,
        backend,
        stale_points="show",
        clean=False,
    )
    active, most = 0, 0
    for line in log.read_text().splitlines():
        active += 1 if line[0] == "+" else -1
        most = max(most, active)
    assert most == 2
    names = {w for line in log.read_text().splitlines() for w in line[1:].split() if "--name=" in w}
    assert names == {"--name=s-0", "--name=s-1"}


def test_a_cluster_has_one_workload_a_point(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    cluster.play(
        {}, looks=[NO_WORKLOAD, NOT_YET, FAILED, NO_WORKLOAD, DONE], reason="ReachedMaxRestarts"
    )
    root = epath.Path(tmp_path / "sweep")
    (each,) = points(0)
    each.workdir(root).mkdir(parents=True)
    (each.workdir(root) / "result.json").write_text('{"after": {}}')
    scripts = tmp_path / "checkout/tpu_setup"
    backend = clouds.Cluster(root, CLUSTER, scripts=scripts)
    launch.launch(lambda add: add(each), "paper", root, backend, stale_points="show", clean=False)
    assert states(root, [each]) == ["ended"]
    assert cluster.verbs().count(CREATE) == 2
    create = next(words for words in cluster.all_calls() if words[:2] == CREATE.split())
    assert f"--workload=sweep-{each.key}" in create


@pytest.mark.parametrize("to", ["queued", "xpk"])
def test_a_dry_run_prints_the_commands_of_each_point(to, tmp_path):
    flags = {"queued": SLICE, "xpk": CLUSTER}[to]
    command = [sys.executable, "-m", "experiments.launch", f"--to={to}", "--dry-run"]
    command += ["--experiment=experiments/steps.py", f"--root={tmp_path}/sweep", "--", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    made = {"queued": "queued-resources create", "xpk": "xpk workload create"}[to]
    assert done.stdout.count(made) == 2
    assert all(f"objective={name}" in done.stdout for name in ("oapl", "grpo_is"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda root: clouds.Slices(root, SLICE[1:], at_once=1),
        lambda root: clouds.Slices(root, [*SLICE, "spot"], at_once=1),
        lambda root: clouds.Cluster(root, CLUSTER[:2]),
        lambda root: clouds.train_flags(
            point("arithmetic", {"objective": "oapl"}, kind="warm_up"), root
        ),
    ],
)
def test_flags_are_checked_before_anything_is_rented(make, tmp_path):
    with pytest.raises(UserError):
        make(epath.Path(tmp_path))
