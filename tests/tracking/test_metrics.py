"""Metrics: each step once however a run was interrupted, and numbers worked out by hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import emulated
from disks import no_file_larger_than
from etils import epath
from small_runs import metrics as lines
from tensorboardX.proto import event_pb2

from oapl_jax.config import TrackingConfig
from oapl_jax.errors import UserError
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.tracking.metrics import (
    CompileClock,
    MetricsWriter,
    StepClock,
    group_metrics,
    read_last_lines,
    read_lines,
    residuals_by_lag,
)
from oapl_jax.tracking.trackers import FILE, trackers


@pytest.fixture(scope="module")
def bucket():
    with emulated("metrics") as bucket:
        yield bucket


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def open_writer(workdir, start_step=0, tensorboard=False):
    section = TrackingConfig(tensorboard=tensorboard, wandb="off", project="")
    return MetricsWriter(trackers(section, workdir, start_step=start_step, config={}))


def write(workdir, steps, start_step=0, tensorboard=False, **values):
    writer = open_writer(workdir, start_step, tensorboard)
    for step in steps:
        writer.write(step, {"loss": step / 2, **values})
    writer.close()


def steps(workdir):
    return [line["step"] for line in lines(workdir)]


def test_an_object_a_step_with_the_step_first(workdir):
    assert read_lines(workdir / "metrics.jsonl") == []
    write(workdir, [1, 2], reward=np.float32(0.5), count=jnp.int32(3))
    assert lines(workdir) == [
        {"step": 1, "count": 3.0, "loss": 0.5, "reward": 0.5},
        {"step": 2, "count": 3.0, "loss": 1.0, "reward": 0.5},
    ]
    assert read_lines(workdir / "metrics.jsonl") == lines(workdir)
    assert (workdir / "metrics.jsonl").read_text().startswith('{"step":1,')


@pytest.mark.parametrize("saved", [0, 2, 5])
def test_a_resumed_run_writes_each_step_once(workdir, saved):
    write(workdir, range(1, 6), run=1)
    write(workdir, range(saved + 1, 8), start_step=saved, run=2)
    assert steps(workdir) == list(range(1, 8))
    assert [line["run"] for line in lines(workdir)] == [1] * saved + [2] * (7 - saved)
    assert [p.name for p in workdir.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_line_that_a_kill_has_cut_is_removed(workdir, cut):
    write(workdir, [1, 2, 3])
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    write(workdir, [3, 4], start_step=3)  # even if the checkpoint is newer
    assert steps(workdir) == [1, 2, 3, 4]


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\0" * 512 + b'{"step":4}\n', b"\0\n\0\0\n"])
def test_nul_bytes_that_a_crash_has_left_are_removed(workdir, tail):
    write(workdir, [1, 2, 3])
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    write(workdir, [4], start_step=3)
    assert steps(workdir) == [1, 2, 3, 4]


def test_a_damaged_line_before_others_is_named(workdir):
    write(workdir, [1, 2, 3])
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step":2', '{step":2'))
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        open_writer(workdir, start_step=3)


def test_a_full_disk_ends_no_run_and_loses_only_what_does_not_fit(workdir, capsys):
    writer = open_writer(workdir, tensorboard=True)
    with no_file_larger_than(2000):
        for step in range(1, 200):
            writer.write(step, {"loss": 1.0})
    lost = dict(writer.failed)
    writer.write(200, {"loss": 1.0})  # there is room again
    writer.close()
    assert lost[FILE] > 50
    assert lost["TensorBoard"] > 50
    assert writer.failed == lost
    assert steps(workdir)[-1] == 200
    assert steps(workdir) == sorted(set(steps(workdir)))
    said = capsys.readouterr().out
    assert said.count("the run goes on") == 2
    assert f"{lost[FILE]} writes" in said


class Failing:
    """A tracker that fails at the steps given."""

    def __init__(self, *steps):
        self.steps, self.got, self.closed = steps, [], False

    def write(self, step, line):
        if step in self.steps:
            raise ConnectionError("no network")
        self.got.append((step, line.get("tracking/failed", 0)))

    def sync(self):
        raise ConnectionError("no network")

    def close(self):
        raise RuntimeError("nothing is sent")


def test_a_tracker_that_fails_is_counted_and_tried_again():
    failing, whole = Failing(2, 3), Failing()
    writer = MetricsWriter({"first": lambda: failing, "second": lambda: whole})
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0})
    assert failing.got == [(1, 0), (4, 2), (5, 2)]
    assert whole.got == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2)]
    assert writer.failed == {"first": 2}
    writer.sync()
    writer.close()
    assert writer.failed == {"first": 4, "second": 2}


def test_a_tracker_that_does_not_open_counts_each_line(workdir):
    def refuse():
        raise OSError("no such place")

    writer = MetricsWriter({"first": refuse})
    lines_written = [writer.write(step, {"loss": 1.0}) for step in (1, 2)]
    assert [line["tracking/failed"] for line in lines_written] == [1.0, 2.0]
    writer.close()
    (workdir / "tensorboard").write_text("a file in the directory's place")
    write(workdir, [1, 2], tensorboard=True)
    assert steps(workdir) == [1, 2]


def test_the_last_lines_of_a_long_file(workdir):
    write(workdir, range(1, 50))
    path = workdir / "metrics.jsonl"
    assert read_last_lines(path) == read_lines(path)
    assert read_last_lines(path, size=100) == read_lines(path)[-len(read_last_lines(path, 100)) :]
    assert 0 < len(read_last_lines(path, size=100)) < 5
    assert read_last_lines(workdir / "none") == []


def test_a_line_is_there_at_once_without_values_that_are_not_finite(workdir):
    writer, table = open_writer(workdir, tensorboard=True), {"0": 3, "2": 1}
    values = {"nothing": np.float32(np.nan), "over": jnp.inf, "under": -np.inf, "zero": 0.0}
    written = writer.write(1, {**values, "lag/histogram": table})
    assert [written] == [{"step": 1, "zero": 0.0, "lag/histogram": table}] == lines(workdir)
    writer.close()


def events(workdir):
    """(step, tag, value) of every scalar in the event files: length, checksum, event, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            content = content[16 + size :]
    return sorted(found)


def test_tensorboard_holds_the_same_numbers_if_asked(workdir):
    write(workdir, [1])
    assert not (workdir / "tensorboard").exists()
    write(workdir, [1, 2], tensorboard=True, nothing=np.nan, table={"0": 1})
    assert events(workdir) == [(1, "loss", 0.5), (2, "loss", 1.0)]


def make_group(reward, version, lengths, reasons):
    rollouts = tuple(
        Rollout(np.zeros(n, np.int32), np.zeros(n, np.float32), version, reason)
        for n, reason in zip(lengths, reasons, strict=True)
    )
    prompt = Prompt("p", 0, np.zeros(1, np.int32), "", "", "")
    return Group(prompt, rollouts, np.array(reward, np.float32))


def test_group_metrics_are_those_worked_out_by_hand(workdir):
    groups = [
        make_group([1.0, 0.0], 16, [3, 5], ["stop", "length"]),
        make_group([1.0, 1.0], 12, [2, 2], ["stop", "stop"]),
        make_group([0.0, -1.0], 16, [4, 8], ["length", "length"]),
        make_group([0.0, 0.0], 20, [1, 1], ["stop", "stop"]),
    ]
    metrics = group_metrics(groups, step=20)
    assert metrics == {
        "reward": pytest.approx(2 / 8),
        "zero_variance": pytest.approx(2 / 4),
        "length": pytest.approx(26 / 8),
        "truncated": pytest.approx(3 / 8),
        "right_and_stopped": pytest.approx(3 / 8),
        "lag/mean": pytest.approx((4 * 4 + 2 * 8 + 2 * 0) / 8),
        "lag/max": 8,
        "lag/histogram": {"0": 2, "4": 4, "8": 2},
        "versions": 3,
    }
    assert list(metrics["lag/histogram"]) == ["0", "4", "8"]
    assert open_writer(workdir).write(21, metrics)["lag/histogram"] == {"0": 2, "4": 4, "8": 2}


def test_a_right_response_that_was_cut_off_is_not_counted_as_right():
    groups = [make_group([1.0, 1.0, 0.5, 0.0], 4, [1] * 4, ["stop", "length", "stop", "stop"])]
    assert group_metrics(groups, step=4)["right_and_stopped"] == 0.25


def test_residuals_by_lag_are_those_worked_out_by_hand():
    groups = [make_group([1.0, 0.0], v, [1, 1], ["stop"] * 2) for v in (16, 20, 16, 12)]
    residual = np.array([1, 3, 0.5, -0.5, -1, 5, np.nan, 1], np.float32)
    assert residuals_by_lag(groups, 20, residual) == {
        "residual/by_lag": {"0": 0.0, "4": 2.0},
        "residual/rms_by_lag": {"0": 0.5, "4": 3.0},
    }


def test_the_step_clock_sums_the_parts_until_they_are_taken(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    spent = StepClock()
    for part in ("publish", "learn", "publish"):
        spent(part)
    assert spent.take() == {"seconds/publish": 1.5, "seconds/learn": 2.0}
    spent("checkpoint")
    spent("publish")
    assert spent.take() == {"seconds/checkpoint": 6.5, "seconds/publish": 1.0}


def test_the_clock_counts_each_compiled_program_once():
    clock = CompileClock()
    add = jax.jit(lambda x: jnp.sin(x) + 1)
    x, y = jax.block_until_ready((jnp.ones(3), jnp.ones(4)))
    programs, seconds = clock.programs, clock.seconds
    for argument, compiled in ((x, 1), (x, 1), (y, 2)):
        add(argument).block_until_ready()
        assert clock.programs == programs + compiled
        assert 0 < clock.seconds - seconds < 60


KILLED = """
import os, sys
from etils import epath
from oapl_jax.config import TrackingConfig
from oapl_jax.tracking.metrics import MetricsWriter
from oapl_jax.tracking.trackers import trackers
section = TrackingConfig(tensorboard=True, wandb="off", project="")
writer = MetricsWriter(trackers(section, epath.Path(sys.argv[1]), start_step=0, config={}))
for step in range(1, 4):
    writer.write(step, {"loss": 1.0})
os._exit(9)
"""


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_killed_run_keeps_every_line_that_it_wrote(workdir, bucket, place):
    there = workdir if place == "disk" else bucket / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, os.fspath(there)])
    assert done.returncode == 9
    found = lambda: [line["step"] for line in read_lines(there / FILE)]
    if place == "bucket":
        write(there, [], start_step=3)  # it is on the disk of this machine, which uploads it
    assert found() == [1, 2, 3]
    write(there, [3, 4], start_step=2, tensorboard=True)
    assert found() == [1, 2, 3, 4]


def test_tensorboard_reads_a_bucket_while_it_grows(bucket):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer(bucket / "grows", tensorboard=True)
    events = EventAccumulator(os.fspath(bucket / "grows" / "tensorboard"))
    for step in range(1, 4):
        writer.write(step, {"loss": 1.0})
        writer.sync()
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, step + 1))
    writer.close()
