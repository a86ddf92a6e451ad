"""Orbax steps of a workdir: checkpoints to resume from, and weights to publish.

Items of a checkpoint: `params`, `probe`, `optimizer`, `loop`, `checksums` of the arrays, and
`curriculum` if that has arrays. Weights have `params` and `probe` alone, which the publisher reads.
State that belongs to one host
(buffer, position in the prompts) is a file beside, on disk before the step is finished.
Restore order: params and optimizer into their shardings (the mesh may differ from the one that
saved), then the hosts' states, then the curriculum from its host's state and arrays.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from etils import epath

from oapl_jax.errors import RunError, UserError, one_line
from oapl_jax.files import write_file
from oapl_jax.learner.train_step import TrainState

CHUNK_BYTES = 64 << 20  # of parameters: what the publisher must hold beside a tensor
_ARRAYS, _JSON = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler


DIGEST = 16  # bytes before a host's state


class _Damaged(Exception):
    """Files of a step are missing, unreadable, or not what was saved."""


class _Steps:
    """Orbax steps below one directory, saved in the background; `keep` bounds their number."""

    def __init__(self, directory: epath.Path, *, keep: int | None = None, **items: Any):
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
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        self._directory = directory

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
            yield
        except Exception as error:
            kept = ", ".join(map(str, self.steps())) or "none"
            raise RunError(
                f"a checkpoint could not be saved below {self._directory} ({type(error).__name__}: "
                f"{error}); free space or mend the directory, then start again: it resumes from "
                f"the newest finished step (have: {kept})"
            ) from error


class Checkpoints(_Steps):
    """Checkpoints of a run below one directory, of which the newest `keep` stay."""

    def __init__(self, directory: epath.Path, *, keep: int):
        items = dict(optimizer=_ARRAYS(), loop=_JSON(), checksums=_JSON(), curriculum=_ARRAYS())
        super().__init__(directory, keep=keep, **items)
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
        failed: the run must not go on without checkpoints.
        """
        with self._saving():
            self._write_host_state(step, host_state)
        optimizer = _without_params(state)
        checksums = {"params": checksum(state.params), "optimizer": checksum(optimizer)}
        items = {}
        if curriculum is not None:
            checksums["curriculum"] = checksum(curriculum)
            items["curriculum"] = ocp.args.StandardSave(curriculum)
        self._save(
            step,
            state.params,
            probe,
            optimizer=ocp.args.StandardSave(optimizer),
            # A copy, since a thread writes it while the caller mutates its own.
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),
            checksums=ocp.args.JsonSave(checksums),
            **items,
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, list[bytes]]:
        """Reads state, `loop` and the saving hosts' states; `abstract` has shapes and shardings.

        Raises:
          UserError: for a step that is damaged, naming the newest older one that can be read, or
            that has other shapes.
        """
        read = functools.partial(
            self._read,
            params=abstract.params,
            optimizer=_without_params(abstract),
            loop=None,
            hosts=None,
        )
        items = self._or_older(step, read)
        return (
            TrainState(params=items["params"], **items["optimizer"]),
            items["loop"],
            items["hosts"],
        )

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Reads only the parameters of a step; raises as `restore` does."""
        return self._or_older(step, functools.partial(self._read, params=abstract))["params"]

    def restore_curriculum(self, step: int, abstract: Any) -> Any:
        """Reads only the curriculum's arrays of a step; raises as `restore` does."""
        return self._or_older(step, functools.partial(self._read, curriculum=abstract))[
            "curriculum"
        ]

    def delete_after(self, step: int) -> None:
        """Deletes all later steps; all hosts must call it."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _or_older(self, step: int, read: Callable[[int], Any]) -> Any:
        """`read(step)`; the error for a damaged step names the newest older one that is whole."""
        try:
            return read(step)
        except _Damaged as error:
            damage = f"checkpoint step {step} below {self._directory} is damaged ({error})"
        for older in reversed([other for other in self.steps() if other < step]):
            with contextlib.suppress(_Damaged):
                read(older)
                raise UserError(f"{damage}; --restore_step={older} resumes from the one before it")
        raise UserError(f"{damage} and no older step is whole; give another --workdir")

    def _read(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Reads items of a step: arrays as their abstract values say, "loop", and "hosts".

        Raises:
          UserError: if the step's arrays are not those of `abstract`.
          _Damaged: if files are missing, unreadable, or differ from what was saved.
        """
        arrays = {name: tree for name, tree in abstract.items() if tree is not None}
        args = {name: _restore(name, tree) for name, tree in arrays.items()}
        args |= {name: ocp.args.JsonRestore() for name in ("loop", "checksums")}
        try:
            self._check_shapes(step, arrays)
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
            found = {name: items[name] for name in args}
            hosts = self._read_host_states(step) if "hosts" in abstract else []
        except (UserError, _Damaged):
            raise
        except Exception as error:  # of Orbax, TensorStore, JSON: whatever a damaged file causes
            raise _Damaged(one_line(error)) from error
        for name in arrays:
            if checksum(found[name]) != found["checksums"].get(name):
                raise _Damaged(f"{name} differ from what was saved")
        return {**found, "hosts": hosts}

    def _check_shapes(self, step: int, arrays: Mapping[str, Any]) -> None:
        for name, tree in arrays.items():
            saved = self._manager.item_metadata(step)[name]
            shapes = lambda tree: {
                jax.tree_util.keystr(path): tuple(leaf.shape)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            print(shapes(saved), shapes(tree))

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
            if xxhash.xxh3_128_digest(state[DIGEST:]) != state[:DIGEST]:
                raise _Damaged(f"{path} differs from what was saved")
        return [state[DIGEST:] for state in states]


class Weights(_Steps):
    """Steps of parameters and probe alone, to be published; all hosts take part in each call."""

    def path(self, step: int) -> epath.Path:
        """The directory that the publisher reads, once `wait` has returned."""
        return self._directory / str(step)

    def save(self, step: int, params: Any, probe: dict[str, Any]) -> None:
        """As `Checkpoints.save`."""
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


def checksum(tree: Any) -> list[int]:
    """Checksums of arrays, in the order of their leaves, the same on every mesh.

    For each array the sum over elements of bits * (odd number of the position), modulo 2^32: any
    changed bit of an element changes it. The devices compute it, each on its own part.
    """
    return [int(value) for value in jax.device_get(_checksums(jax.tree.leaves(tree)))]


@jax.jit
def _checksums(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    def one(array: jax.Array) -> jax.Array:
        width = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
        position = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            position = position * np.uint32(size) + index
        return jnp.sum(bits * (position * np.uint32(2654435761) | 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _without_params(state: TrainState) -> dict[str, Any]:
    names = "step", "opt_state", "skipped", "skipped_in_a_row"
    return {name: getattr(state, name) for name in names}
