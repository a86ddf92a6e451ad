"""Judge processes: the pool kills late ones, confines all, and leaves none behind."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from processes import MATH, alive, wait_until

from oapl_jax.errors import RunError
from oapl_jax.rewards.math.verifier import MAX_REQUEST_BYTES, JudgePool

# A judge that does as it is told.
PROGRAM = """
import os, re, signal, sys, time
from oapl_jax.rewards.math.judge.supervisor import supervise

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
FORGED = '{"reply": "forged"}\n'
CONFIG = replace(MATH, processes=1, memory_bytes=1 << 28)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(PROGRAM)
    return (str(path),)


@pytest.fixture
def new_pool(program):
    """Makes pools with changed settings, and closes them."""
    with ExitStack() as made:
        yield lambda program=program, **changes: made.enter_context(
            closing(JudgePool(replace(CONFIG, **changes), program))
        )


@pytest.fixture(scope="module")
def pool(program):
    with closing(JudgePool(CONFIG, program)) as made:
        yield made


def ticks(pid):
    """CPU time that a process had, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait_until_gone(pids, seconds=60.0):
    wait_until(lambda: not any(map(alive, pids)), seconds)


def test_each_thread_gets_its_own_reply(new_pool):
    pool = new_pool(processes=2)
    ask = lambda i: pool.ask(["echo", {"number": i, "text": "ü\n" * 10}])["reply"]["number"]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(200))) == list(range(200))


@pytest.mark.parametrize("order", ["wait", "stubborn"])
def test_a_late_worker_is_killed_and_the_next_request_is_served(new_pool, order, tmp_path):
    pool = new_pool(seconds=0.5)
    worker, supervisor = pool.ask(["pids", None])["reply"]
    assert pool.ask([order, str(tmp_path / "never")]) == {"failed": "timeout"}
    assert (alive(worker), alive(supervisor)) == (False, True)
    fresh, same = pool.ask(["pids", None])["reply"]
    assert fresh != worker
    assert same == supervisor


def test_a_waiting_request_does_not_hold_the_others(new_pool, tmp_path):
    flag, pool = tmp_path / "flag", new_pool(processes=2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.ask, ["wait", str(flag)])
        assert [pool.ask(["echo", i])["reply"] for i in range(20)] == list(range(20))
        assert not waiting.done()
        flag.touch()
        assert waiting.result() == {"reply": str(flag)}


@pytest.mark.parametrize(
    ("order", "value", "reply"),
    [
        ("allocate", 1 << 24, {"reply": 1 << 24}),
        ("allocate", 1 << 29, {"failed": "crash", "detail": "out of memory"}),
        ("exit", 3, {"failed": "crash", "detail": "the worker ended with 3"}),
        ("raise", "x", {"failed": "crash", "detail": "KeyError: 'x'"}),
        ("print", FORGED, {"reply": FORGED}),  # what is printed does not reach the replies
    ],
)
def test_a_request_costs_the_next_one_nothing(pool, order, value, reply):
    assert pool.ask([order, value]) == reply
    assert pool.ask(["echo", 1]) == {"reply": 1}


def test_workers_are_recycled(new_pool):
    pool = new_pool(recycle_after=3)
    workers = [pool.ask(["pids", None])["reply"][0] for _ in range(7)]
    first, second, third = dict.fromkeys(workers)
    assert workers == [first] * 3 + [second] * 3 + [third]
    wait_until_gone([first, second])


def test_a_worker_sees_neither_accelerators_nor_this_environment(pool):
    environment = pool.ask(["environment", None])["reply"]
    assert environment.pop("JAX_PLATFORMS") == "cpu"
    assert environment.pop("CUDA_VISIBLE_DEVICES") == ""
    assert set(environment) <= {"LANG", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONPATH"}
    modules = pool.ask(["modules", None])["reply"]
    assert not {name.split(".")[0] for name in modules} & {"jax", "jaxlib", "flax", "numpy"}
    assert {name for name in modules if name.startswith("oapl_jax")} == {
        *("oapl_jax", "oapl_jax.rewards", "oapl_jax.rewards.math", "oapl_jax.rewards.math.judge"),
        *("oapl_jax.rewards.math.judge.supervisor", "oapl_jax.rewards.worker_process"),
    }


@pytest.mark.parametrize(
    ("order", "event"),
    [("write", "open"), ("remove", "os.remove"), ("system", "os.system"), ("fork", "os.fork")],
)
def test_a_worker_touches_nothing(pool, tmp_path, order, event):
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    assert_refused(pool.ask([order, str(old if order == "remove" else new)]), event)
    assert (old.exists(), new.exists()) == (True, False)


def assert_refused(reply, event):
    assert reply["failed"] == "crash"
    assert reply["detail"].startswith(f"refused: {event}")


def test_text_does_not_become_code_unless_it_is_named(pool):
    assert pool.ask(["eval", "1 + 1"]) == {"reply": 2}
    assert_refused(pool.ask(["eval", "1 + 1 + 1"]), "compile")


def test_a_dead_supervisor_is_replaced(new_pool):
    pool = new_pool()
    worker, supervisor = pool.ask(["pids", None])["reply"]
    os.kill(supervisor, signal.SIGKILL)
    assert pool.ask(["echo", 1]) == {"failed": "crash", "detail": "the process ended"}
    wait_until_gone([worker])
    assert pool.ask(["echo", 1]) == {"reply": 1}


def test_closing_ends_every_process(program):
    with closing(JudgePool(CONFIG, program)) as pool:
        pids = pool.ask(["pids", None])["reply"]
        assert all(map(alive, pids))
    wait_until_gone(pids)
    with pytest.raises(RunError):
        pool.ask(["echo", 1])


def test_nothing_outlives_a_parent_that_is_killed(program):
    code = (
        "from oapl_jax.config import MathRewardConfig\n"
        "from oapl_jax.rewards.math.verifier import JudgePool\n"
        f"pool = JudgePool({CONFIG}, {program})\n"
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


def test_a_large_request_and_a_process_that_does_not_start_are_errors(new_pool, pool, tmp_path):
    with pytest.raises(ValueError, match="exceeds"):
        pool.ask(["echo", "x" * MAX_REQUEST_BYTES])
    with pytest.raises(RunError):
        new_pool(program=(str(tmp_path / "none.py"),)).ask(["echo", 1])
