"""Watching and serving on slices, with a fake gcloud that plays a story.

The fake runs each worker's commands in a home directory of that worker, with the real scripts of
tpu_setup/on_worker. Installation, mount and training are fakes too.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from fake_checkout import ROOT, Checkout, program

# Plays story.json: `lives`, the states of each request, one a poll, the last for good, and
# "ACTIVE*" until every worker's job has logged a line; `fail`, the number of failures of a
# command, by its name or by "ssh" and the worker's number, "answer" for a request that is made all
# the same; `says`, gcloud's message of a failure.
GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys
cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
story = json.loads((cloud / "story.json").read_text())
request, words = cloud / "request.json", sys.argv[1:]
homes = [cloud / f"worker-{n}" for n in range(story["workers"])]
with (cloud / "calls").open("a") as calls:
    print(json.dumps(words), file=calls)

def write(file, content):
    aside = file.with_suffix(".new")  # it may be interrupted
    aside.write_text(json.dumps(content))
    aside.rename(file)

def fails(name):
    left = story["fail"].get(name, 0)
    story["fail"][name] = left - 1
    write(cloud / "story.json", story)
    return left > 0

def working(home):
    log = home / "job/log"
    return log.exists() and log.stat().st_size

def lose():
    for home in homes:
        pid = home / "job/pid"
        if pid.exists() and not (home / "job/code").exists():
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)

def on(home, command):
    number = home.name.removeprefix("worker-")
    if fails("ssh " + number):
        print(f"##### Command execution on worker {number} failed", file=sys.stderr)
        return 255
    path = f"{cloud}/worker_bin:{os.environ['PATH']}"
    environment = os.environ | dict(HOME=str(home), WORKER=number, PATH=path)
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode

def at(name):
    return cloud / "bucket" / name.removeprefix("gs://")

def generation(file):
    return file.stat().st_mtime_ns if file.exists() else 0

def store(verb, *names):
    if verb == "rsync":
        shutil.copytree(at(names[1]), names[2], dirs_exist_ok=True)
    elif verb == "objects":
        print(generation(at(names[1])))
    elif verb == "cat":
        sys.stdout.write(at(names[0]).read_text())
    else:
        wanted, file, content = int(names[0].partition("=")[2]), at(names[2]), sys.stdin.read()
        if fails(verb):  # another server writes meanwhile
            file.write_text(file.read_text() + "http://10.0.0.7:30000\\n")
        if generation(file) != wanted:
            return 1
        file.write_text(content)

if words[0] == "storage":
    sys.exit(store(*words[1:]))
verb = words[3]
if fails(verb):
    sys.exit(story["says"])
if verb == "create":
    write(request, story["lives"].pop(0))
    write(cloud / "story.json", story)
    for home in homes:
        home.mkdir()
    if fails("answer"):
        sys.exit(story["says"])
elif verb == "list" and request.exists():
    states = json.loads(request.read_text())
    print(states[0].rstrip("*"))
    if states[1:] and (states[0] != "ACTIVE*" or all(map(working, homes))):
        write(request, states[1:])
    if states[0] in ("SUSPENDED", "FAILED"):
        lose()
elif verb == "delete":
    lose()
    request.unlink()
elif verb == "scp":
    for home in homes:
        shutil.copy(words[4], home / words[5].partition(":")[2])
elif verb == "ssh":
    (command,) = [word.removeprefix("--command=") for word in words if "--command=" in word]
    sys.exit(max([on(home, command) for home in homes]))
"""

# Programs of a worker: they install and mount nothing, and Python is the story's trainer.
WORKER_BIN = {
    "sudo": 'echo "$*" >>$FAKE_CLOUD/installed',
    "mountpoint": "exit 1",
    "df": "echo Mounted on; echo ${FAKE_MOUNT:-/mnt/oapl}",
    "sleep": "exec /bin/sleep 0.01",
    "hostname": '[[ $* != -I ]] || exec echo "10.0.0.$WORKER 172.17.0.1"; echo worker-$WORKER',
    "python3": """echo "$*" >>$FAKE_CLOUD/installed
        if [[ "$2 $3" == "uv venv" ]]; then
          mkdir -p "${@: -1}/bin"; cp "$FAKE_CLOUD/python" "${@: -1}/bin/"
        fi""",
}
# Replaces oapl_jax/train.py; `start` counts the starts on this worker.
TRAINER = """
import os, pathlib, sys, time
cloud, worker = pathlib.Path(os.environ["FAKE_CLOUD"]), os.environ["WORKER"]
with (cloud / "starts").open("a") as file:
    print(worker, os.getcwd(), os.environ["JAX_PLATFORMS"], *sys.argv[1:], end=" ", file=file)
    print(os.environ.get("LIBTPU_INIT_ARGS", ""), file=file)
start = sum(line[0] == worker for line in (cloud / "starts").open())

def finish():
    print("done", flush=True)
    (cloud / "run/result.json").write_text("{}")

def work():
    print("step", start, flush=True)
    time.sleep(600)
"""
RESUME = "finish() if start > 1 else work()"
ALWAYS = 10**6


class Cloud(Checkout):
    """A fake cloud with its own checkout of the scripts."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        for name, text in WORKER_BIN.items():
            program(folder / "worker_bin" / name, f"#!/bin/bash\n{text}\n")
        there = f"PYTHONPATH={folder / 'package'}"
        program(folder / "python", f'#!/bin/bash\n{there} exec {sys.executable} -S "$@"\n')
        program(folder / "bin/gcloud", f"#!{sys.executable} -SE\n{GCLOUD}")

    def tell(
        self,
        *lives: str,
        trainer: str = "finish()",
        workers: int = 2,
        says: str = "ERROR: on order",
        **fail: int,
    ) -> None:
        story = dict(lives=[life.split() for life in lives], workers=workers, says=says)
        self.play(fail, **story)
        (self.folder / "package/oapl_jax").mkdir(parents=True, exist_ok=True)
        (self.folder / "package/oapl_jax/train.py").write_text(TRAINER + trainer)

    def words(self, name: str, *more: str) -> list[str]:
        where = ["--project=p", "--zone=z", "--name=learner"]
        return [os.fspath(self.checkout / "tpu_setup" / name), *where, *more]

    def run(self, name: str, *more: str, code: int = 0) -> str:
        """Runs a script, checks its exit code, and returns its output and messages."""
        done = subprocess.run(
            self.words(name, *more),
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def begin(self, name: str, *more: str) -> subprocess.Popen[str]:
        """Starts a script with the default SIGINT, which background jobs of a shell ignore."""
        return subprocess.Popen(
            ["env", "--default-signal=INT", *self.words(name, *more)],
            cwd=self.checkout,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def watching(
        self,
        *more: str,
        job: str = "tpu_setup/train.sh",
        seed: int = 1,
        libtpu: str = "",
        share: str = "10.0.0.2:/oapl",
    ) -> list[str]:
        flags = ["--topology=v6e:4x4", "--spot", "--poll=0", *more]
        flags += [f"--share={share}"] if share else []
        flags += ["--", job, "--config=configs/arithmetic.py", f"--workdir={self.folder}/run"]
        flags += [f"--libtpu={libtpu}"] if libtpu else []
        return ["watch.sh", *flags, "--", f"--config.seed={seed}"]

    def watch(self, *more: str, code: int = 0, **job) -> str:
        return self.run(*self.watching(*more, **job), code=code)

    def calls(self, *verbs: str) -> list[str]:
        """Verbs of the given kinds of calls, or of all calls that change something."""
        look = lambda words: words[3] == "list" or "job.sh status" in " ".join(words)
        return [w[3] for w in self.all_calls() if (w[3] in verbs if verbs else not look(w))]

    def starts(self) -> list[str]:
        """Starts of the trainer, by worker: directory, environment and words."""
        file = self.folder / "starts"
        return sorted(map(str.strip, file.open())) if file.exists() else []

    def end(self) -> None:
        for pid in self.folder.glob("worker-*/job/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_looks(cloud: Cloud, count: int) -> None:
    before = len(cloud.calls("list"))
    wait_for(lambda: len(cloud.calls("list")) >= before + count)


def alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


CREATE = "ERROR: (gcloud.compute.tpus.queued-resources.create)"
LOCATION = "//tpu.googleapis.com/projects/p/locations/us-east5-a"
# Messages of gcloud, as users report them.
REFUSALS = {
    "quota": f"{CREATE} RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUA"
    "PI' has been exceeded. Limit: 0 in zone us-east5-a.",
    "quota, as JSON": f"""{CREATE} {{
  "code": 8,
  "message": "Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted. Limit 20800"
}}""",
    "permission": f"{CREATE} PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on resource "
    f"'{LOCATION}' (or it may not exist). This command is authenticated as me@example.com.",
    "project": f"{CREATE} User [me@example.com] does not have permission to access projects "
    "instance [p] (or it may not exist): Permission denied on resource project p.",
    "API": f"{CREATE} PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it "
    "is disabled. Enable it by visiting https://console.developers.google.com then retry.",
    "billing": f"{CREATE} FAILED_PRECONDITION: This API method requires billing to be enabled.",
    "zone": f"{CREATE} PERMISSION_DENIED: Permission denied on 'locations/us-east5-z' (or it may "
    "not exist). This command is authenticated as me@example.com.",
    "zone without TPUs": f"{CREATE} INVALID_ARGUMENT: Cloud TPU received a bad request. The "
    'requested zone "asia-northeast1-a" is not supported. [EID: 0x1994f24467802754]',
    "zone without such chips": f"{CREATE} INVALID_ARGUMENT: Cloud TPU received a bad request. The "
    'requested accelerator configuration for accelerator type, "v6e-1", could not be found in the '
    'zonal accelerator configurations for "asia-east1-a".',
    "chips without spot": f"""{CREATE} {{
  "code": 3,
  "message": "FLEX_START provisioning model is not supported for accelerator type v6e-1"
}}""",
    "name taken": f"{CREATE} ALREADY_EXISTS: Resource 'projects/p/locations/us-east5-a/queuedResour"
    "ces/learner' already exists",
    "invalid zone": f"{CREATE} INVALID_ARGUMENT: Zone us-nowhere1-a is not valid",
    "deleted project": f"{CREATE} Project 'projects/nope' not found or deleted.",
    "no reservation": f"{CREATE} FAILED_PRECONDITION: reservation 'r' not found",
    "network": f"{CREATE} NOT_FOUND: The resource 'projects/p/global/networks/n' was not found",
    "login": f"{CREATE} You do not currently have an active account selected.\n"
    "Please run:\n  $ gcloud auth login",
    "login expired": f"{CREATE} There was a problem refreshing your current auth tokens: "
    "('invalid_grant: Bad Request', {'error': 'invalid_grant'})",
    "flag": f"{CREATE} unrecognized arguments: --spott",
}
TRANSIENT = {
    "rate": f"{CREATE} RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' and limit "
    "'Requests per minute' of service 'tpu.googleapis.com'",
    "capacity": f"""{CREATE} {{
  "code": 8,
  "message": "There is no more capacity in the zone us-east5-a; you can try in another zone"
}}""",
    "service": f"{CREATE} UNAVAILABLE: The service is currently unavailable.",
    "internal": f"{CREATE} INTERNAL: an internal error has occurred",
    "network": "ERROR: gcloud crashed (TransportError): HTTPSConnectionPool(host='oauth2.googleapis"
    ".com', port=443): Max retries exceeded with url: /token (Caused by NameResolutionError)",
    "tokens": f"{CREATE} There was a problem refreshing your current auth tokens: "
    "HTTPSConnectionPool: Read timed out. Please run: $ gcloud auth login",
    "nothing": "",
}


ONE_LIFE = ["create", "scp", "ssh", "ssh"]  # request, source, install, start


@pytest.mark.parametrize("share", ["10.0.0.2:/oapl", ""])
def test_from_nothing_to_the_end(cloud, share):
    cloud.tell("ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    cloud.watch("--delete-at-end", libtpu="--xla_a=1 --xla_b=2", share=share)
    assert cloud.calls() == [*ONE_LIFE, "delete"]
    words = f"--config=configs/arithmetic.py --workdir={cloud.folder}/run --pod --config.seed=1"
    words += " --xla_a=1 --xla_b=2"  # the compiler's flags, of the environment
    assert cloud.starts() == [
        f"{n} {cloud.folder}/worker-{n}/oapl_jax tpu,cpu {words}" for n in (0, 1)
    ]
    installed = (cloud.folder / "installed").read_text()
    assert installed.count("mount") == (2 if share else 0)
    assert installed.count(f"mount -t nfs -o hard {share} /mnt/oapl") == (2 if share else 0)
    assert installed.count("--editable .[tpu,gcs]") == 2


ENDS = ["ACTIVE SUSPENDED", "ACTIVE FAILED", "ACTIVE SUSPENDING SUSPENDED"]


@pytest.mark.parametrize(
    "lives", [*([f"ACTIVE* {end}"] for end in ENDS), ["ACTIVE* SUSPENDED"] * 4]
)
def test_a_preempted_slice_is_requested_again_and_the_run_resumes(cloud, lives):
    cloud.tell(*lives, "ACTIVE", trainer=RESUME.replace("1", str(len(lives))))
    cloud.watch()
    assert cloud.calls() == [*ONE_LIFE, "delete"] * len(lives) + ONE_LIFE
    starts = cloud.starts()
    assert [line[0] for line in starts] == ["0"] * (len(lives) + 1) + ["1"] * (len(lives) + 1)
    assert len(set(starts)) == 2  # the same command on each worker


def test_a_preemption_does_not_change_the_commit(cloud):
    first = cloud.git("rev-parse", "--short", "HEAD")
    commit = [*cloud.as_someone, "commit", "--quiet", "--allow-empty", "--message=m"]
    later = f"import subprocess\nif (start, worker) == (1, '0'):\n  subprocess.run({commit})\n"
    cloud.tell("ACTIVE* SUSPENDED", "ACTIVE", trainer=later + RESUME)
    cloud.watch()
    assert cloud.git("rev-parse", "--short", "HEAD") != first
    calls = (cloud.folder / "calls").read_text()
    assert calls.count(f"oapl_jax-{first}.tar.gz") == 2


@pytest.mark.parametrize("what", ["create", "ssh_1", "list"])
def test_a_failing_call_is_retried_until_its_deadline(cloud, what):
    cloud.tell("ACTIVE", **{what: 2})
    cloud.watch()
    assert cloud.calls("create") == ["create"] * (3 if what == "create" else 1)
    cloud.run("delete.sh")
    cloud.tell("ACTIVE", **{what: ALWAYS})
    assert "after 1 s" in cloud.watch("--service-deadline=1", "--delete-at-end", code=1)
    assert cloud.calls()[-1] == "delete"


@pytest.mark.parametrize("says", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_that_no_wait_mends_ends_the_watch(cloud, says):
    for verb in ("create", "list"):
        cloud.tell("ACTIVE", says=says, **{verb: ALWAYS})
        before = len(cloud.calls(verb)) if (cloud.folder / "calls").exists() else 0
        assert says.splitlines()[-1] in cloud.watch(code=2)
        assert len(cloud.calls(verb)) == before + 1
    cloud.run("create.sh", "--topology=v6e:4x4", code=0)
    cloud.tell("ACTIVE", says=says, create=1)
    cloud.run("create.sh", "--topology=v6e:4x4", code=2)


@pytest.mark.parametrize("says", TRANSIENT.values(), ids=TRANSIENT)
def test_an_error_that_a_wait_mends_is_retried(cloud, says):
    cloud.tell("ACTIVE", says=says, create=2)
    cloud.watch()
    assert cloud.calls("create") == ["create"] * 3


def test_a_request_whose_answer_was_lost_is_watched(cloud):
    cloud.tell("ACTIVE", says=REFUSALS["name taken"], answer=1)
    cloud.watch()
    assert cloud.calls("create") == ["create"]


def test_a_missing_program_ends_the_watch(cloud):
    (cloud.folder / "bin/gcloud").unlink()
    cloud.tell("ACTIVE")
    assert "gcloud" in cloud.watch(code=2)


def test_requests_without_a_slice_end_the_watch(cloud):
    cloud.tell(*["WAITING_FOR_RESOURCES FAILED"] * 4)
    cloud.watch(code=1)
    assert cloud.calls() == ["create", "delete"] * 3


@pytest.mark.parametrize("flag", ["--queue-deadline=1", "--deadline=1"])
def test_a_wait_for_capacity_and_its_bill_have_a_deadline(cloud, flag):
    cloud.tell("WAITING_FOR_RESOURCES")
    cloud.watch(flag, "--delete-at-end", code=1)
    assert cloud.calls()[-1] == "delete"


def test_an_invalid_setting_ends_the_watch(cloud):
    mistake = "error: lag.steps=0 must be at least 1"
    both = "while len((cloud / 'starts').read_text().splitlines()) < 2:\n    time.sleep(0.01)\n"
    cloud.tell("ACTIVE", trainer=f"{both}print('{mistake}', file=sys.stderr)\nsys.exit(2)")
    assert mistake in cloud.watch(code=2)
    assert len(cloud.starts()) == 2


@pytest.mark.parametrize("code", [1, 3, 20])
def test_a_failure_on_one_worker_restarts_all(cloud, code):
    fail = f"if start == 1 and worker == '1':\n  sys.exit({code})\n{RESUME}"
    cloud.tell("ACTIVE", trainer=fail)
    cloud.watch()
    assert [line[0] for line in cloud.starts()] == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("lasts", "flags", "code", "starts"),
    [
        (0, ["--restarts=2"], 1, 3),
        (3, ["--restarts=3", "--calm=8"], 1, 4),
        (4, ["--restarts=1", "--calm=2"], 0, 5),
    ],
)
def test_a_job_that_keeps_failing_ends_the_watch_without_a_calm_start(
    cloud, lasts, flags, code, starts
):
    """Seconds of one start, not of all: four starts of three seconds each are in a row."""
    fail = f"if start < 5:\n  time.sleep({lasts})\n  sys.exit(1)\nfinish()"
    cloud.tell("ACTIVE", trainer=fail, workers=1)
    cloud.watch(*flags, code=code)
    assert len(cloud.starts()) == starts


def test_a_run_that_was_stopped_is_not_done(cloud):
    """It saves and exits with code 0, without a result; an older run's result does not count."""
    stopped = "time.sleep = lambda _: None\nif start > 1:\n  finish()"
    cloud.tell("ACTIVE", trainer=stopped, workers=1)
    (cloud.folder / "run").mkdir()
    (cloud.folder / "run/result.json").touch()
    cloud.watch()
    assert len(cloud.starts()) == 2


def test_a_workdir_on_the_disk_of_the_slice_is_refused(cloud, monkeypatch):
    monkeypatch.setenv("FAKE_MOUNT", "/")
    cloud.tell("ACTIVE")
    assert "--workdir" in cloud.watch(code=2)
    assert cloud.starts() == []


def test_an_earlier_job_does_not_count(cloud):
    cloud.tell("ACTIVE")
    cloud.watch(seed=1)
    cloud.watch(seed=2)
    assert [line[0] + line[-1] for line in cloud.starts()] == ["01", "02", "11", "12"]


def test_a_watch_resumes_its_job_and_refuses_another(cloud):
    until_told = "while not (cloud / 'go').exists():\n  time.sleep(0.05)\nfinish()"
    cloud.tell("ACTIVE", trainer=until_told)
    watching = cloud.begin(*cloud.watching())
    wait_for(lambda: len(cloud.starts()) == 2)
    wait_for_looks(cloud, 2)
    os.killpg(watching.pid, signal.SIGINT)
    watching.communicate(timeout=30)
    assert watching.returncode == 130

    cloud.watch("--service-deadline=1", seed=2, code=1)

    watching = cloud.begin(*cloud.watching())
    wait_for_looks(cloud, 3)
    (cloud.folder / "go").touch()
    watching.communicate(timeout=30)
    assert watching.returncode == 0
    assert [line[0] + line[-1] for line in cloud.starts()] == ["01", "11"]


def test_an_invalid_flag_is_an_error_before_any_request(cloud):
    cloud.tell("ACTIVE")
    assert "--topology" in cloud.watch("--topology=v6e:4x5", code=2)
    assert "--config" in cloud.watch(job="tpu_setup/serve.sh", code=2)
    assert not (cloud.folder / "calls").exists()


SAVES = """
import signal
def save(*_):
    print("saved", flush=True)
    raise SystemExit(75)
signal.signal(signal.SIGTERM, save)
work()
"""
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwork()"


@pytest.mark.parametrize(("trainer", "last"), [(SAVES, "saved"), (DEAF, "step 1")])
def test_a_stopped_job_saves_or_is_killed(cloud, trainer, last):
    cloud.tell("ACTIVE", trainer=trainer, workers=1)
    cloud.run("create.sh", "--topology=v6e:2x4")
    cloud.run("install.sh", "--share=10.0.0.2:/oapl")
    where = [f"--workdir={cloud.folder}/run", "--config=configs/arithmetic.py"]
    cloud.run("train.sh", *where)
    home = cloud.folder / "worker-0"
    wait_for(lambda: "step 1" in (home / "job/log").read_text())
    assert "worker-0 running step 1" in cloud.run("status.sh")
    pid = int((home / "job/pid").read_text())

    path = f"{cloud.folder}/worker_bin:{os.environ['PATH']}"
    environment = cloud.environment | dict(HOME=os.fspath(home), WORKER="0", PATH=path)
    job = home / "oapl_jax/tpu_setup/on_worker/job.sh"
    subprocess.run([job, "stop"], env=environment, check=True, timeout=60)
    wait_for(lambda: not alive(pid))
    assert cloud.run("status.sh") == f"ACTIVE\nworker-0 absent {last}\n"


def test_servers_add_themselves_and_start_behind_the_proxy(cloud):
    """The real restart proxy takes the flags of serve.sh, up to the missing model files."""
    cloud.tell("ACTIVE", workers=1)
    cloud.run("create.sh", "--topology=v6e:2x4")
    cloud.run("install.sh", "--share=10.0.0.2:/oapl")
    python = cloud.folder / "worker-0/oapl_jax/.venv/bin/python"
    program(python, f'#!/bin/bash\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    servers = cloud.folder / "servers.txt"
    servers.write_text("http://10.0.0.9:30000\n")
    flags = ["--topology=v6e:2x4", f"--model={cloud.folder}", f"--servers-file={servers}"]
    for _ in range(2):
        cloud.run("serve.sh", *flags, "--", "--max-seq-len=2048")
        wait_for((cloud.folder / "worker-0/job/code").exists)
    log = (cloud.folder / "worker-0/job/log").read_text()
    assert "config.json" in log
    assert servers.read_text().split() == ["http://10.0.0.9:30000", "http://10.0.0.0:30000"]
    installed = (cloud.folder / "installed").read_text()
    assert "sglang-jax[tpu] @ git+https://github.com/sgl-project/sglang-jax.git@main" in installed


# Python of a worker: the real one, but for the fetcher, which says so and stays.
FETCHER = """#!/bin/bash
if [[ $2 == oapl_jax.fleet.fetch ]]; then
  echo $$ "${@:3}" >>$FAKE_CLOUD/fetchers
  exec /bin/sleep 600
fi
"""


def test_servers_without_a_share_take_all_from_a_bucket(cloud):
    cloud.tell("ACTIVE", workers=1, cp=1)
    bucket = cloud.folder / "bucket/b"
    (bucket / "models/m").mkdir(parents=True)
    (bucket / "models/m/weights").write_text("of a model without config.json")
    (bucket / "servers.txt").write_text("http://10.0.0.9:30000\n")
    cloud.run("create.sh", "--topology=v6e:2x4")
    cloud.run("install.sh")
    home = cloud.folder / "worker-0"
    real = f'PYTHONPATH={ROOT} exec {sys.executable} "$@"\n'
    program(home / "oapl_jax/.venv/bin/python", FETCHER + real)
    flags = ["--topology=v6e:2x4", "--model=gs://b/models/m", "--versions=gs://b/run/versions"]
    for _ in range(2):
        cloud.run("serve.sh", *flags, "--servers-file=gs://b/servers.txt")
        wait_for((home / "job/code").exists)
    assert f"{home}/models/m" in (home / "job/log").read_text()  # it has no config.json
    assert (home / "models/m/weights").exists()
    entries = [f"http://10.0.0.{n}:30000" for n in (9, 7, 0)]
    assert (bucket / "servers.txt").read_text().split() == entries
    fetchers = [line.split() for line in (cloud.folder / "fetchers").open()]
    words = ["--from=gs://b/run/versions", f"--to={home}/versions", "--host=10.0.0.0"]
    assert [found[1:] for found in fetchers] == [[*words, "--port=30200"]] * 2
    wait_for(lambda: not any(alive(int(pid)) for pid, *_ in fetchers))
