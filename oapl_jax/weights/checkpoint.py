"""Orbax steps of a workdir: checkpoints to resume from, and weights to publish.

Items of a checkpoint: `params`, `probe`, `optimizer`, `loop`, and `curriculum` if that has arrays.
Weights have `params` and `probe` alone, which the publisher reads. State that belongs to one host
(buffer, position in the prompts) is a file beside, on disk before the step is finished.
Restore order: params and optimizer into their shardings (the mesh may differ from the one that
saved), then the hosts' states, then the curriculum from its host's state and arrays.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import write_file
from oapl_jax.learner.train_step import TrainState

CHUNK_BYTES = 64 << 20  # of parameters: what the publisher must hold beside a tensor
_ARRAYS, _JSON = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler


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
        arrays = dict(optimizer=_ARRAYS(), curriculum=_ARRAYS())
        super().__init__(directory, keep=keep, loop=_JSON(), **arrays)
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
        self._save(
            step,
            state.params,
            probe,
            optimizer=ocp.args.StandardSave(_without_params(state)),
            # A copy, since a thread writes it while the caller mutates its own.
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),
            **({} if curriculum is None else {"curriculum": ocp.args.StandardSave(curriculum)}),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, list[bytes]]:
        """Reads state, `loop` and the saving hosts' states; `abstract` has shapes and shardings.

        Raises a UserError if the step's arrays have other shapes, or a host's state is missing.
        """
        items = self._read(
            step,
            params=_restore_params(abstract.params),
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),
            loop=ocp.args.JsonRestore(),
        )
        state = TrainState(params=items.params, **items.optimizer)
        return state, items.loop, self._read_host_states(step)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Reads only the parameters of a step; raises as `restore` does."""
        return self._read(step, params=_restore_params(abstract)).params

    def restore_curriculum(self, step: int, abstract: Any) -> Any:
        """Reads only the curriculum's arrays of a step; raises as `restore` does."""
        return self._read(step, curriculum=ocp.args.StandardRestore(abstract)).curriculum

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint step {step} below {self._directory} does not fit this configuration "
                f"({str(error).splitlines()[0]}); use the one that saved it, or another --workdir"
            ) from error

    def _write_host_state(self, step: int, host_state: bytes) -> None:
        directory, hosts = self._host_states / str(step), f"of{jax.process_count()}"
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / f"host{jax.process_index()}{hosts}", [host_state])
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
            raise UserError(
                f"{directory} lacks a host's state of checkpoint step {step}; put the run's own "
                "files back, or give another --workdir"
            )
        return [path.read_bytes() for path in paths]


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


def _restore_params(abstract: Any) -> ocp.args.PyTreeRestore:
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, arguments)


def _without_params(state: TrainState) -> dict[str, Any]:
    names = "step", "opt_state", "skipped", "skipped_in_a_row"
    return {name: getattr(state, name) for name in names}
