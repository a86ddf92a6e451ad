"""The walls of a sandbox, seen from inside and from outside, in every way that works here."""

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hostile import HEAD, MARK

from oapl_jax.rewards.code import sandbox
from oapl_jax.rewards.code.isolation import MACHINES
from oapl_jax.rewards.code.launch import FIRST_USER, Limits, NoSandbox, visible_paths
from oapl_jax.rewards.code.sandbox import Ended, OutOfTime, Sandbox

LIMITS = Limits(
    seconds_per_test=20,
    memory_bytes=1 << 30,
    processes=8,
    output_bytes=1 << 20,
    temporary_bytes=1 << 24,
)
START = dict(packages=(), start_seconds=60)
HOLES = {way: sandbox.hole(way, LIMITS, **START) for way in sandbox.WAYS}
WAYS = [way for way, hole in HOLES.items() if not hole]
assert WAYS, HOLES
PACKAGE = Path(sandbox.__file__).parents[2]
each_way = pytest.mark.parametrize("way", WAYS)


def marked():
    """Processes of this machine that carry the mark."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == MARK:
                found.append(int(comm.parent.name))
        except OSError:  # it has ended
            pass
    return found


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def nothing_marked():
    """Programs that other tests ended have been cleared away by the system."""
    until(lambda: not marked())


def run(way, code, *inputs, limits=LIMITS, packages=()):
    with Sandbox(way, limits, packages=packages, start_seconds=60) as box:
        box.load(kind="stdin", name="", code=textwrap.dedent(code))
        return [box.run(text) for text in inputs]


def test_this_machine_can_isolate():
    assert "namespaces" in WAYS
    assert ("bubblewrap" in WAYS) == (shutil.which("bwrap") is not None)


def test_the_trial_program_finds_the_missing_walls():
    found = sandbox.hole("none", LIMITS, **START)
    assert "the file system is visible" in found
    assert "no wall at" not in found  # the filter stands


@each_way
def test_input_comes_in_and_output_comes_out(way):
    assert run(way, "print(int(input()) ** 2)", "12", "-3\n") == [(0, b"144\n"), (0, b"9\n")]


@each_way
@pytest.mark.parametrize(
    "code",
    [
        "print(input())",
        "import sys; sys.stdout.write(sys.stdin.read())",
        "import os; os.write(1, os.read(0, os.fstat(0).st_size))",
        "print(open(0).read(), end='')",
        "print(open('/dev/stdin').read())",
        "import sys; print(sys.stdin.buffer.readline().decode()); sys.exit()",
        "import sys; print(input()); sys.exit(3)",
        "print(stdin.readline())",  # names that checkers import
        "print(Counter(input()).most_common(1)[0][0] * 2, end='ä' * (gcd(4, 6) - 2) + '\\n')",
        # what runs after the program's last line
        "import threading, time\nlater = lambda: (time.sleep(0.3), print(input()))\n"
        "threading.Thread(target=later).start()",
        "import atexit; atexit.register(lambda: print(input()))",
        "import sys\nout = open(1, 'w')\nout.write(input())",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(input())",
        "if __name__ == '__main__':\n    print(input())",
    ],
)
def test_programs_read_and_write_in_many_ways(way, code):
    ((status, output),) = run(way, code, "ää")
    assert (status, output.decode().strip()) == (0, "ää")


@each_way
def test_a_function_is_called_and_its_value_comes_out_alone(way):
    code = """
    class Solution:
        def pair(self, a, b: List[int]):
            print("noise")
            return (a, sorted(b)), {"x": None}
    if __name__ == "__main__":
        raise ValueError
    """
    with Sandbox(way, LIMITS, **START) as box:
        box.load(kind="call", name="pair", code=textwrap.dedent(code))
        for text in ("4\n[3, 1]", '"q"\n[]'):
            status, output = box.run(text)
            first, second = (json.loads(line) for line in text.split("\n"))
            assert (status, json.loads(output)) == (0, [[first, sorted(second)], {"x": None}])


@each_way
def test_exit_codes_and_signals_are_told(way):
    code = (
        "import os, signal\nx = input()\nif x == 'kill': os.kill(os.getpid(), 9)\nos._exit(int(x))"
    )
    assert run(way, code, "3", "kill", "0") == [(3, b""), (-9, b""), (0, b"")]
    assert run(way, "1 / 0", "")[0][0] == 1


@each_way
def test_a_test_finds_nothing_of_the_test_before(way):
    code = """
    import os, threading
    print(sorted(os.listdir("/tmp")), threading.active_count())
    os.makedirs("/tmp/a/b")
    for path in ("/tmp/x", "/tmp/stdin", "/tmp/a/b/c"):
        open(path, "w").write("left")
    os.symlink("/usr", "/tmp/link")
    """
    fresh = (0, b"['stdin'] 1\n")
    assert run(way, code, "", "", "") == [fresh] * 3


@each_way
def test_the_clock_ends_a_test(way):
    limits = Limits(1.0, 1 << 30, 8, 1 << 20, 1 << 24)
    for code in ("while True: pass", "import time; time.sleep(1e6)"):
        with pytest.raises(OutOfTime):
            run(way, code, "", limits=limits)


@each_way
def test_what_is_no_program_ends_the_sandbox(way):
    with pytest.raises(Ended):
        run(way, "no python", "")


@each_way
def test_a_reply_may_be_as_long_as_the_limit_and_no_longer(way):
    lengths = (LIMITS.output_bytes - 1, LIMITS.output_bytes + 1)
    (ok, output), (failed, cut) = run(way, "print('x' * int(input()), end='')", *map(str, lengths))
    assert (ok, output) == (0, b"x" * lengths[0])
    assert failed != 0
    assert len(cut) <= LIMITS.output_bytes


@each_way
def test_large_inputs_pass(way):
    text = "7 " * 2_000_000
    assert run(way, "print(sum(map(int, input().split())))", text) == [(0, b"14000000\n")]


@each_way
def test_packages_are_there_if_named(way):
    code = "import numpy; print(numpy.arange(4).sum()); print(numpy.dot([[2.0]], [[3.0]])[0, 0])"
    assert run(way, code, "", packages=("numpy",)) == [(0, b"6\n6.0\n")]
    assert run(way, code, "")[0][0] == 1
    with pytest.raises(NoSandbox, match="no_such_package"):
        run(way, code, "", packages=("no_such_package",))


@each_way
def test_a_package_may_lie_where_a_program_has_a_fresh_folder(way, monkeypatch):
    """A checkout below /tmp has its environment there too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package = Path(folder) / "below_tmp"
        package.mkdir()
        (package / "__init__.py").write_text("VALUE = 7")
        monkeypatch.syspath_prepend(folder)
        code = "import below_tmp, os; print(below_tmp.VALUE, os.listdir('/tmp'))"
        assert run(way, code, "", packages=("below_tmp",)) == [(0, b"7 ['stdin']\n")]


@each_way
def test_every_call_of_the_filter_is_refused(way):
    numbers = MACHINES[platform.machine()][1]
    code = f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    for name, number in {numbers}.items():
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
        print(name, result, ctypes.get_errno())
    """
    # A thread may be cloned, and -1 has that flag: the kernel finds the rest senseless (EINVAL).
    expected = dict.fromkeys(numbers, "1") | {"clone3": "38", "clone": "22"}
    ((status, output),) = run(way, code, "")
    assert status == 0
    assert [line.split() for line in output.decode().splitlines()] == [
        [name, "-1", error] for name, error in expected.items()
    ]


@each_way
@pytest.mark.usefixtures("nothing_marked")
def test_from_outside_it_is_nobody_with_nothing(way):
    with Sandbox(way, LIMITS, **START) as box:
        box.load(kind="stdin", name="", code=HEAD + "time.sleep(500)")
        box._write(b"{}", time.monotonic() + 30)  # `run` would wait for its end
        until(lambda: len(marked()) == 1)
        (pid,) = marked()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        users = {int(user) for user in status["Uid"].split()}
        mine = os.geteuid()
        assert users == {mine} if mine else all(user >= FIRST_USER for user in users)
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
            place = f"/proc/{pid}/ns/{kind}"
            assert os.readlink(place) != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert set(os.listdir(f"/proc/{pid}/fd")) == {"0", "1", "2"}
        assert not Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0").startswith(b"PATH")
        assert os.listdir(f"/proc/{pid}/root/tmp") == ["stdin"]
        visible = {path.split("/")[1] for path in visible_paths(())}
        assert set(os.listdir(f"/proc/{pid}/root")) - visible <= {"tmp", "dev", "inside"}
        assert len(status["NSpid"].split()) == 2
    assert marked() == []


@each_way
@pytest.mark.usefixtures("nothing_marked")
def test_it_dies_with_the_process_that_opened_it(way):
    script = f"""
    import time
    from oapl_jax.rewards.code.launch import Limits
    from oapl_jax.rewards.code.sandbox import Sandbox
    box = Sandbox({way!r}, Limits(500, 1 << 30, 8, 1 << 20, 1 << 24), packages=(), start_seconds=60)
    box.load(kind="stdin", name="", code={HEAD + "time.sleep(500)"!r})
    box.run("{{}}")
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    until(marked)
    assert owner.poll() is None
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not marked())


@each_way
def test_an_ordinary_user_can_do_it_too(way):
    """Root becomes somebody else, who has a copy of this Python where everybody may read."""
    code = f"""
    import sys, types
    sys.path.insert(0, "{{code}}")
    package = sys.modules["oapl_jax.rewards"] = types.ModuleType("oapl_jax.rewards")
    package.__path__ = ["{{code}}/oapl_jax/rewards"]  # without what else is imported there
    import os
    from oapl_jax.rewards.code import launch, sandbox
    limits = launch.Limits(20, 1 << 30, 8, 1 << 20, 1 << 24)
    print(os.geteuid() != 0, repr(sandbox.hole("{way}", limits, packages=(), start_seconds=60)))
    """

    def become_somebody():
        libc = ctypes.CDLL(None, use_errno=True)
        mount = lambda *a: libc.mount(*a[:3], ctypes.c_ulong(a[3]), a[4])
        assert libc.unshare(0x20000) == 0  # a mount namespace
        assert mount(b"none", b"/", None, 0x44000, None) == 0  # private
        assert mount(b"tmpfs", b"/mnt", b"tmpfs", 0, b"mode=755") == 0
        for source, name in ((sys.base_prefix, "python"), (PACKAGE, "code/oapl_jax")):
            os.makedirs(f"/mnt/{name}")
            assert mount(os.fsencode(source), f"/mnt/{name}".encode(), None, 0x1000, None) == 0
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)

    root = os.geteuid() == 0
    python = os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix)
    place = "/mnt/code" if root else str(PACKAGE.parent)
    said = subprocess.run(
        [
            f"/mnt/python/{python}" if root else sys.executable,
            "-B",
            "-c",
            textwrap.dedent(code).replace("{code}", place),
        ],
        preexec_fn=become_somebody if root else None,
        env={"PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert (said.stdout, said.stderr) == ("True ''\n", "")


def test_no_bubblewrap_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert sandbox.hole("bubblewrap", LIMITS, **START) == "bwrap is not on the PATH"


def test_a_sandbox_that_does_not_come_up_says_why(monkeypatch):
    lines = {
        "ended": "import sys; sys.exit('Operation not permitted')",
        "silent": "pass",
        "late": "import time; time.sleep(600)",
    }
    for name, reason in (
        ("ended", "Operation not permitted"),
        ("silent", "it ended without a word"),
        ("late", r"not up within 1 s \(start_seconds\)"),
    ):
        command = [sys.executable, "-S", "-c", lines[name]]
        monkeypatch.setattr(sandbox, "command", lambda *_, command=command: command)
        with pytest.raises(NoSandbox, match=reason):
            Sandbox("namespaces", LIMITS, packages=(), start_seconds=60 if name != "late" else 1)
