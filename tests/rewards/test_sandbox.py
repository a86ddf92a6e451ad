"""The isolation of a sandbox, seen from inside and from outside."""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import HEAD
from processes import CODE, marked, wait_until

from oapl_jax.rewards.code import sandbox
from oapl_jax.rewards.code.sandbox import NoSandbox, Sandbox, find_bwrap, probe
from oapl_jax.rewards.code.sandbox_main import MACHINES
from oapl_jax.rewards.worker_process import Ended, Late

BWRAP = find_bwrap(CODE)
PACKAGE = Path(sandbox.__file__).parents[2]


def run(code, *inputs, **changes):
    with closing(Sandbox(BWRAP, replace(CODE, **changes))) as box:
        box.load_program(kind="stdin", name="", code=textwrap.dedent(code))
        return [box.run_test(text) for text in inputs]


@pytest.mark.parametrize("bwrap", sandbox.bwrap_paths())
def test_every_bubblewrap_of_this_machine_isolates(bwrap):
    assert probe(bwrap, CODE) == ""


def test_the_probe_finds_missing_isolation_and_the_filter_stands_without_it():
    found = probe(None, CODE)
    assert "the file system is visible" in found
    assert "is not refused" not in found


def test_input_comes_in_and_output_comes_out():
    assert run("print(int(input()) ** 2)", "12", "-3\n") == [(0, b"144\n"), (0, b"9\n")]
    large = "7 " * 2_000_000
    assert run("print(sum(map(int, input().split())))", large) == [(0, b"14000000\n")]


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
        # after the program's last line
        "import threading, time\nlater = lambda: (time.sleep(0.3), print(input()))\n"
        "threading.Thread(target=later).start()",
        "import atexit; atexit.register(lambda: print(input()))",
        "import sys\nout = open(1, 'w')\nout.write(input())",
        "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(input())",
        "if __name__ == '__main__':\n    print(input())",
    ],
)
def test_programs_read_and_write_in_many_ways(code):
    ((status, output),) = run(code, "ää")
    assert (status, output.decode().strip()) == (0, "ää")


def test_a_function_is_called_and_its_value_comes_out_alone():
    code = """
    class Solution:
        def pair(self, a, b: List[int]):
            print("noise")
            return (a, sorted(b)), {"x": None}
    if __name__ == "__main__":
        raise ValueError
    """
    with closing(Sandbox(BWRAP, CODE)) as box:
        box.load_program(kind="call", name="pair", code=textwrap.dedent(code))
        for text in ("4\n[3, 1]", '"q"\n[]'):
            status, output = box.run_test(text)
            first, second = (json.loads(line) for line in text.split("\n"))
            assert (status, json.loads(output)) == (0, [[first, sorted(second)], {"x": None}])


def test_exit_codes_and_signals_are_returned():
    code = "import os\nx = input()\nif x == 'kill': os.kill(os.getpid(), 9)\nos._exit(int(x))"
    assert run(code, "3", "kill", "0") == [(3, b""), (-9, b""), (0, b"")]
    assert run("1 / 0", "")[0][0] == 1


def test_a_test_finds_nothing_of_the_test_before():
    code = """
    import os, threading
    print(sorted(os.listdir("/tmp")), threading.active_count())
    os.makedirs("/tmp/a/b")
    for path in ("/tmp/x", "/tmp/stdin", "/tmp/a/b/c"):
        open(path, "w").write("left")
    os.symlink("/usr", "/tmp/link")
    """
    assert run(code, "", "", "") == [(0, b"['stdin'] 1\n")] * 3


def test_the_clock_ends_a_test_and_a_text_that_is_no_program_the_sandbox():
    for code in ("while True: pass", "import time; time.sleep(1e6)"):
        with pytest.raises(Late):
            run(code, "", seconds_per_test=1.0)
    with pytest.raises(Ended):
        run("no python", "")


def test_a_reply_may_be_as_long_as_the_limit_and_no_longer():
    lengths = (CODE.output_bytes - 1, CODE.output_bytes + 1)
    (ok, output), (failed, cut) = run("print('x' * int(input()), end='')", *map(str, lengths))
    assert (ok, output) == (0, b"x" * lengths[0])
    assert failed != 0
    assert len(cut) <= CODE.output_bytes


def test_packages_are_there_if_named():
    code = "import numpy; print(numpy.arange(4).sum()); print(numpy.dot([[2.0]], [[3.0]])[0, 0])"
    assert run(code, "", packages=("numpy",)) == [(0, b"6\n6.0\n")]
    assert run(code, "")[0][0] == 1
    with pytest.raises(NoSandbox, match="no_such_package"):
        run(code, "", packages=("no_such_package",))


def test_a_package_may_lie_where_a_program_has_a_fresh_folder(monkeypatch):
    """A checkout below /tmp has its environment there too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package = Path(folder) / "below_tmp"
        package.mkdir()
        (package / "__init__.py").write_text("VALUE = 7")
        monkeypatch.syspath_prepend(folder)
        code = "import below_tmp, os; print(below_tmp.VALUE, os.listdir('/tmp'))"
        assert run(code, "", packages=("below_tmp",)) == [(0, b"7 ['stdin']\n")]


def test_every_call_of_the_filter_is_refused():
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
    ((status, output),) = run(code, "")
    assert status == 0
    assert [line.split() for line in output.decode().splitlines()] == [
        [name, "-1", error] for name, error in expected.items()
    ]


def test_the_program_has_no_user_groups_or_capabilities():
    wait_until(lambda: not marked())  # programs that other tests ended
    with closing(Sandbox(BWRAP, CODE)) as box:
        box.load_program(kind="stdin", name="", code=HEAD + "time.sleep(500)")
        box.send(b"{}", time.monotonic() + 30)  # `run_test` would wait for its end
        wait_until(lambda: len(marked()) == 1)
        (pid,) = marked()
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        users = {int(user) for user in status["Uid"].split()}
        mine = os.geteuid()
        assert users == {mine} if mine else all(user >= sandbox.FIRST_USER for user in users)
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
            place = f"/proc/{pid}/ns/{kind}"
            assert os.readlink(place) != os.readlink(f"/proc/self/ns/{kind}"), kind
        assert set(os.listdir(f"/proc/{pid}/fd")) == {"0", "1", "2"}
        assert not Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0").startswith(b"PATH")
        assert os.listdir(f"/proc/{pid}/root/tmp") == ["stdin"]
        visible = {path.split("/")[1] for path in sandbox.visible_paths(())}
        assert set(os.listdir(f"/proc/{pid}/root")) - visible <= {"tmp", "dev", "inside"}
        assert len(status["NSpid"].split()) == 2
    assert marked() == []


def test_it_dies_with_the_process_that_opened_it():
    wait_until(lambda: not marked())
    script = f"""
    from oapl_jax.config import CodeRewardConfig
    from oapl_jax.rewards.code.sandbox import Sandbox
    box = Sandbox({BWRAP!r}, {replace(CODE, seconds_per_test=500)})
    box.load_program(kind="stdin", name="", code={HEAD + "time.sleep(500)"!r})
    box.run_test("{{}}")
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    wait_until(marked)
    assert owner.poll() is None
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_until(lambda: not marked())


def test_an_ordinary_user_can_do_it_too():
    """Root becomes somebody else, with copies of this Python and bwrap that everybody may read."""
    code = """
    import os, sys
    sys.path[:0] = folders
    from oapl_jax.config import CodeRewardConfig
    from oapl_jax.rewards.code.sandbox import find_bwrap
    print(os.geteuid() != 0, os.path.basename(find_bwrap(CONFIG)))
    """
    wheel = Path(BWRAP).parents[2]  # site-packages, with the wheel's libraries

    def become_somebody():
        libc = ctypes.CDLL(None, use_errno=True)
        mount = lambda *a: libc.mount(*a[:3], ctypes.c_ulong(a[3]), a[4])
        assert libc.unshare(0x20000) == 0  # a mount namespace
        assert mount(b"none", b"/", None, 0x44000, None) == 0  # private
        assert mount(b"tmpfs", b"/mnt", b"tmpfs", 0, b"mode=755") == 0
        places = ((sys.base_prefix, "python"), (PACKAGE, "code/oapl_jax"), (wheel, "packages"))
        for source, name in places:
            os.makedirs(f"/mnt/{name}")
            assert mount(os.fsencode(source), f"/mnt/{name}".encode(), None, 0x1000, None) == 0
        if Path(sys.base_prefix).is_relative_to(Path.home()):  # Python finds its library there
            home, prefix = os.fsencode(Path.home()), os.fsencode(sys.base_prefix)
            assert mount(b"tmpfs", home, b"tmpfs", 0, b"mode=755") == 0
            os.makedirs(prefix)
            assert mount(b"/mnt/python", prefix, None, 0x1000, None) == 0
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)

    root = os.geteuid() == 0
    folders = ["/mnt/packages", "/mnt/code"] if root else [str(wheel), str(PACKAGE.parent)]
    code = f"folders = {folders}\n{textwrap.dedent(code)}".replace("CONFIG", str(CODE))
    said = subprocess.run(
        [os.path.realpath(sys.executable), "-B", "-c", code],
        preexec_fn=become_somebody if root else None,
        env={"PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert (said.stdout, said.stderr) == ("True bwrap\n", "")


def test_a_machine_without_bubblewrap_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "bwrap_paths", list)
    with pytest.raises(NoSandbox, match="bubblewrap"):
        find_bwrap(CODE)


@pytest.mark.parametrize(
    ("script", "start_seconds", "reason"),
    [
        ("echo 'Operation not permitted' >&2; exit 1", 60, "Operation not permitted"),
        ("exit 0", 60, "without a message"),
        ("sleep 600", 1, "start_seconds"),
    ],
)
def test_a_sandbox_that_does_not_start_says_why(tmp_path, script, start_seconds, reason):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(f"#!/bin/sh\n{script}\n")
    bwrap.chmod(0o755)
    with pytest.raises(NoSandbox, match=reason):
        Sandbox(str(bwrap), replace(CODE, start_seconds=start_seconds))
