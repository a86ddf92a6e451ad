"""Checkpoints: bit-equal round trips, other meshes, failed saves, and weights to publish."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from disks import no_file_larger_than
from etils import epath
from flax.traverse_util import flatten_dict
from small_models import assert_same, small_config, small_mesh

from oapl_jax.errors import NotFinite, RunError, UserError
from oapl_jax.learner import train_step
from oapl_jax.model.transformer import Transformer
from oapl_jax.weights import checkpoint
from oapl_jax.weights.checkpoint import Checkpoints, Weights, check_params, checksums
from oapl_jax.weights.publisher import load_probe, open_params

PROBE = {"tokens": [[3, 1, 2]], "logp": [[-0.5, -1.25]], "dtype": "float32"}
LOOP = {
    "worker": {"stream_index": 12},
    "pins": {"3": [0, 3]},
    "before": {"pass@1": 0.1, "note": None},
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def abstract(mesh=None, model_type="qwen3"):
    """Shapes, dtypes and shardings of a state on a mesh, by default of one device."""
    model = Transformer(small_config(model_type), jnp.float32, "none")
    return train_step.abstract_state(model, OPTIMIZER, small_mesh() if mesh is None else mesh)


def random_state(mesh=None, seed=0):
    """All arrays differ and none is zero: nothing can be mistaken for a fresh state."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(size=leaf.shape)
        if leaf.dtype == jnp.int32:
            values = rng.integers(1, 10**6, leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract(mesh))


def save(checkpoints, step, state, loop=LOOP):
    checkpoints.save(step, state, loop, b"host", probe=PROBE)


@pytest.fixture
def opened(tmp_path):
    """Opens Checkpoints below one directory, each time as a new process would."""
    with contextlib.ExitStack() as stack:

        def made(keep=3):
            stack.close()
            checkpoints = Checkpoints(
                epath.Path(tmp_path / "checkpoints"), deadline=60.0, keep=keep
            )
            return stack.enter_context(contextlib.closing(checkpoints))

        yield made


def test_a_step_that_is_deleted_while_steps_are_listed_is_not_missed(tmp_path, monkeypatch):
    directory = epath.Path(tmp_path / "weights")
    open_steps = lambda: contextlib.closing(Weights(directory, deadline=60.0))
    with open_steps() as weights:
        for step in (0, 1):
            weights.save(step, {"w": jnp.ones(3)}, {})

    def deleted(step):  # after its name was read
        if step.step == 0:
            step.path.rmtree()

    monkeypatch.setattr(ocp.path.step.Metadata, "commit_timestamp_nsecs", property(deleted))
    with open_steps() as weights:
        assert weights.steps() == [1]


# Calls of Orbax that never end, as on a share that is gone.
ENDLESS = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from oapl_jax.weights.checkpoint import Checkpoints, Weights
directory = epath.Path(sys.argv[1])
setattr(ocp.CheckpointManager, sys.argv[2], lambda *_, **__: time.sleep(100))
if sys.argv[2] == "restore":
    Checkpoints(directory, deadline=1.0, keep=1).restore_params(0, {})
weights = Weights(directory, deadline=1.0)
weights.save(0, {"w": jnp.ones(3)}, {})
weights.wait()
"""


@pytest.mark.parametrize("call", ["wait_until_finished", "restore"])
def test_a_save_or_read_that_does_not_end_ends_the_process(tmp_path, call):
    command = [sys.executable, "-c", ENDLESS, tmp_path / "weights", call]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == RunError.exit_code
    (line,) = done.stderr.splitlines()
    assert "rollout.deadline" in line
    assert str(tmp_path) in line


# Round trips


def test_a_checkpoint_restores_bit_equal(opened, tmp_path):
    """A save deletes files of host states that a killed run left."""
    states = tmp_path / "host_states"
    for stale in ("7/host0of1", "3/host1of2", "3/host0of2"):
        (states / stale).parent.mkdir(parents=True, exist_ok=True)
        (states / stale).write_bytes(b"stale")
    state = random_state()
    save(opened(), 3, state)
    again = opened()
    assert again.steps() == [3]
    found, loop, host_states = again.restore(3, abstract())
    assert_same(found, state)
    assert loop == json.loads(json.dumps(LOOP))
    assert host_states == [b"host"]
    assert_same(again.restore_params(3, abstract().params), state.params)
    assert sorted(str(p.relative_to(states)) for p in states.rglob("host*")) == ["3/host0of1"]
    (states / "3" / "host0of1").rename(states / "3" / "host1of2")
    with pytest.raises(UserError, match="checkpoint step 3"):
        opened().restore(3, abstract())


def test_a_state_is_restored_on_another_mesh(opened):
    saved_on, restored_on = small_mesh(data=8), small_mesh(data=2, fsdp=2, tensor=2)
    state = random_state(saved_on)
    save(opened(), 5, state)
    wanted = abstract(restored_on)
    found, _, _ = opened().restore(5, wanted)
    assert_same(found, state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(str(b)), found, wanted)
    kernel = found.params["layers"]["q"]["kernel"]
    assert kernel.sharding.mesh.shape == dict(data=2, fsdp=2, context=1, tensor=2)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 16)  # of (2, 32, 32)
    moment = found.opt_state[1][0].mu["layers"]["q"]["kernel"]
    assert moment.addressable_shards[0].data.shape == (2, 16, 16)


def test_a_save_copies_its_arguments(opened, monkeypatch):
    changed, dumps = threading.Event(), json.dumps

    def late(*args, **options):
        if threading.current_thread() is not threading.main_thread():
            changed.wait(5)
        return dumps(*args, **options)

    monkeypatch.setattr(json, "dumps", late)
    state = random_state()
    expected = jax.device_get(state)
    loop = {"results": [1, 2]}
    checkpoints = opened()
    save(checkpoints, 1, state, loop)
    jax.tree.map(lambda x: x.delete(), state)  # as a donated buffer is
    loop["results"].append(3)
    changed.set()
    checkpoints.wait()
    found, loop, _ = checkpoints.restore(1, abstract())
    assert_same(jax.device_get(found), expected)
    assert loop == {"results": [1, 2]}


def test_only_the_newest_steps_are_kept(opened):
    states = [random_state(seed=seed) for seed in range(4)]
    checkpoints = opened(keep=2)
    for step, state in enumerate(states):
        save(checkpoints, 10 * step, state, {"step": step})
    again = opened(keep=2)
    assert again.steps() == [20, 30]
    for step in (2, 3):
        found, loop, _ = again.restore(10 * step, abstract())
        assert loop == {"step": step}
        assert_same(found, states[step])


def test_a_checkpoint_of_another_model_is_an_error(opened, tmp_path):
    checkpoints, other = opened(), abstract(model_type="llama")  # has no q_norm
    save(checkpoints, 3, random_state())
    checkpoints.wait()
    longer = lambda x: x.update(shape=(*x.shape[:-1], x.shape[-1] + 8))
    place = re.escape(str(tmp_path / "checkpoints"))
    for restore in (
        lambda: checkpoints.restore(3, other),
        lambda: checkpoints.restore_params(3, other.params),
        lambda: checkpoints.restore_params(3, jax.tree.map(longer, abstract().params)),
        lambda: checkpoints.restore(4, abstract()),
    ):
        with pytest.raises(UserError, match=rf"step \d below {place}"):
            restore()


# Weights for the publisher


def test_checkpoints_and_weights_have_the_same_parameters_and_probe(tmp_path, opened):
    """Uncompressed chunks of one layer and one device's part."""
    mesh = small_mesh(fsdp=2, tensor=2)
    state = random_state(mesh)
    save(opened(), 3, state)
    opened().close()
    weights = Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
    weights.save(3, state.params, PROBE)
    weights.wait()
    expected = flatten_dict(state.params, sep="/")
    for step in (epath.Path(tmp_path / "checkpoints" / "3"), weights.path(3)):
        assert load_probe(step) == PROBE
        arrays = open_params(step)
        assert arrays.keys() == expected.keys()
        for path, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), expected[path])
            assert array.spec().to_json()["metadata"]["compressor"] is None
        assert arrays["layers/gate/kernel"].chunk_layout.read_chunk.shape == (1, 16, 32)
        assert arrays["embed/embedding"].chunk_layout.read_chunk.shape == (16, 16)
    weights.close()


def test_large_layers_are_saved_in_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2048)
    weights = Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
    weights.save(0, random_state().params, PROBE)
    weights.wait()
    chunk = open_params(weights.path(0))["layers/gate/kernel"].chunk_layout.read_chunk
    assert np.prod(chunk.shape) == 512
    assert chunk.shape[0] == 1
    weights.close()


def test_keep_only_deletes_the_other_steps(tmp_path):
    weights = Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
    for step in (0, 4, 8):
        weights.save(step, random_state(seed=step).params, PROBE)
    weights.save(4, random_state(seed=9).params, PROBE)  # exists already
    with pytest.raises(RunError, match=r"step 6\b.*0, 4, 8"):
        weights.save(6, random_state().params, PROBE)
    assert weights.keep_only({4, 12}) == [0, 8]
    assert weights.steps() == [4]
    weights.save(6, random_state(seed=6).params, PROBE)
    weights.close()
    again = Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
    assert again.steps() == [4, 6]
    for step in (4, 6):
        expected = flatten_dict(random_state(seed=step).params, sep="/")
        for path, array in open_params(again.path(step)).items():
            np.testing.assert_array_equal(np.asarray(array), expected[path])
    again.close()


# Failures


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, opened, value):
    checkpoints, weights = opened(keep=1), Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
    save(checkpoints, 1, random_state())
    state = random_state()
    kernel = state.params["layers"]["q"]["kernel"]
    state.params["layers"]["q"]["kernel"] = kernel.at[1, 2, 3].set(value)
    for act in (
        lambda: save(checkpoints, 2, state),
        lambda: weights.save(2, state.params, PROBE),
    ):
        with pytest.raises(NotFinite, match="layers/q/kernel"):
            act()
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert weights.steps() == []
    assert {path.name for path in (tmp_path / "host_states").iterdir()} == {"1"}
    weights.close()


def test_a_full_disk_is_an_error_and_older_steps_stay(tmp_path, opened):
    """The error comes with the save that fails, or when that one is awaited."""
    checkpoints, states = opened(), [random_state(seed=seed) for seed in range(3)]
    save(checkpoints, 1, states[1])
    checkpoints.wait()

    def save_and_wait():
        save(checkpoints, 2, states[2])
        checkpoints.wait()

    with no_file_larger_than(2000), pytest.raises(RunError, match=r"\(have: 1\)") as caught:
        save_and_wait()
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert len(str(caught.value)) < 400
    again = opened()
    assert again.steps() == [1]
    assert_same(again.restore(1, abstract())[0], states[1])
    save(again, 2, states[2])
    again.wait()
    assert again.steps() == [1, 2]


@pytest.mark.parametrize("kind", ["checkpoints", "weights"])
def test_a_failed_background_save_stops_the_next_call(tmp_path, opened, monkeypatch, kind):
    state = random_state()
    if kind == "weights":
        steps: Any = Weights(epath.Path(tmp_path / "weights"), deadline=60.0)
        acts = [lambda: steps.save(2, state.params, PROBE), lambda: steps.keep_only(set())]
    else:
        steps = opened()
        acts = [lambda: save(steps, 2, state)]

    def fail(manager):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", fail)
    for act in (*acts, steps.check, steps.wait):
        with pytest.raises(RunError, match="the disk is gone"):
            act()
    monkeypatch.undo()
    assert steps.steps() == []
    if kind == "weights":
        steps.close()


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "a bit of the parameters": lambda root: flip(largest(root / "checkpoints/3/params")),
    "a bit of the optimizer": lambda root: flip(largest(root / "checkpoints/3/optimizer")),
    "a bit of a host's state": lambda root: flip(root / "host_states/3/host0of1"),
    "cut parameters": lambda root: os.truncate(largest(root / "checkpoints/3/params"), 5000),
    "no parameters": lambda root: shutil.rmtree(root / "checkpoints/3/params"),
    "a bit of the loop": lambda root: flip(root / "checkpoints/3/loop/metadata"),
    "an empty loop": lambda root: os.truncate(root / "checkpoints/3/loop/metadata", 0),
    "no checksums": lambda root: shutil.rmtree(root / "checkpoints/3/checksums"),
    "an empty host's state": lambda root: os.truncate(root / "host_states/3/host0of1", 0),
    "no host's state": lambda root: shutil.rmtree(root / "host_states/3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_newest_whole_step_is_named(opened, tmp_path, damage):
    """Step 2 is damaged too."""
    checkpoints, states = opened(), [random_state(seed=seed) for seed in range(4)]
    for step in (1, 2, 3):
        save(checkpoints, step, states[step])
    checkpoints.wait()
    DAMAGE[damage](tmp_path)
    flip(largest(tmp_path / "checkpoints/2/params"))
    again = opened()
    with pytest.raises(UserError, match=r"step 3 below .* damaged .*--restore_step=1\b"):
        again.restore(3, abstract())
    found, _, _ = again.restore(1, abstract())
    assert_same(found, states[1])
    assert again.delete_after(1) == [2, 3]
    save(again, 2, states[3])
    again.wait()
    assert_same(again.restore(2, abstract())[0], states[3])


def test_damaged_parameters_are_not_evaluated(opened, tmp_path):
    save(opened(), 3, random_state())
    opened()
    flip(largest(tmp_path / "checkpoints/3/params"))
    with pytest.raises(UserError, match=r"step 3 below .* damaged"):
        opened().restore_params(3, abstract().params)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip(largest(step / "params")),
        lambda step: flip(step / "probe/metadata"),
        lambda step: shutil.rmtree(step / "checksums"),
    ],
)
def test_a_damaged_step_is_not_published(opened, tmp_path, damage):
    save(opened(), 3, random_state())
    opened()
    step = epath.Path(tmp_path / "checkpoints/3")
    check_params(step, open_params(step))
    damage(tmp_path / "checkpoints/3")
    with pytest.raises(UserError, match=f"{step} is damaged"):
        check_params(step, open_params(step))


def test_a_step_that_was_deleted_meanwhile_is_not_called_damaged(opened, tmp_path):
    checkpoints = opened()
    for step in (1, 2):
        save(checkpoints, step, random_state())
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints/1")
    with pytest.raises(UserError, match=r"step 1 below .* deleted .*have: 2\b"):
        checkpoints.restore_params(1, abstract().params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_bit_counts_in_a_checksum(dtype):
    rng = np.random.default_rng(0)
    width = jnp.dtype(dtype).itemsize
    content = rng.integers(0, 256, (3, 5, width), np.uint8)
    of = lambda content: checksums({"x": jnp.asarray(content.view(jnp.dtype(dtype))[..., 0])})
    whole = of(content)
    assert whole == of(content.copy())
    for place in np.ndindex(content.shape):
        for bit in range(8):
            changed = content.copy()
            changed[place] ^= 1 << bit
            assert of(changed) != whole
    swapped = content[::-1].copy()
    assert of(swapped) != whole


def test_an_existing_step_is_kept_and_an_older_one_is_an_error(opened):
    checkpoints, states = opened(), [random_state(seed=seed) for seed in range(3)]
    save(checkpoints, 2, states[1])
    save(checkpoints, 2, states[2])
    with pytest.raises(RunError, match=r"step 1\b"):
        save(checkpoints, 1, states[2])
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    assert_same(checkpoints.restore(2, abstract())[0], states[1])
