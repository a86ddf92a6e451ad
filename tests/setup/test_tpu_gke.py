"""Watching a run on a cluster, against stand-ins for xpk and kubectl that act out a story."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# The codes of `xpk workload list --wait-for-job-completion`, as xpk 1.16.0 gives them.
DONE, NO_WORKLOAD, NOT_YET, FAILED = 0, 1, 124, 125

# Acts out story.json: `looks`, the codes of the looks in turn, and `fail`, how often another
# command fails.
XPK = """
import json, os, pathlib, sys
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
story, words = json.loads((cloud / "story.json").read_text()), sys.argv[1:]
name = " ".join(words[:2]) if words[0] != "get" else "kubectl"
with (cloud / "calls").open("a") as calls:
    print(json.dumps(words), file=calls)
left = story["fail"].get(name, 0)
story["fail"][name] = left - 1
code = 7 if left > 0 else story["looks"].pop(0) if name == "workload list" else 0
(cloud / "story.json").write_text(json.dumps(story))
if name == "kubectl":
    print(story["reason"], end="")
sys.exit(code)
"""


class Cluster:
    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        shutil.copytree(ROOT / "tpu_setup", folder / "checkout/tpu_setup")
        git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", folder / "checkout"]
        for words in (["init"], ["add", "--all"], ["commit", "--message=m"]):
            subprocess.run([*git, *words], check=True, capture_output=True)
        (folder / "bin").mkdir()
        for name in ("xpk", "kubectl"):
            (folder / "bin" / name).write_text(f"#!{sys.executable} -SE\n{XPK}")
            (folder / "bin" / name).chmod(0o755)

    def watch(
        self, looks: list[int], *more: str, reason: str = "ReachedMaxRestarts", **fail: int
    ) -> subprocess.CompletedProcess[str]:
        story = dict(looks=looks, reason=reason)
        story["fail"] = {name.replace("_", " "): times for name, times in fail.items()}
        (self.folder / "story.json").write_text(json.dumps(story))
        flags = ["--project=p", "--zone=z", "--cluster=c", "--workload=w", "--topology=v6e:8x8"]
        flags += ["--config=configs/arithmetic.py", "--workdir=/mnt/oapl/run", "--poll=0", *more]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [self.folder / "checkout/tpu_setup/gke/watch.sh", *flags, "--", "--config.seed=1"],
            env=os.environ | dict(PATH=path, FAKE_CLOUD=os.fspath(self.folder)),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self) -> list[str]:
        return [" ".join(words[:2]) for words in self.calls()]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    return Cluster(tmp_path)


LOOK, CREATE, REASON, DELETE = "workload list", "workload create", "get jobset", "workload delete"


def test_from_no_workload_to_the_end(cluster):
    done = cluster.watch([NO_WORKLOAD, NOT_YET, DONE], "--delete-cluster-at-end")
    assert done.returncode == 0, done.stderr
    assert cluster.verbs() == [LOOK, CREATE, LOOK, LOOK, "cluster delete"]
    assert "waits for the end of the run, at most 604800 s" in done.stderr
    assert "the run is done" in done.stderr
    (source,) = [w.partition("=")[2] for w in cluster.calls()[1] if w.startswith("--script-dir")]
    assert (pathlib.Path(source) / "tpu_setup/on_worker/install.sh").exists()
    assert "--wait-for-job-completion=w" in cluster.calls()[0]


def test_a_workload_that_used_up_its_restarts_is_created_anew(cluster):
    done = cluster.watch([NOT_YET, FAILED, NO_WORKLOAD, DONE])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs() == [LOOK, LOOK, REASON, DELETE, LOOK, CREATE, LOOK]
    assert "the cluster is billed until: " in done.stderr


def test_but_not_for_ever(cluster):
    done = cluster.watch([FAILED, NO_WORKLOAD] * 3, "--renewals=2")
    assert done.returncode == 1
    assert cluster.verbs().count(CREATE) == 2
    assert "the workload used up its restarts 3 times" in done.stderr


def test_a_mistake_in_a_setting_is_not_tried_again(cluster):
    reason = "FailJobSetFailurePolicyAction"
    done = cluster.watch([FAILED], "--delete-cluster-at-end", reason=reason)
    assert done.returncode == 1
    assert cluster.verbs() == [LOOK, REASON, "cluster delete"]
    assert f"the run failed ({reason}), and a restart can't mend it" in done.stderr


def test_what_fails_is_tried_again_until_the_deadline(cluster):
    done = cluster.watch([NO_WORKLOAD] * 3 + [DONE], workload_create=2)
    assert done.returncode == 0, done.stderr
    assert "waits for the workload, at most 1800 s" in done.stderr
    done = cluster.watch([NO_WORKLOAD] * 1000, "--service-deadline=1", workload_create=10**6)
    assert done.returncode == 1
    assert "the workload did not come within 1 s" in done.stderr
    done = cluster.watch([FAILED] * 1000, "--service-deadline=1", kubectl=10**6)
    assert done.returncode == 1
    assert "the answer of kubectl did not come within 1 s" in done.stderr


def test_the_watch_has_a_deadline(cluster):
    done = cluster.watch([NOT_YET] * 1000, "--deadline=1")
    assert done.returncode == 1
    assert "not done within 1 s" in done.stderr


def test_a_mistake_in_a_flag_shows_before_anything_is_asked(cluster):
    done = cluster.watch([NO_WORKLOAD], "--topology=v6e:8x9")
    assert done.returncode == 2
    assert "--topology=v6e:8x9 is not a slice" in done.stderr
    assert not (cluster.folder / "calls").exists()
