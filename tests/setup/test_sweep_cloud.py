"""Sweeps on slices and on a cluster: the launcher, with stand-ins for gcloud, xpk and kubectl."""

import json
import os
import subprocess
import sys
import time

import pytest
from etils import epath
from fake_checkout import ROOT, program
from test_tpu_gke import CREATE, DELETE, DONE, FAILED, NO_WORKLOAD, NOT_YET, REFUSALS, Cluster
from test_tpu_slices import ALWAYS, Cloud

from experiments import cloud as clouds
from experiments import launch, manifest
from experiments.sweep import Results, point
from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout.dataset import FORMAT

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
    """Points without a grading, which would need a real run."""
    return [point("arithmetic", {"objective": "oapl", "seed": seed}, split="") for seed in seeds]


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


def on_slices(cloud, root, of, *more, slices=1):
    scripts = cloud.checkout / "tpu_setup"
    backend = clouds.Slices(root, [*SLICE, *more], slices=slices, scripts=scripts)
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


LEAVES_A_RESULT = """
for word; do
  [[ $word == --workdir=* ]] || continue
  mkdir -p "${word#*=}"
  echo '{"after": {}}' >"${word#*=}/result.json"
done
"""
STUB = '#!/bin/bash\necho "+$*" >>"{log}"\nsleep 0.3\n{result}echo - >>"{log}"\n'


def test_no_more_slices_than_allowed(tmp_path):
    log, root = tmp_path / "log", epath.Path(tmp_path / "sweep")
    for name in ("watch.sh", "delete.sh"):
        program(tmp_path / "scripts" / name, STUB.format(log=log, result=LEAVES_A_RESULT))
    backend = clouds.Slices(root, [*SLICE, "--name=s"], slices=2, scripts=tmp_path / "scripts")
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


# Stands in for Python on the launcher's machine: notes its words, publishes, records and grades.
HERE = """#!/bin/bash
echo "${{*:2}}" >>"{log}"
for word; do
  case $word in --to=*) to=${{word#*=}} ;; --step=*) step=${{word#*=}} ;; esac
done
case $2 in
  oapl_jax.publish) mkdir -p "$to/v00000$step" && touch "$to/v00000$step/COMMITTED" ;;
  oapl_jax.record)
    mkdir -p "$to" && echo '{manifest}' >"$to/manifest.json" ;;
  oapl_jax.evaluate) printf '| a table |\\n{{"pass@1": 0.5, "lengths": [1, 2]}}\\n' ;;
esac
"""
SHARDS = {"groups-00000.array_record": {"xxh128": "abc"}}
RECORDED = {"format": FORMAT, "about": {}, "weights": {}, "shards": SHARDS}


def stubs(tmp_path, monkeypatch):
    """Scripts that train at once, and commands of the launcher's machine; returns their log."""
    log = tmp_path / "log"
    log.touch()
    for name in ("watch.sh", "delete.sh", "gke/watch.sh", "gke/delete_workload.sh"):
        (tmp_path / "scripts" / name).parent.mkdir(exist_ok=True, parents=True)
        program(tmp_path / "scripts" / name, STUB.format(log=log, result=LEAVES_A_RESULT))
    program(tmp_path / "here", HERE.format(log=log, manifest=json.dumps(RECORDED)))
    monkeypatch.setattr(clouds.sys, "executable", os.fspath(tmp_path / "here"))
    return log


@pytest.mark.parametrize("to", ["queued", "xpk"])
def test_a_sweep_of_rounds_ends(to, tmp_path, monkeypatch):
    """Warm-up, recorded dataset, training on it, and a training that starts from that."""
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")
    values = {"objective": "oapl", "mesh.fsdp": 64, "num_steps": 4, "lag.steps": 4}
    start = point("arithmetic", values, kind="warm_up", split="test")
    stream = point("arithmetic", values, kind="generate", start=start, prompts=4, split="")
    one = point("arithmetic", values, start=start, stream=stream, publish=True)
    two = point("arithmetic", values, start=one)
    scripts = tmp_path / "scripts"
    backend = (
        clouds.Slices(root, SLICE, slices=2, scripts=scripts)
        if to == "queued"
        else clouds.Cluster(root, CLUSTER, scripts=scripts)
    )
    launch.launch(lambda add: add(two), "paper", root, backend, stale_points="show", clean=False)
    assert states(root, [start, stream, one, two]) == ["ended"] * 4
    results = Results(root)
    assert [results.line(each)["test"] for each in (start, two)] == [{"pass@1": 0.5}] * 2
    assert results.line(stream)["shards"] == ["abc"]
    words = log.read_text().splitlines()
    trained = [line for line in words if "--workdir" in line and line[0] == "+"]
    assert len(trained) == 3
    assert "--config.num_steps=0" in trained[0]
    assert all("--config.mesh.fsdp=64" in line for line in trained)
    here = [line for line in words if line.startswith(("oapl_jax.record", "oapl_jax.evaluate"))]
    assert len(here) == 4
    assert all("--config.mesh.fsdp=-1" in line for line in here)


def names(log, script="+"):
    """Workdir and slice of each training, from the log."""
    found = {}
    for line in log.read_text().splitlines():
        words = dict(w.partition("=")[::2] for w in line[1:].split())
        if line.startswith(script) and "--workdir" in words:
            found[words["--workdir"].rpartition("/")[2]] = words["--name"]
    return found


def test_a_point_finds_its_slice_again(tmp_path, monkeypatch):
    """After Ctrl-C, when a slice still trains the second point; a slice of no point is deleted."""
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")
    of = points(0, 1, 2)
    root.mkdir()
    for each in of[:2]:
        manifest.Manifests(root).begin(each, fresh=False)
    rented = {"sweep-0": of[1].key, "sweep-1": "of another sweep", "sweep-5": ""}
    (root / clouds.RENTED).write_text(json.dumps(rented))
    backend = clouds.Slices(root, SLICE, slices=2, scripts=tmp_path / "scripts")
    launch.launch(lambda add: add(*of), "paper", root, backend, stale_points="show", clean=False)
    trained = names(log)
    assert trained[of[1].key] == "sweep-0"
    assert trained[of[0].key] == "sweep-1"
    lines = [line for line in log.read_text().splitlines() if line != "-"]
    deleted = [line.rpartition("=")[2] for line in lines if "--workdir" not in line]
    assert deleted == ["sweep-1", "sweep-0", "sweep-1", "sweep-5"]  # before its use; at the end
    assert json.loads((root / clouds.RENTED).read_text()) == {}


def test_a_point_finds_its_slice_under_another_name(tmp_path, monkeypatch):
    """A launch with fewer slices, or another prefix, goes on with those that train."""
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")
    of = points(0, 1)
    root.mkdir()
    for each in of:
        manifest.Manifests(root).begin(each, fresh=False)
    rented = {f"old-{each.seed}": each.key for each in of}
    (root / clouds.RENTED).write_text(json.dumps(rented))
    backend = clouds.Slices(root, SLICE, slices=1, scripts=tmp_path / "scripts")
    launch.launch(lambda add: add(*of), "paper", root, backend, stale_points="show", clean=False)
    assert names(log) == {each.key: f"old-{each.seed}" for each in of}


def test_a_slice_whose_training_ended_meanwhile_is_free(tmp_path, monkeypatch):
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")
    of = points(0, 1)
    of[0].workdir(root).mkdir(parents=True)
    (of[0].workdir(root) / "result.json").write_text("{}")
    (root / clouds.RENTED).write_text(json.dumps({"sweep-0": of[0].key}))
    backend = clouds.Slices(root, SLICE, slices=1, scripts=tmp_path / "scripts")
    launch.launch(lambda add: add(*of), "paper", root, backend, stale_points="show", clean=False)
    assert states(root, of) == ["ended", "ended"]
    assert names(log) == {of[1].key: "sweep-0"}


@pytest.mark.parametrize("to", ["queued", "xpk"])
def test_nothing_of_a_broken_try_goes_on(to, tmp_path, monkeypatch):
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")
    (each,) = points(0)
    root.mkdir()
    manifest.Manifests(root).begin(each, fresh=False)
    manifest.Manifests(root).end(each, "broken", reason="disk")
    (root / clouds.RENTED).write_text(json.dumps({"sweep-0": each.key}))
    scripts = tmp_path / "scripts"
    backend = (
        clouds.Slices(root, SLICE, slices=1, scripts=scripts)
        if to == "queued"
        else clouds.Cluster(root, CLUSTER, scripts=scripts)
    )
    launch.launch(lambda add: add(each), "paper", root, backend, stale_points="show", clean=False)
    first = log.read_text().splitlines()[0]
    assert "--workdir" not in first
    assert f"--workload=sweep-{each.key}" in first or "--name=sweep-0" in first


def test_slices_are_deleted_after_an_error(tmp_path, monkeypatch):
    log, root = stubs(tmp_path, monkeypatch), epath.Path(tmp_path / "sweep")

    def run(self, sweep, form, backend):
        raise RunError("another machine")

    monkeypatch.setattr(launch.Launcher, "run", run)
    root.mkdir()
    (root / clouds.RENTED).write_text('{"sweep-0": ""}')
    backend = clouds.Slices(root, SLICE, slices=1, scripts=tmp_path / "scripts")
    with pytest.raises(RunError):
        launch.launch(lambda add: None, "paper", root, backend, stale_points="show", clean=False)
    assert "--name=sweep-0" in log.read_text()


def test_a_stop_ends_the_scripts_at_once(tmp_path):
    """Also of points that wait for a slice, or are about to start; the slice stays known."""
    for number in range(3):
        root = epath.Path(tmp_path / f"sweep-{number}")
        root.mkdir()
        program(tmp_path / "scripts/watch.sh", "#!/bin/bash\nsleep 600\n")
        backend = clouds.Slices(root, SLICE, slices=1, scripts=tmp_path / "scripts")
        waiting = [backend.submit(each, again=False) for each in points(0, 1)]
        time.sleep(0.1 * number)
        started = time.monotonic()
        backend.close()
        assert time.monotonic() - started < 30
        assert all(future.cancelled() or future.exception() for future in waiting)
    (key,) = json.loads((root / clouds.RENTED).read_text()).values()
    assert key in [each.key for each in points(0, 1)]


def test_uncommitted_changes_are_not_launched(monkeypatch):
    commit = {"commit": "abc", "uncommitted": False}
    monkeypatch.setattr(clouds, "checkout", lambda: commit)
    assert clouds.at_this_commit([], dry_run=False) == ["--commit=abc"]
    commit["uncommitted"] = True
    assert clouds.at_this_commit(["--commit=HEAD"], dry_run=True) == ["--commit=abc"]
    with pytest.raises(UserError):
        clouds.at_this_commit([], dry_run=False)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster on which a workload that is done leaves a result."""
    cluster = Cluster(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    watch = cluster.checkout / "tpu_setup/gke/watch.sh"
    watch.rename(watch.with_name("watching.sh"))
    program(watch, f'#!/bin/bash\nset -e\n"${{0%/*}}/watching.sh" "$@"\n{LEAVES_A_RESULT}')
    return cluster


def on_cluster(cluster, root, each):
    """Launches a point, of which the stand-in's story is all but the result."""
    each.workdir(root).mkdir(parents=True, exist_ok=True)
    backend = clouds.Cluster(root, CLUSTER, scripts=cluster.checkout / "tpu_setup")
    launch.launch(lambda add: add(each), "paper", root, backend, stale_points="show", clean=False)


@pytest.mark.parametrize(
    ("looks", "fail", "created"),
    [
        ([NO_WORKLOAD, NOT_YET, FAILED, NO_WORKLOAD, DONE], {}, 2),  # preempted too often
        ([NO_WORKLOAD, NO_WORKLOAD, DONE], {"workload_create": 1}, 2),  # no network
        ([NOT_YET, DONE], {"workload_list": 1}, 1),
    ],
)
def test_a_point_survives_what_happens_on_a_cluster(cluster, looks, fail, created):
    root, (each,) = epath.Path(cluster.folder / "sweep"), points(0)
    cluster.play(fail, looks=looks, reason="ReachedMaxRestarts")
    on_cluster(cluster, root, each)
    assert states(root, [each]) == ["ended"]
    creations = [words for words in cluster.all_calls() if words[:2] == CREATE.split()]
    assert len(creations) == created
    assert all(f"--workload=sweep-{each.key}" in words for words in creations)


def test_a_refused_workload_is_broken_and_tried_again(cluster):
    root, (each,) = epath.Path(cluster.folder / "sweep"), points(0)
    says = REFUSALS["quota"]
    cluster.play({"workload_create": ALWAYS}, looks=[NO_WORKLOAD] * 9, reason="", says=says)
    with pytest.raises(RunError):
        on_cluster(cluster, root, each)
    assert states(root, [each]) == ["broken"]
    cluster.play({}, looks=[NO_WORKLOAD, DONE], reason="")
    on_cluster(cluster, root, each)
    assert states(root, [each]) == ["ended"]
    assert DELETE in cluster.verbs()  # a workload's name can be used once


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
        lambda root: clouds.Slices(root, SLICE[1:], slices=1),
        lambda root: clouds.Slices(root, [*SLICE, "spot"], slices=1),
        lambda root: clouds.Cluster(root, CLUSTER[:2]),
        lambda root: clouds.at_this_commit(["--commit=HEAD~1"], dry_run=False),
    ],
)
def test_flags_are_checked_before_anything_is_rented(make, tmp_path):
    with pytest.raises(UserError):
        make(epath.Path(tmp_path))
