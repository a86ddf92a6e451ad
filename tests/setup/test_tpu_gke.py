"""Watching a run on a cluster, with fakes of xpk and kubectl that play a story."""

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

    def watch(self, looks, *more: str, code=0, reason="ReachedMaxRestarts", **fail: int) -> str:
        """Runs the watch, checks its exit code, and returns its messages."""
        self.play(fail, looks=looks, reason=reason)
        flags = ["--project=p", "--zone=z", "--cluster=c", "--workload=w", "--topology=v6e:8x8"]
        flags += ["--config=configs/arithmetic.py", "--workdir=/mnt/oapl/run", "--poll=0", *more]
        done = subprocess.run(
            [self.folder / "checkout/tpu_setup/gke/watch.sh", *flags, "--", "--config.seed=1"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    def verbs(self) -> list[str]:
        return [" ".join(words[:2]) for words in self.all_calls()]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


LOOK, CREATE, REASON, DELETE = "workload list", "workload create", "get jobset", "workload delete"


def test_from_no_workload_to_the_end(cluster):
    cluster.watch([NO_WORKLOAD, NOT_YET, DONE], "--delete-cluster-at-end")
    assert cluster.verbs() == [LOOK, CREATE, LOOK, LOOK, "cluster delete"]
    look, create, *_ = cluster.all_calls()
    (source,) = [w.partition("=")[2] for w in create if w.startswith("--script-dir")]
    assert (pathlib.Path(source) / "tpu_setup/on_worker/install.sh").exists()
    assert "--wait-for-job-completion=w" in look


def test_a_workload_that_used_up_its_restarts_is_recreated(cluster):
    cluster.watch([NOT_YET, FAILED, NO_WORKLOAD, DONE])
    assert cluster.verbs() == [LOOK, LOOK, REASON, DELETE, LOOK, CREATE, LOOK]


def test_renewals_are_limited(cluster):
    cluster.watch([FAILED, NO_WORKLOAD] * 3, "--renewals=2", code=1)
    assert cluster.verbs().count(CREATE) == 2


def test_an_invalid_setting_is_not_retried(cluster):
    reason = "FailJobSetFailurePolicyAction"
    assert reason in cluster.watch([FAILED], "--delete-cluster-at-end", reason=reason, code=1)
    assert cluster.verbs() == [LOOK, REASON, "cluster delete"]


def test_failing_calls_are_retried_until_their_deadline(cluster):
    cluster.watch([NO_WORKLOAD] * 3 + [DONE], workload_create=2)
    for looks, failing in ((NO_WORKLOAD, "workload_create"), (FAILED, "kubectl")):
        fail = {failing: 10**6}
        message = cluster.watch([looks] * 1000, "--service-deadline=1", code=1, **fail)
        assert "after 1 s" in message


def test_the_watch_has_a_deadline(cluster):
    cluster.watch([NOT_YET] * 1000, "--deadline=1", code=1)


def test_an_invalid_flag_is_an_error_before_any_call(cluster):
    assert "--topology" in cluster.watch([NO_WORKLOAD], "--topology=v6e:8x9", code=2)
    assert not (cluster.folder / "calls").exists()
