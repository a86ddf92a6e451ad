"""The ledger: rows and sums worked out by hand, random runs with kills, and a real SIGKILL.

Run as a program, this file writes groups for ever, to be killed.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from bucket import emulated
from etils import epath

from oapl_jax import report
from oapl_jax.errors import NoReward, RunError, UserError, exit_with_code
from oapl_jax.files import open_log, read_log
from oapl_jax.rollout.ledger import FILE, Ledger, LedgerReport, ZeroRewardGuard, table
from oapl_jax.rollout.sampler import Attempt, Sampled
from oapl_jax.structs import Group, Prompt, Rollout

N = 2


def make_prompt(draw):
    return Prompt(f"id{draw % 10}", draw, np.zeros(1, np.int32), "", "", "")


def make_sampled(draw, *, lengths=(3, 5), server="a", seconds=0.5, attempts=()):
    rollouts = tuple(
        Rollout(np.zeros(n, np.int32), np.zeros(n, np.float32), 4, "length" if n >= 8 else "stop")
        for n in lengths
    )
    return Sampled(make_prompt(draw), rollouts, server, seconds, attempts)


class Writer:
    """A ledger, and the groups that it has been told of."""

    def __init__(self, directory):
        self.path = epath.Path(directory / FILE)
        self.ledger = Ledger(self.path)
        self.groups = {}

    def request(self, *draws):
        for draw in draws:
            self.ledger.request(make_prompt(draw), N)

    def sampled(self, draw, reward=(0.0, 1.0), **options):
        sampled = make_sampled(draw, **options)
        reward = np.array(reward[: len(sampled.rollouts)], np.float32)
        self.ledger.sampled(sampled, reward)
        if sampled.rollouts:
            self.groups[draw] = Group(sampled.prompt, sampled.rollouts, reward)

    def end(self, draw, end, step=None):
        self.ledger.end(self.groups[draw], end, step)

    def reopen(self):
        self.ledger.close()
        self.ledger = Ledger(self.path)

    def read(self):
        return LedgerReport(self.path)

    def rows(self):
        return {row.id: row for row in self.read().rollouts()}

    def balance(self):
        summary = self.read().summary()
        assert summary["balanced"], summary["faults"]
        assert sum(summary["balance"].values()) == summary["requested"]
        return {state: count for state, count in summary["balance"].items() if count}


@pytest.fixture
def writer(tmp_path):
    made = Writer(tmp_path)
    yield made
    made.ledger.close()


def test_a_rollout_from_request_to_training(writer):
    assert writer.balance() == {}
    writer.request(7)
    assert writer.balance() == {"in flight": N}
    (row, other) = writer.rows().values()
    assert (row.id, other.id, row.prompt) == ("0.7.0.0", "0.7.0.1", "id7")
    assert (row.version, row.server, row.tokens, row.reward, row.sampled) == (None,) * 5
    writer.sampled(7, lengths=(3, 8))
    assert writer.balance() == {"held": N}
    writer.end(7, "trained", 12)
    assert writer.balance() == {"trained": N}
    first, second = writer.rows().values()
    assert (first.version, first.server, first.seconds) == (4, "a", 0.5)
    assert (first.tokens, first.finish_reason, first.reward) == (3, "stop", 0.0)
    assert (second.tokens, second.finish_reason, second.reward) == (8, "length", 1.0)
    assert (first.state, first.step, first.reason, first.reissued_as) == ("trained", 12, None, None)
    assert 1.7e9 < first.requested <= first.sampled <= first.ended
    writer.ledger.resume(writer.ledger.position(), [7])  # a replay goes on using it
    assert writer.balance() == {"trained": N}


def test_attempts_that_came_to_nothing_are_rows_that_name_their_successors(writer):
    first, second = Attempt("b", 3, "aborted", 1.5), Attempt("c", 4, "mixed", 2.5)
    writer.request(0, 1)
    writer.sampled(0, attempts=(first, second))
    writer.sampled(1, lengths=(), attempts=(first, second))
    writer.end(0, "trained", 9)
    assert writer.balance() == {"trained": N, "failed": N, "reissued": 2 * N + N}
    rows = writer.rows()
    told = lambda row: (row.server, row.version, row.seconds, row.reason, row.state)
    assert told(rows["0.0.0.1"]) == ("b", 3, 1.5, "aborted", "reissued")
    assert told(rows["0.0.1.1"]) == ("c", 4, 2.5, "mixed", "reissued")
    assert told(rows["0.0.2.1"]) == ("a", 4, 0.5, None, "trained")
    assert [rows[f"0.0.{i}.1"].reissued_as for i in range(3)] == ["0.0.1.1", "0.0.2.1", None]
    assert [rows[f"0.0.{i}.1"].step for i in range(3)] == [None, None, 9]
    assert told(rows["0.1.0.0"]) == ("b", 3, 1.5, "aborted", "reissued")
    assert told(rows["0.1.1.0"]) == ("c", 4, 2.5, "mixed", "failed")
    assert "0.1.2.0" not in rows


def test_the_report_of_a_resumed_run_starts_from_its_checkpoint(writer):
    writer.request(0, 1, 2, 3)
    for draw in (0, 1, 2):
        writer.sampled(draw)
    writer.end(0, "trained", 0)
    position = writer.ledger.position()  # held: 1, 2; in flight: 3
    writer.end(1, "trained", 1)
    writer.sampled(3)
    writer.end(3, "expired")
    writer.request(4)
    writer.sampled(4)
    writer.end(4, "trained", 1)
    assert writer.balance() == {"trained": 3 * N, "expired": N, "held": N}

    writer.reopen()
    writer.ledger.resume(position, {1, 2})
    assert writer.balance() == {"trained": N, "held": 2 * N, "rewound": 2 * N}
    row = writer.rows()["0.1.0.0"]
    assert (row.state, row.step, row.ended) == ("held", None, None)
    writer.request(3, 4)
    writer.end(1, "trained", 1)
    for draw in (3, 4):
        writer.sampled(draw)
        writer.end(draw, "trained", 2)
    rows = writer.rows()
    states = {name[:-4]: row.state for name, row in rows.items() if name.endswith(".0.0")}
    assert states == {
        **dict.fromkeys(("0.0", "0.1", "1.3", "1.4"), "trained"),
        "0.2": "held",
        "0.3": "rewound",
        "0.4": "rewound",
    }
    assert rows["0.4.0.0"].step is None  # that step was undone
    assert (rows["0.4.0.0"].tokens, rows["0.4.0.0"].server) == (3, "a")  # but it was sampled


def test_a_run_that_goes_back_to_the_same_checkpoint_twice(writer, monkeypatch):
    clock = itertools.count(1000)
    monkeypatch.setattr("oapl_jax.rollout.ledger.time.time", lambda: next(clock))
    writer.request(0, 1)
    writer.sampled(0)
    position = writer.ledger.position()
    for _ in range(3):
        writer.end(0, "trained", 0)
        writer.reopen()
        writer.ledger.resume(position, [0])
        writer.request(1)
        writer.sampled(1)
    assert writer.balance() == {"held": 2 * N, "rewound": 3 * N}
    assert [writer.rows()[f"{i}.1.0.0"].ended for i in range(3)] == [1004, 1008, 1012]
    ids = [row.id for row in writer.read().rollouts()]
    assert len(set(ids)) == len(ids)


def test_a_run_that_goes_back_further_than_before(writer):
    writer.request(0)
    writer.sampled(0)
    early = writer.ledger.position()  # held: 0
    writer.end(0, "trained", 0)
    writer.request(1)
    late = writer.ledger.position()  # in flight: 1
    writer.ledger.resume(late, [])
    writer.request(1)
    writer.sampled(1)
    assert writer.balance() == {"trained": N, "rewound": N, "held": N}
    writer.ledger.resume(early, [0])
    assert writer.balance() == {"held": N, "rewound": 2 * N}


def test_a_run_killed_before_its_first_checkpoint_restarts(writer):
    writer.request(0, 1)
    writer.sampled(0)
    writer.end(0, "trained", 0)
    writer.reopen()
    assert writer.balance() == {"in flight": N, "trained": N}
    writer.request(0, 1)
    assert writer.balance() == {"rewound": 2 * N, "in flight": 2 * N}
    assert set(writer.rows()) == {f"{i}.{d}.0.{s}" for i in (0, 1) for d in (0, 1) for s in (0, 1)}


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_line_is_ignored_and_then_removed(writer, cut):
    writer.request(0)
    whole = writer.path.read_bytes()
    writer.request(1)
    writer.ledger.close()
    writer.path.write_bytes(writer.path.read_bytes()[:-cut])
    assert writer.balance() == {"in flight": N}
    writer.reopen()
    assert writer.path.read_bytes() == whole
    writer.ledger.resume(len(whole), [])
    writer.request(1)
    assert writer.balance() == {"rewound": N, "in flight": N}


def test_a_file_that_is_damaged_missing_or_too_short_is_refused(writer):
    writer.request(0, 1, 2)
    position, content = writer.ledger.position(), writer.path.read_bytes()
    assert position == len(content)
    second = content.index(b"\n") + 1
    writer.path.write_bytes(content[: second + 4] + b"#" + content[second + 5 :])
    with pytest.raises(UserError, match=f"byte {second}"):
        writer.read()
    writer.path.unlink()
    with pytest.raises(UserError, match=FILE):
        writer.read()
    writer.reopen()
    with pytest.raises(UserError, match=rf"{FILE} .*{position}"):
        writer.ledger.resume(position, [])


@pytest.mark.parametrize("seed", range(4))
def test_sums_balance_at_any_time_of_any_run(tmp_path, seed):
    """Random groups, attempts, checkpoints and kills, against a plain dictionary of states."""
    rng = np.random.default_rng(seed)
    writer = Writer(tmp_path)
    alive = {}  # draw -> state, of what has not been rewound
    closed = Counter()  # rollouts that nothing changes any more
    saved, saved_again, saved_next, position = {}, [], 0, 0
    draws, next_draw, kills = [], 0, 0
    for step in range(400):
        flying = [d for d, state in alive.items() if state == "in flight"]
        held = [d for d, state in alive.items() if state == "held"]
        match rng.choice(["request"] * 5 + ["sampled"] * 5 + ["end"] * 4 + ["save", "kill"]):
            case "request":
                draw = draws.pop(0) if draws else next_draw
                next_draw = max(next_draw, draw + 1)
                writer.request(draw)
                alive[draw] = "in flight"
            case "sampled" if flying:
                draw, failed = int(rng.choice(flying)), rng.random() < 0.2
                attempts = (Attempt("b", 1, "failed", 0.1),) * int(rng.integers(0, 3))
                writer.sampled(draw, lengths=() if failed else (1, 9), attempts=attempts)
                alive[draw] = "failed" if failed else "held"
                closed["reissued"] += N * max(len(attempts) - failed, 0)
            case "end" if held:
                draw = int(rng.choice(held))
                alive[draw] = str(rng.choice(["trained", "expired", "zero_variance"]))
                writer.end(draw, alive[draw], 3 if alive[draw] == "trained" else None)
            case "save":
                saved, saved_again, saved_next = dict(alive), list(draws), next_draw
                position = writer.ledger.position()
            case "kill" if position:
                kills += 1
                writer.ledger.close()
                if rng.random() < 0.5:  # in the middle of a line
                    with writer.path.open("ab") as file:
                        file.write(b'{"event":"req')
                writer.ledger = Ledger(writer.path)
                keeps = {d: s for d, s in saved.items() if s != "in flight"}
                closed["rewound"] += N * (len(alive) - len(keeps))
                writer.ledger.resume(position, [d for d, s in keeps.items() if s == "held"])
                lost = [d for d, s in saved.items() if s == "in flight"]
                alive, next_draw = keeps, saved_next
                draws = sorted({*saved_again, *lost})
        if step % 4:
            continue
        expected = Counter(closed)
        for state in alive.values():
            expected[state] += N
        assert writer.balance() == +expected
    assert kills > 3


@pytest.mark.parametrize(
    "events",
    [
        "end",
        "request end",
        "request request",
        "request sampled sampled",
        "request sampled end end",
        "request sampled end request",
        "request short",
        "request resume",
        "request position sampled resume",
    ],
)
def test_events_that_contradict_each_other_are_faults(writer, events):
    sampled, positions = make_sampled(0), []
    group = Group(sampled.prompt, sampled.rollouts, np.zeros(2, np.float32))
    position = writer.ledger.position
    act = {
        "request": lambda: writer.request(0),
        "sampled": lambda: writer.sampled(0),
        "short": lambda: writer.sampled(0, lengths=(3,)),
        "end": lambda: writer.ledger.end(group, "trained", 0),
        "position": lambda: positions.append(position()),
        "resume": lambda: writer.ledger.resume((positions or [position()])[0], [0]),
    }
    for event in events.split():
        act[event]()
    summary = writer.read().summary()
    assert not summary["balanced"]
    assert any("group 0" in fault for fault in summary["faults"])


def test_bias_and_throughput_worked_out_by_hand(writer, monkeypatch):
    clock = itertools.count(1000)
    monkeypatch.setattr("oapl_jax.rollout.ledger.time.time", lambda: next(clock))
    retry = (Attempt("c", 1, "failed", 0.1),)
    writer.request(0, 1, 2, 3)  # 1000 to 1003
    writer.sampled(0, lengths=(2, 4), reward=(0.0, 1.0), seconds=3.0)  # 1004: [1001, 1004]
    writer.sampled(1, lengths=(4, 8), reward=(1.0, 1.0), seconds=2.0)  # 1005: [1003, 1005]
    writer.sampled(2, lengths=(8, 8), reward=(0.0, 0.0), seconds=1.0, server="b")
    writer.sampled(3, lengths=(1, 1), reward=(0.0, 1.0), seconds=0.5, attempts=retry)  # [1006.5,
    writer.end(0, "trained", 0)
    writer.end(1, "trained", 0)
    writer.end(2, "zero_variance")
    summary = writer.read().summary()
    assert summary["bias"] == {
        "trained": dict(rollouts=4, length=18 / 4, truncated=1 / 4, reward=3 / 4),
        "zero_variance": dict(rollouts=2, length=8, truncated=1, reward=0),
        "held": dict(rollouts=2, length=1, truncated=0, reward=1 / 2),
        "reissued": dict(rollouts=2, length=1, truncated=0, reward=1 / 2),
    }
    servers = {name: tuple(of.values()) for name, of in summary["servers"].items()}
    assert servers == {
        "a": (3, 6, 20, 0, 4.5, 20 / 4.5),  # two groups at a time from 1003 to 1004
        "b": (1, 2, 16, 0, 1.0, 16.0),
        "c": (0, 0, 0, 1, 0.0, 0.0),
    }
    lines = [line.split() for line in table(summary).splitlines()]
    assert ["trained", "4", "40.00%"] in lines
    assert ["trained", "4", "4.50", "0.250", "0.750"] in lines
    assert ["b", "1", "2", "16", "0", "1.0", "16"] in lines


def test_the_command_says_whether_the_sums_balance(writer, tmp_path, monkeypatch, capsys):
    def command(directory, *arguments):
        """Returns the exit code and what is printed."""
        monkeypatch.setattr(sys, "argv", ["report", str(directory), *arguments])
        code = 0
        try:
            exit_with_code(report.main)
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr()

    writer.request(0, 1)
    writer.sampled(0)
    assert command(tmp_path)[0] == 0
    assert json.loads(command(tmp_path, "--json")[1].out) == writer.read().summary()
    writer.request(1)
    for directory, expected, name in (
        (tmp_path, 1, "group 1"),
        (tmp_path / "nothing", 2, "nothing/ledger.jsonl"),
    ):
        code, printed = command(directory)
        assert code == expected
        assert name in printed.err


def guarded(*reward, tokens=(65, 66)):
    """A group for the guard, whose tokens are characters."""
    logp = np.zeros(len(tokens), np.float32)
    rollout = Rollout(np.array(tokens, np.int32), logp, 0, "length")
    asked = Prompt("id7", 0, np.array([80, 81], np.int32), "", "the reference", "")
    return Group(asked, (rollout,) * len(reward), np.array(reward, np.float32))


def guard_of(limit):
    return ZeroRewardGuard(limit=limit, decode=lambda tokens: "".join(map(chr, tokens)))


def test_groups_without_a_reward_are_counted_in_a_row():
    guard = guard_of(3)
    for reward in ((0, 0), (0, 0), (0, 1), (0, 0), (0, -0.5), (0, 0), (0, 0)):
        guard.note(guarded(*reward))
    assert guard.count == 2
    with pytest.raises(NoReward, match=r"max_zero_reward_groups=3"):
        guard.note(guarded(0, 0))
    off = guard_of(0)
    for _ in range(50):
        off.note(guarded(0, 0))
    assert off.count == 50


def test_the_message_shows_the_prompt_and_some_responses():
    long = tuple(range(65, 91)) * 40
    with pytest.raises(NoReward) as stopped:
        guard_of(1).note(guarded(0, 0, 0, 0, 0, tokens=long))
    text = str(stopped.value)
    assert "rollout.max_zero_reward_groups=1" in text
    assert all(shown in text for shown in ("id7\nPQ\n", "the reference"))
    assert text.count("1040 tokens, finish reason length\nABC") == text.count("\n[..]\n") == 3
    assert isinstance(stopped.value, RunError)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_kill_loses_no_event_that_was_told(tmp_path, place):
    """The child says of each event, after it, that it was told; all of these are in the file."""
    with emulated("ledger") if place == "bucket" else contextlib.nullcontext() as bucket:
        kill_and_read(bucket or epath.Path(tmp_path), tmp_path)


def kill_and_read(directory, tmp_path):
    position, held = 0, []
    for kill in range(3):
        command = [sys.executable, __file__, str(directory), str(position), json.dumps(held)]
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | path)
        stream = child.stdout
        told = [stream.readline() for _ in range(200 + 37 * kill)]
        os.kill(child.pid, signal.SIGKILL)
        told = [line for line in told + stream.readlines() if line.endswith("\n")]
        child.wait()
        open_log(directory / FILE).close()  # on this machine the next process uploads the last ones
        found = LedgerReport(directory / FILE)
        assert found.summary()["balanced"]
        mine = {e.stream_index: e.state for e in found.groups() if e.incarnation == kill}
        assert len(told) >= 200
        for line in told:
            kind, draw = line.split()
            states = {"request": ("in flight", "held", "trained"), "sampled": ("held", "trained")}
            assert mine[int(draw)] in states.get(kind, ("trained",))
        # As if this child had saved a checkpoint in the middle of what it did.
        events = b"".join(read_log(directory / FILE)).splitlines(keepends=True)
        resumes = [i for i, event in enumerate(events) if b'"resume"' in event]
        middle = (len(events) + [0, *resumes][-1]) // 2
        position = sum(map(len, events[:middle]))
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(b"".join(events[:middle]))
        held = [e.stream_index for e in LedgerReport(epath.Path(cut)).groups() if e.state == "held"]


def write_for_ever(directory, position, held):
    writer = Writer(epath.Path(directory))
    writer.ledger.resume(position, held)
    entries = writer.read().groups()
    done = {e.stream_index for e in entries if e.state not in ("in flight", "rewound")}
    for draw in itertools.filterfalse(done.__contains__, itertools.count()):
        writer.request(draw)
        print("request", draw, flush=True)
        writer.sampled(draw)
        print("sampled", draw, flush=True)
        writer.end(draw, "trained", 0)
        print("trained", draw, flush=True)


if __name__ == "__main__":
    write_for_ever(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
