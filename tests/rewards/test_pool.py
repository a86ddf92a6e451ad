"""The pool kills what is late, confines what runs, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.math import pool as pool_module
from oapl_jax.rewards.math.pool import MAX_REQUEST_BYTES, Pool

# A judge that does as it is told.
PROGRAM = f"""
import os, re, signal, sys, time
sys.path.insert(0, {str(Path(pool_module.__file__).parent / "judge")!r})
from supervisor import supervise

def judge(request):
    order, value = request
    match order:
        case "echo": return value
        case "pids": return [os.getpid(), os.getppid()]
        case "environment": return dict(os.environ)
        case "modules": return sorted(sys.modules)
        case "wait":
            while not os.path.exists(value): time.sleep(0.01)
            return value
        case "stubborn":
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(name, signal.SIG_IGN)
            while True: 9 ** (9 ** 6)
        case "allocate": return len(bytearray(value))
        case "exit": os._exit(value)
        case "raise": raise KeyError(value)
        case "print": print(value, flush=True); sys.stderr.write(value); return value
        case "eval": return eval(value)
        case "write": open(value, "w").write("mine")
        case "remove": os.remove(value)
        case "system": os.system("touch " + value)
        case "fork": return os.fork()

supervise(
    judge,
    generated=re.compile(r"1 \\+ 1"),
    seconds=float(sys.argv[1]),
    recycle_after=int(sys.argv[2]),
    memory_bytes=int(sys.argv[3]),
)
"""
SIZES: dict[str, Any] = dict(processes=1, seconds=60.0, recycle_after=1000, memory_bytes=1 << 28)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def pool(program):
    with Pool(program, **SIZES) as made:
        yield made


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ticks(pid):
    """CPU time that a process had, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait_until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.02)


def wait_until_gone(pids, seconds=60.0):
    wait_until(lambda: not any(map(alive, pids)), seconds)


def test_each_thread_gets_its_own_reply(program):
    ask = lambda i: made.ask(["echo", {"number": i, "text": "ü\n" * 10}])["reply"]["number"]
    with Pool(program, **{**SIZES, "processes": 2}) as made, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(200))) == list(range(200))


@pytest.mark.parametrize("order", ["wait", "stubborn"])
def test_what_is_late_is_killed_and_the_next_request_is_served(program, order, tmp_path):
    with Pool(program, **{**SIZES, "seconds": 0.5}) as made:
        worker, supervisor = made.ask(["pids", None])["reply"]
        assert made.ask([order, str(tmp_path / "never")]) == {"failed": "timeout"}
        assert not alive(worker)
        assert alive(supervisor)
        fresh, same = made.ask(["pids", None])["reply"]
        assert fresh != worker
        assert same == supervisor


def test_one_that_waits_does_not_hold_the_others(program, tmp_path):
    flag = tmp_path / "flag"
    with Pool(program, **{**SIZES, "processes": 2}) as made, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(made.ask, ["wait", str(flag)])
        assert [made.ask(["echo", i])["reply"] for i in range(20)] == list(range(20))
        assert not waiting.done()
        flag.touch()
        assert waiting.result() == {"reply": str(flag)}


def test_memory_is_bounded(pool):
    assert pool.ask(["allocate", 1 << 24]) == {"reply": 1 << 24}
    assert pool.ask(["allocate", 1 << 29]) == {"failed": "crash", "detail": "out of memory"}
    assert pool.ask(["echo", 1]) == {"reply": 1}


def test_a_crash_costs_its_own_request(pool):
    ended = {"failed": "crash", "detail": "the worker ended with 3"}
    assert pool.ask(["exit", 3]) == ended
    assert pool.ask(["raise", "x"]) == {"failed": "crash", "detail": "KeyError: 'x'"}
    assert pool.ask(["echo", 1]) == {"reply": 1}


def test_workers_are_recycled(program):
    with Pool(program, **{**SIZES, "recycle_after": 3}) as made:
        workers = [made.ask(["pids", None])["reply"][0] for _ in range(7)]
    assert workers[0] == workers[1] == workers[2]
    assert workers[3] == workers[4] == workers[5]
    assert len(set(workers)) == 3
    wait_until_gone(workers)


def test_a_worker_sees_neither_accelerators_nor_this_environment(pool):
    environment = pool.ask(["environment", None])["reply"]
    assert environment.pop("JAX_PLATFORMS") == "cpu"
    assert environment.pop("CUDA_VISIBLE_DEVICES") == ""
    assert set(environment) <= {"LANG", "LC_CTYPE", "LD_LIBRARY_PATH"}
    modules = {name.split(".")[0] for name in pool.ask(["modules", None])["reply"]}
    assert not modules & {"jax", "jaxlib", "flax", "numpy", "oapl_jax"}


@pytest.mark.parametrize(
    ("order", "event"),
    [("write", "open"), ("remove", "os.remove"), ("system", "os.system"), ("fork", "os.fork")],
)
def test_a_worker_touches_nothing(pool, tmp_path, order, event):
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    reply = pool.ask([order, str(old if order == "remove" else new)])
    assert reply["failed"] == "crash"
    assert reply["detail"].startswith(f"refused: {event}")
    assert old.exists()
    assert not new.exists()


def test_text_does_not_become_code_unless_it_is_named(pool):
    assert pool.ask(["eval", "1 + 1"]) == {"reply": 2}
    reply = pool.ask(["eval", "1 + 1 + 1"])
    assert reply["failed"] == "crash"
    assert reply["detail"].startswith("refused: compile")


def test_what_is_printed_does_not_reach_the_replies(pool):
    assert pool.ask(["print", '{"reply": "forged"}\n']) == {"reply": '{"reply": "forged"}\n'}
    assert pool.ask(["echo", 1]) == {"reply": 1}


def test_a_dead_supervisor_is_replaced(program):
    with Pool(program, **SIZES) as made:
        worker, supervisor = made.ask(["pids", None])["reply"]
        os.kill(supervisor, signal.SIGKILL)
        assert made.ask(["echo", 1]) == {"failed": "crash", "detail": "the process ended"}
        wait_until_gone([worker])
        assert made.ask(["echo", 1]) == {"reply": 1}


def test_closing_ends_every_process(program):
    with Pool(program, **SIZES) as made:
        pids = made.ask(["pids", None])["reply"]
        assert all(map(alive, pids))
    wait_until_gone(pids)
    with pytest.raises(RunError, match="closed"):
        made.ask(["echo", 1])


def test_nothing_outlives_a_parent_that_is_killed(program):
    code = (
        "import sys; from pathlib import Path; from oapl_jax.rewards.math.pool import Pool\n"
        f"pool = Pool(Path({str(program)!r}), **{SIZES})\n"
        "print(*pool.ask(['pids', None])['reply'], flush=True)\n"
        "pool.ask(['stubborn', None])\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        wait_until(lambda: ticks(pids[0]) > 50)  # it is at it
        assert alive(pids[1])
        parent.kill()
    wait_until_gone(pids, seconds=30)  # before the deadline of the request


def test_mistakes_are_named(program, tmp_path, pool):
    with pytest.raises(UserError, match="recycle_after=0"):
        Pool(program, **{**SIZES, "recycle_after": 0})
    with pytest.raises(ValueError, match="exceeds"):
        pool.ask(["echo", "x" * MAX_REQUEST_BYTES])
    with (
        Pool(tmp_path / "none.py", **SIZES) as made,
        pytest.raises(RunError, match="did not start"),
    ):
        made.ask(["echo", 1])
