"""The ground that a soak test breaks: namespaces, a small disk, networks and the wall clock."""

import contextlib
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import sysconfig

INSIDE = "SOAK_INSIDE"
NAMESPACES = ("--user", "--map-root-user", "--mount", "--net", "--pid", "--mount-proc")
DISK_BYTES = 1 << 30


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def enter_namespaces() -> None:
    """Starts this program again, as the first process of namespaces that end with it.

    The kernel must permit them (`sysctl kernel.unprivileged_userns_clone`, or root).
    """
    if INSIDE not in os.environ:
        guard = ("--fork", "--kill-child")  # the program ends with this process
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", *NAMESPACES, *guard, sys.executable, *sys.argv])
    run("mount", "-t", "tmpfs", "none", "/run")  # `ip netns` keeps its names there
    run("ip", "link", "set", "lo", "up")


def running() -> dict[int, str]:
    """Commands of all processes of this namespace but this one; ended ones do not count."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended meanwhile
        if state not in "ZX" and int(path.name) != os.getpid():
            found[int(path.name)] = command
    return found


class Disk:
    """A file system in memory that can be made full: its size becomes what is used."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(path))

    def fill(self) -> None:
        for _ in range(20):  # the kernel refuses a size below what is used since it was read
            with contextlib.suppress(subprocess.CalledProcessError):
                return self._resize(max(shutil.disk_usage(self.path).used, 1))  # 0: no limit
        raise RuntimeError(f"{self.path} grows faster than it can be measured")

    def free(self) -> None:
        self._resize(DISK_BYTES)

    def _resize(self, size: int) -> None:
        run("mount", "-o", f"remount,size={size}", str(self.path))


class Network:
    """A network namespace with one machine on it, behind a cable that can be cut."""

    def __init__(self, number: int):
        self._name, ours = f"machine{number}", f"cable{number}"
        self.address = f"10.77.{number}.2"
        run("ip", "netns", "add", self._name)
        peer = ("type", "veth", "peer", "name", "eth0", "netns", self._name)
        run("ip", "link", "add", ours, *peer)
        run("ip", "addr", "add", f"10.77.{number}.1/24", "dev", ours)
        run("ip", "link", "set", ours, "up")
        self._ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._ip("link", "set", "lo", "up")
        self.mend()

    def command(self, *command: str) -> list[str]:
        """A command that runs on the machine."""
        return ["nsenter", f"--net=/run/netns/{self._name}", *command]

    def cut(self) -> None:
        """Packets are lost without an answer, and connections stay open."""
        self._ip("link", "set", "eth0", "down")

    def mend(self) -> None:
        self._ip("link", "set", "eth0", "up")

    def _ip(self, *arguments: str) -> None:
        run("ip", "-netns", self._name, *arguments)


class Clock:
    """The wall clock of processes that have `environment`; see clock.c."""

    def __init__(self, directory: pathlib.Path):
        source, library = pathlib.Path(__file__).with_name("clock.c"), directory / "clock.so"
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        run(compiler, "-shared", "-fPIC", "-O2", f"-o{library}", str(source), "-ldl")
        self._file = directory / "clock"
        self.ahead = 0  # seconds
        self.set(self.ahead)
        self.environment = {"LD_PRELOAD": str(library), "SOAK_CLOCK": str(self._file)}

    def set(self, ahead: int) -> None:
        """Sets it to so many seconds ahead of the machine's."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", ahead))
        self.ahead = ahead
