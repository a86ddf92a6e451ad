"""Orbax steps of a workdir: checkpoints to resume from, and weights to publish.

Items of a checkpoint: `params`, `probe`, `optimizer`, `loop`, `checksums` of all the others, and
`curriculum` if that has arrays. Weights have `params` and `probe` alone, which the publisher reads.
State that belongs to one host (buffer, position in the prompts) is a file beside, which begins with
its digest and is on disk before the step is finished.
Restore order: params and optimizer into their shardings (the mesh may differ from the one that
saved), then the hosts' states, then the curriculum from its host's state and arrays.
"""

import contextlib
import copy
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from etils import epath

from oapl_jax import multihost
from oapl_jax.errors import NotFinite, RunError, UserError, one_line, reason
from oapl_jax.files import is_deleted, write_file
from oapl_jax.learner.train_step import TrainState

CHUNK_BYTES = 64 << 20  # of parameters: what the publisher must hold beside a tensor
LISTINGS = 10  # of a directory, at most, while steps of it are deleted
DIGEST_BYTES = 16  # of the XXH3 before a host's state
X = TypeVar("X")
_ARRAYS, _JSON = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler


class _Damaged(Exception):
    """Files of a step are missing, unreadable, or differ from what was saved."""


@contextlib.contextmanager
def exit_after(deadline: float, what: str) -> Iterator[None]:
    """Ends the process with code 1 once a block has taken `deadline` seconds.

    A call of Orbax or TensorStore can't be ended alone. After a clock was set back, it may wait
    until the clock has its old time again.
    """
    late = RunError(
        f"{what} has not ended within {deadline:g} s (rollout.deadline); the same command goes on "
        "from the newest finished step"
    )
    timer = threading.Timer(deadline, multihost.exit_now, [late])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _open_manager(directory: epath.Path, **how: Any) -> ocp.CheckpointManager:
    """Opens a directory whose steps a run may be deleting: then Orbax lists them again."""
    for _ in range(LISTINGS - 1):
        with contextlib.suppress(FileNotFoundError):
            return ocp.CheckpointManager(directory, **how)
    return ocp.CheckpointManager(directory, **how)


class _Steps:
    """Orbax steps below one directory, saved in the background; `keep` bounds their number."""

    def __init__(
        self, directory: epath.Path, *, deadline: float, keep: int | None = None, **items: Any
    ):
        # Compression would take a tenth off random-looking floats and slow the publisher.
        params = ocp.PyTreeCheckpointHandler(use_compression=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Two managers may save the same step; their barriers need different names.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=directory.name
            ),
        )
        handlers = {"params": params, "probe": _JSON(), **items}
        self._manager = _open_manager(directory, options=options, item_handlers=handlers)
        self._directory, self._deadline = directory, deadline

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raises a RunError if a save in the background has failed."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all saves are on disk; raises a RunError if one failed."""
        with self._saving():
            self._manager.wait_until_finished()
        self.check()

    def close(self) -> None:
        self.wait()
        with self._saving():
            self._manager.close()

    def _save(self, step: int, params: Any, probe: Mapping[str, Any], **items: Any) -> None:
        def chunks(path: Any, _: Any) -> ocp.SaveArgs:
            # The publisher reads one chunk at a time; no chunk spans layers.
            stacked = path[0].key == "layers"
            return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

        items = {
            "params": ocp.args.PyTreeSave(params, jax.tree_util.tree_map_with_path(chunks, params)),
            "probe": ocp.args.JsonSave(dict(probe)),
            **items,
        }
        with self._saving():
            self._manager.check_for_errors()
            started = self._manager.save(step, args=ocp.args.Composite(**items))
            if not started and step not in self.steps():
                raise ValueError(f"step {step} is older than the newest")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Raises a RunError with the remedy for any error of a save."""
        try:
            with exit_after(self._deadline, f"a save below {self._directory}"):
                yield
        except Exception as error:
            kept = ", ".join(map(str, self.steps())) or "none"
            raise RunError(
                f"a checkpoint could not be saved below {self._directory} ({reason(error)}); free "
                "space or mend the directory, then start again: it resumes from the newest "
                f"finished step (have: {kept})"
            ) from error


class Checkpoints(_Steps):
    """Checkpoints of a run below one directory, of which the newest `keep` stay."""

    def __init__(self, directory: epath.Path, *, deadline: float, keep: int):
        json_items, array_items = ("loop", "checksums"), ("optimizer", "curriculum")
        items = {n: _JSON() for n in json_items} | {n: _ARRAYS() for n in array_items}
        super().__init__(directory, deadline=deadline, keep=keep, **items)
        self._host_states = directory.parent / "host_states"

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict[str, Any],
        host_state: bytes,
        *,
        probe: dict[str, Any],
        curriculum: Any | None = None,
    ) -> None:
        """Starts to save a step, unless it exists already; returns when everything is copied.

        `loop` has JSON-able values, the same on all hosts; `host_state` is of this host alone; the
        probe is that of publisher.read_probe. Raises a RunError if this or the previous save
        failed: the run must not go on without checkpoints; NotFinite for such parameters.
        """
        check_finite(state.params, f"step {step}")
        with self._saving():
            self._write_host_state(step, host_state)
        arrays = {"optimizer": _without_params(state)}
        if curriculum is not None:
            arrays["curriculum"] = curriculum
        sums = {
            **{name: digest(document) for name, document in {"loop": loop, "probe": probe}.items()},
            **checksums({"params": state.params, **arrays}),
        }
        self._save(
            step,
            state.params,
            probe,
            **{name: ocp.args.StandardSave(tree) for name, tree in arrays.items()},
            checksums=ocp.args.JsonSave(sums),
            # A copy, since a thread writes it while the caller mutates its own.
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, list[bytes]]:
        """Reads state, `loop` and the saving hosts' states; `abstract` has shapes and shardings.

        Raises:
          UserError: for a step that is damaged, naming the newest older one that is whole; for one
            that has other arrays; for one that does not exist.
        """

        def read(step: int) -> tuple[TrainState, dict, list[bytes]]:
            hosts = self._read_host_states(step)
            arrays = {"params": abstract.params, "optimizer": _without_params(abstract)}
            items = self._read(step, arrays, loop=ocp.args.JsonRestore())
            return TrainState(params=items["params"], **items["optimizer"]), items["loop"], hosts

        return self._or_older(step, read)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Reads only the parameters of a step; raises as `restore` does."""
        return self._or_older(step, lambda step: self._read(step, {"params": abstract})["params"])

    def restore_curriculum(self, step: int, abstract: Any) -> Any:
        """Reads only the curriculum's arrays of a step; raises as `restore` does."""
        arrays = {"curriculum": abstract}
        return self._or_older(step, lambda step: self._read(step, arrays)["curriculum"])

    def delete_after(self, step: int) -> list[int]:
        """Deletes all later steps and returns them; all hosts must call it."""
        later = [other for other in self.steps() if other > step]
        for other in later:
            self._manager.delete(other)
        return later

    def _or_older(self, step: int, read: Callable[[int], X]) -> X:
        """`read(step)`; the error for a damaged step names the newest older one that is whole."""
        try:
            return read(step)
        except _Damaged as error:
            damage = error
        where = f"checkpoint step {step} below {self._directory}"
        if is_deleted(self._directory / str(step)):
            have = ", ".join(map(str, self._manager.all_steps(read=True))) or "none"
            raise UserError(f"{where} does not exist, or was deleted meanwhile (have: {have})")
        for older in reversed([other for other in self.steps() if other < step]):
            with contextlib.suppress(_Damaged):
                read(older)
                remedy = f"oapl_jax.train --restore_step={older} resumes from the newest whole one"
                raise UserError(f"{where} is damaged ({damage}); {remedy}")
        raise UserError(
            f"{where} is damaged ({damage}) and no older one is whole; put the run's own files "
            "back, or give another --workdir"
        )

    def _read(self, step: int, abstract: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Reads the arrays that `abstract` describes, and more items.

        Floats of another width than wanted (Adam's moments) are converted.

        Raises:
          UserError: if the step's arrays have other names, shapes or kinds of numbers.
          _Damaged: if files are missing, unreadable, or differ from what was saved.
        """
        try:
            saved = self._items(step, checksums=ocp.args.JsonRestore())["checksums"]
            self._check_fit(step, saved, abstract)
            stored = _with_dtypes(abstract, saved)
            args = {name: _restore(name, tree) for name, tree in stored.items()} | more
            items = self._items(step, **args)
        except UserError:
            raise
        except Exception as error:  # of Orbax, TensorStore or JSON, whatever a damaged file causes
            raise _Damaged(one_line(error).partition(". See full ")[0]) from error  # of TensorStore
        found = checksums({name: items[name] for name in abstract})
        found |= {name: digest(items[name]) for name in more}
        for path, value in found.items():
            if value != saved.get(path):
                raise _Damaged(f"{path} differs from what was saved")
        arrays = {name: items[name] for name in abstract}
        return items | jax.tree.map(
            lambda x, wanted: x.astype(wanted.dtype), arrays, dict(abstract)
        )

    def _items(self, step: int, **args: Any) -> dict[str, Any]:
        with exit_after(self._deadline, f"the read of step {step} below {self._directory}"):
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: items[name] for name in args}

    def _check_fit(self, step: int, saved: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
        here = _shapes(abstract)
        there = {path: entry[:2] for path, entry in saved.items() if _item(path) in abstract}
        text = lambda entry: f"{entry[1]}{entry[0]}" if entry else "absent"
        for path in here.keys() | there.keys():
            if _kind(here.get(path)) != _kind(there.get(path)):
                raise UserError(
                    f"checkpoint step {step} below {self._directory} does not fit this "
                    f"configuration ({path} is {text(there.get(path))} there and "
                    f"{text(here.get(path))} here); use the one that saved it, or another --workdir"
                )

    def _write_host_state(self, step: int, host_state: bytes) -> None:
        directory, hosts = self._host_states / str(step), f"of{jax.process_count()}"
        directory.mkdir(parents=True, exist_ok=True)
        digest = xxhash.xxh3_128_digest(host_state)
        write_file(directory / f"host{jax.process_index()}{hosts}", [digest, host_state])
        if not jax.process_index():
            kept = {str(step), *map(str, self.steps())}
            for other in self._host_states.iterdir():
                if other.name not in kept:
                    other.rmtree()
            for other in directory.iterdir():  # of a run killed before it finished this step
                if not other.name.endswith(hosts):
                    other.unlink()

    def _read_host_states(self, step: int) -> list[bytes]:
        directory = self._host_states / str(step)
        counts = {int(path.name.rpartition("of")[2]) for path in directory.glob("host*of*")}
        paths = [directory / f"host{i}of{n}" for n in counts for i in range(n)]
        if len(counts) != 1 or not all(path.exists() for path in paths):
            raise _Damaged(f"{directory} lacks a host's state")
        states = [path.read_bytes() for path in paths]
        for path, state in zip(paths, states, strict=True):
            if xxhash.xxh3_128_digest(state[DIGEST_BYTES:]) != state[:DIGEST_BYTES]:
                raise _Damaged(f"{path} differs from what was saved")
        return [state[DIGEST_BYTES:] for state in states]


class Weights(_Steps):
    """Steps of parameters and probe alone, to be published; all hosts take part in each call."""

    def path(self, step: int) -> epath.Path:
        """The directory that the publisher reads, once `wait` has returned."""
        return self._directory / str(step)

    def save(self, step: int, params: Any, probe: dict[str, Any]) -> None:
        """As `Checkpoints.save`."""
        check_finite(params, f"step {step}")
        self._save(step, params, probe)

    def keep_only(self, steps: set[int]) -> list[int]:
        """Deletes the other steps and returns them."""
        self.wait()
        deleted = sorted({*self.steps()} - steps)
        for step in deleted:
            self._manager.delete(step)
        return deleted


def _restore(name: str, abstract: Any) -> Any:
    if name != "params":
        return ocp.args.StandardRestore(abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, arguments)


def checksums(tree: Any) -> dict[str, list[Any]]:
    """{path: [shape, dtype, checksum]} of arrays, the same on every mesh.

    The checksum is the sum over elements of bits x an odd number of the position, modulo 2^32: any
    changed bit of one element changes it. The devices compute it, each on its own part.
    """
    sums = jax.device_get(_sums(jax.tree.leaves(tree)))
    return {
        path: [*entry, int(value)]
        for (path, entry), value in zip(_shapes(tree).items(), sums, strict=True)
    }


def _shapes(tree: Any) -> dict[str, list[Any]]:
    """{path: [shape, dtype]}, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _kind(entry: Sequence[Any] | None) -> list[Any]:
    """Shape and dtype of an entry of `_shapes`, one kind for all floats."""
    if entry is None:
        return []
    shape, dtype = entry
    return [shape, "float" if jnp.issubdtype(dtype, jnp.floating) else dtype]


def _with_dtypes(abstract: Any, saved: Mapping[str, Any]) -> Any:
    """`abstract` with the dtypes of the entries of `checksums`."""
    leaves, tree = jax.tree.flatten(abstract)
    dtypes = [saved[path][1] for path in _shapes(abstract)]
    return tree.unflatten(
        [
            jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ]
    )


def check_finite(params: Any, name: str) -> None:
    """Raises NotFinite, naming the first parameter with an infinite or NaN element."""
    finite = jax.device_get(_finite(jax.tree.leaves(params)))
    for path, is_finite in zip(_shapes(params), finite, strict=True):
        if not is_finite:
            raise NotFinite(
                f"parameter {path} of {name} is not finite, so the weights are neither saved nor "
                "published; the same command resumes from the newest checkpoint"
            )


@jax.jit
def _finite(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def digest(document: Any) -> str:
    """XXH3 (128 bits) of a JSON-able value, the same before and after it was saved."""
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def check_params(step: epath.Path, params: Mapping[str, Any]) -> None:
    """Reads the parameters of a checkpoint step on the host, and compares them and the probe.

    Args:
      step: directory of the step.
      params: path -> array or TensorStore, as of publisher.open_params.

    Raises:
      UserError: for a step without checksums, or one that differs from what was saved.
    """
    try:
        read = ocp.JsonCheckpointHandler().restore
        saved = read(step / "checksums")
        found: dict[str, Any] = {"probe": digest(read(step / "probe"))}
        for path, array in params.items():
            total, size = 0, math.prod(array.shape[1:])
            for row in range(array.shape[0]):
                bits = np.asarray(array[row]).reshape(-1)
                position = np.arange(row * size, (row + 1) * size).astype(np.uint32)
                bits = bits.view(f"uint{8 * bits.itemsize}").astype(np.uint32)
                total += int(np.sum(bits * _odd(position), dtype=np.uint32))
            found[f"params/{path}"] = [list(array.shape), array.dtype.name, total % 2**32]
        damaged = [path for path, value in found.items() if value != saved.get(path)]
    except Exception as error:  # of Orbax, TensorStore or JSON, whatever a damaged file causes
        damaged = [one_line(error)]
    if damaged:
        raise UserError(
            f"checkpoint step {step} is damaged ({damaged[0]} differs from what was saved); name "
            "another step"
        )


def _item(path: str) -> str:
    return path.partition("/")[0]


def _odd(position: Any) -> Any:
    return position * np.uint32(2654435761) | np.uint32(1)


@jax.jit
def _sums(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        width = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
        position = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            position = position * np.uint32(size) + index
        return jnp.sum(bits * _odd(position), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _without_params(state: TrainState) -> dict[str, Any]:
    names = "step", "opt_state", "skipped", "skipped_in_a_row"
    return {name: getattr(state, name) for name in names}
