"""Watching a run on a cluster, with fakes of xpk and kubectl that play a story."""

import json
import pathlib
import subprocess
import sys

import pytest
from fake_checkout import Checkout, program

# Exit codes of `xpk workload list --wait-for-job-completion` (xpk 1.16.0).
DONE, NO_WORKLOAD, NOT_YET, FAILED = 0, 1, 124, 125

# Plays story.json: `looks`, the exit codes of the polls in turn, and `fail`, the number of failures
# of another command.
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


class Cluster(Checkout):
    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        for name in ("xpk", "kubectl"):
            program(folder / "bin" / name, f"#!{sys.executable} -SE\n{XPK}")

    def watch(
        self, looks: list[int], *more: str, reason: str = "ReachedMaxRestarts", **fail: int
    ) -> subprocess.CompletedProcess[str]:
        story = dict(looks=looks, reason=reason)
        story["fail"] = {name.replace("_", " "): times for name, times in fail.items()}
        (self.folder / "story.json").write_text(json.dumps(story))
        flags = ["--project=p", "--zone=z", "--cluster=c", "--workload=w", "--topology=v6e:8x8"]
        flags += ["--config=configs/arithmetic.py", "--workdir=/mnt/oapl/run", "--poll=0", *more]
        return subprocess.run(
            [self.folder / "checkout/tpu_setup/gke/watch.sh", *flags, "--", "--config.seed=1"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self) -> list[str]:
        return [" ".join(words[:2]) for words in self.calls()]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


LOOK, CREATE, REASON, DELETE = "workload list", "workload create", "get jobset", "workload delete"


def test_from_no_workload_to_the_end(cluster):
    done = cluster.watch([NO_WORKLOAD, NOT_YET, DONE], "--delete-cluster-at-end")
    assert done.returncode == 0, done.stderr
    assert cluster.verbs() == [LOOK, CREATE, LOOK, LOOK, "cluster delete"]
    (source,) = [w.partition("=")[2] for w in cluster.calls()[1] if w.startswith("--script-dir")]
    assert (pathlib.Path(source) / "tpu_setup/on_worker/install.sh").exists()
    assert "--wait-for-job-completion=w" in cluster.calls()[0]


def test_a_workload_that_used_up_its_restarts_is_recreated(cluster):
    done = cluster.watch([NOT_YET, FAILED, NO_WORKLOAD, DONE])
    assert done.returncode == 0, done.stderr
    assert cluster.verbs() == [LOOK, LOOK, REASON, DELETE, LOOK, CREATE, LOOK]


def test_renewals_are_limited(cluster):
    assert cluster.watch([FAILED, NO_WORKLOAD] * 3, "--renewals=2").returncode == 1
    assert cluster.verbs().count(CREATE) == 2


def test_an_invalid_setting_is_not_retried(cluster):
    reason = "FailJobSetFailurePolicyAction"
    done = cluster.watch([FAILED], "--delete-cluster-at-end", reason=reason)
    assert done.returncode == 1
    assert cluster.verbs() == [LOOK, REASON, "cluster delete"]
    assert reason in done.stderr


def test_failing_calls_are_retried_until_their_deadline(cluster):
    done = cluster.watch([NO_WORKLOAD] * 3 + [DONE], workload_create=2)
    assert done.returncode == 0, done.stderr
    for looks, failing in ((NO_WORKLOAD, "workload_create"), (FAILED, "kubectl")):
        done = cluster.watch([looks] * 1000, "--service-deadline=1", **{failing: 10**6})
        assert done.returncode == 1
        assert "after 1 s" in done.stderr


def test_the_watch_has_a_deadline(cluster):
    assert cluster.watch([NOT_YET] * 1000, "--deadline=1").returncode == 1


def test_an_invalid_flag_is_an_error_before_any_call(cluster):
    done = cluster.watch([NO_WORKLOAD], "--topology=v6e:8x9")
    assert (done.returncode, "--topology" in done.stderr) == (2, True)
    assert not (cluster.folder / "calls").exists()
