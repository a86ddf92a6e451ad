"""The command line that builds a sandbox, and all that a program will see of this machine."""

import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from oapl_jax.rewards.code.isolation import MACHINES

FIRST_USER = 1 << 31  # above what distributions and containers give to users
HERE = Path(__file__).parent
PACKAGES = "/packages"  # inside; outside they may lie in a folder that a program gets afresh
KEPT_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID")  # until the program comes in


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      seconds_per_test: wall-clock seconds of a test.
      memory_bytes: address space of a program's process.
      processes: threads alive at once, the main one included; it can start no process.
      output_bytes: what a test may write to its output, and to any file.
      temporary_bytes: size of the temporary folder, which also holds the input.
    """

    seconds_per_test: float
    memory_bytes: int
    processes: int
    output_bytes: int
    temporary_bytes: int


class NoSandbox(Exception):
    """The sandbox did not come up; no program is to blame."""


def command(way: str, limits: Limits, packages: tuple[str, ...], folder: str) -> list[str]:
    """The command line of a sandbox. Nothing on it is secret, and no program is."""
    root = os.geteuid() == 0 and _may_mount()
    visible = visible_paths(packages)
    settings = dataclasses.asdict(limits) | {
        "way": way,
        "folder": folder,
        "visible": visible,
        "package_folders": [PACKAGES]
        if way != "none"
        else [os.path.dirname(path) for path in _package_paths(packages)],
        "user_namespace": not root,
        "uid": _own_user() if root else None,
        "filter": platform.machine() in MACHINES,
    }
    # -I: no environment, no user site; -S: no site; -B: no bytecode is written.
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    inside = [str(HERE / "sandbox_main.py"), json.dumps(settings)]
    if way != "bubblewrap":
        return [*python, *inside]
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NoSandbox("bwrap is not on the PATH")
    line = [bwrap, "--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    line += [f"--unshare-{kind}" for kind in ("pid", "net", "ipc", "uts", "cgroup")]
    line += [] if root else ["--unshare-user"]
    line += ["--cap-drop", "ALL"]
    for capability in KEPT_CAPABILITIES:
        line += ["--cap-add", capability]
    for parent in sorted({str(p) for path in visible for p in Path(path).parents} - {"/"}):
        line += ["--perms", "0755", "--dir", parent]  # else only root may pass
    for path, source in visible.items():
        link = os.path.islink(source)
        line += ["--symlink", os.readlink(source), path] if link else ["--ro-bind", source, path]
    for place in ("/inside", "/dev"):
        line += ["--perms", "0755", "--dir", place]
    for name in ("sandbox_main.py", "isolation.py"):
        line += ["--ro-bind", str(HERE / name), f"/inside/{name}"]
    line += ["--tmpfs", "/tmp", "--dev-bind", "/dev/null", "/dev/null"]
    line += ["--symlink", "/tmp/stdin", "/dev/stdin", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*line, *python, "/inside/sandbox_main.py", inside[1]]


def visible_paths(packages: tuple[str, ...]) -> dict[str, str]:
    """This Python, the system's libraries and the packages: all that a program sees of the disk.

    Returns:
      The path inside -> the path outside, equal but for packages.
    """
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)]
    libraries.append(sysconfig.get_path("stdlib"))
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
    paths = [*system, *libraries, os.path.realpath(sys.executable)]
    found: dict[str, str] = {}
    for path in paths:
        covered = any(path == other or path.startswith(f"{other}/") for other in found)
        if os.path.exists(path) and not covered:
            found[path] = path
    return found | {f"{PACKAGES}/{os.path.basename(p)}": p for p in _package_paths(packages)}


_slots = itertools.count()


def _own_user() -> int:
    """A user id that no other sandbox of this machine has now."""
    return FIRST_USER + (os.getpid() << 9) + next(_slots) % 511


def _may_mount() -> bool:
    """Whether this process holds CAP_SYS_ADMIN: root in a container may lack it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return bool(held >> 21 & 1)


def _package_paths(packages: tuple[str, ...]) -> list[str]:
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
