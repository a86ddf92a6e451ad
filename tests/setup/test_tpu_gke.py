"""Watching a run on a cluster, with fakes of xpk and kubectl that play a story."""

import pathlib
import subprocess
import sys

import pytest
from fake_checkout import Checkout, program

# Exit codes of `xpk workload list --wait-for-job-completion` (xpk 1.16.0).
DONE, NO_WORKLOAD, NOT_YET, FAILED = 0, 1, 124, 125

# Plays story.json: `looks`, the exit codes of the polls in turn, and `fail`, the number of failures
# of another command, and `says`, the message of a failure.
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
if left > 0:
    print(story["says"], file=sys.stderr if name == "kubectl" else sys.stdout)
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
        self,
        looks,
        *more: str,
        code=0,
        reason="ReachedMaxRestarts",
        says="ERROR: on order",
        **fail: int,
    ) -> str:
        """Runs the watch, checks its exit code, and returns its messages."""
        self.play(fail, looks=looks, reason=reason, says=says)
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


TAKEN = "[XPK] w already exists, XPK will not create the workload. Please pick a new workload name"
GET = "[XPK] b'ERROR: (gcloud.container.clusters.get-credentials) ResponseError: "
REFUSALS = {
    "permission": GET + 'code=403, message=Required "container.clusters.get" permission(s).\'',
    "quota": GET + 'code=403, message=Insufficient regional quota to satisfy request: "CPUS".\'',
    "login": GET + "You do not currently have an active account selected.'",
    "image": 'denied: Permission "artifactregistry.repositories.uploadArtifacts" denied',
    "name taken": TAKEN,
}
FORBIDDEN = 'Error from server (Forbidden): jobsets "w" is forbidden: User "me" cannot get resource'


@pytest.mark.parametrize("says", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_that_no_wait_mends_ends_the_watch(cluster, says):
    refused = dict(workload_create=10**6, says=f"Layer already exists\n{says}")
    cluster.watch([NO_WORKLOAD, NO_WORKLOAD], "--delete-cluster-at-end", code=2, **refused)
    assert cluster.verbs() == [LOOK, CREATE, LOOK, "cluster delete"]


def test_more_refusals_end_the_watch(cluster):
    cluster.watch([FAILED], code=2, kubectl=10**6, says=FORBIDDEN)
    cluster.watch([FAILED], code=2, workload_delete=10**6, says=REFUSALS["permission"])
    cluster.watch([DONE], code=2, workload_list=10**6, says=REFUSALS["permission"])
    (cluster.folder / "bin/xpk").unlink()
    assert "xpk" in cluster.watch([], code=2)


def test_an_error_that_a_wait_mends_is_retried(cluster):
    said = "Layer already exists\nERROR: (gcloud) Quota exceeded for limit 'Requests per minute'"
    cluster.watch([NO_WORKLOAD] * 3 + [DONE], workload_create=2, says=said)
    assert cluster.verbs().count(CREATE) == 3


def test_a_workload_whose_answer_was_lost_is_watched(cluster):
    cluster.watch([NO_WORKLOAD, NOT_YET, DONE], workload_create=1, says=TAKEN)
    assert cluster.verbs() == [LOOK, CREATE, LOOK, LOOK]


def test_the_watch_has_a_deadline(cluster):
    cluster.watch([NOT_YET] * 1000, "--deadline=1", code=1)


def test_an_invalid_flag_is_an_error_before_any_call(cluster):
    assert "--topology" in cluster.watch([NO_WORKLOAD], "--topology=v6e:8x9", code=2)
    assert not (cluster.folder / "calls").exists()
