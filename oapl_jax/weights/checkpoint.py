"""Orbax steps: checkpoints to resume from, with everything that moves, and weights to publish.

A checkpoint holds four items, a step of weights two of them: `params` and `probe`, which the
publisher reads. `params` alone serves evaluation. A fifth, `teacher`, is there if the curriculum
has arrays. What each host has of its own (buffer, place in the prompts) is in a file beside, its
share, which is on disk before the step is whole. The order of a restore: params and optimizer into
their shardings (the mesh may differ from the one that saved), then the shares, then the curriculum
from its host's share and `teacher`. The lag phase and all random numbers follow from the step.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import write_atomically, write_file
from oapl_jax.learner.train_step import TrainState

FORMAT = 2  # of a workdir: its config.json, checkpoints and ledger
CHUNK_BYTES = 64 << 20  # of parameters: what the publisher must hold beside a tensor


def save_config(workdir: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration that a workdir belongs to, as config.json."""
    text = json.dumps({"format": FORMAT, **config}, indent=1, sort_keys=True)
    write_atomically(workdir / "config.json", [text.encode()])


def load_config(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads the configuration that a workdir belongs to; None if it has no config.json.

    Raises:
      UserError: if the workdir has another format: its checkpoints can't be resumed.
    """
    if not (workdir / "config.json").exists():
        return None
    config = json.loads((workdir / "config.json").read_text())
    if config.pop("format", None) != FORMAT:
        raise UserError(
            f"{workdir} was written by another version of oapl_jax (workdir format {FORMAT} is "
            "needed); go on with that version, or give another --workdir"
        )
    return config


class Checkpoints:
    """Steps below one directory; saving goes on in the background.

    Args:
      directory: of all steps.
      keep: number of newest steps to keep.
    """

    def __init__(self, directory: epath.Path, *, keep: int):
        items = dict(optimizer=_ARRAYS, loop=_JSON, teacher=_ARRAYS)
        self._manager = _open(directory, keep, **items)
        self._directory, self._shares = directory, directory.parent / "shares"

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict[str, Any],
        share: bytes,
        *,
        probe: dict[str, Any],
        teacher: Any | None = None,
    ) -> None:
        """Starts to save, unless the step stands already; returns when everything is copied.

        Args:
          step: the learner's.
          state: parameters, optimizer state and counts.
          loop: JSON-able rest, the same on all hosts: published versions, results so far.
          share: what this host alone has: worker, buffer.
          probe: rows of tokens and what these parameters say of them (see publisher.read_probe).
          teacher: the curriculum's arrays, if it has any.

        Raises:
          RunError: if this or the previous save failed; the run must not go on without checkpoints.
        """
        with _saving(self._manager):
            self._write_share(step, share)
        _save(
            self._manager,
            step,
            params=_params(state.params),
            probe=ocp.args.JsonSave(probe),
            optimizer=ocp.args.StandardSave(_without_params(state)),
            # A copy: it is written later, from a thread, and the caller's goes on changing.
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),
            **({} if teacher is None else {"teacher": ocp.args.StandardSave(teacher)}),
        )

    def check(self) -> None:
        """Raises a RunError if a save in the background has failed."""
        with _saving(self._manager):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all saves are on disk; raises a RunError if one failed."""
        _wait(self._manager)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, list[bytes]]:
        """Reads a step into the shapes and shardings of `abstract`.

        Returns:
          The state, `loop`, and the share of each host that saved.

        Raises:
          UserError: if the step's arrays do not have these shapes, or a share is missing.
        """
        items = self._read(
            step,
            params=_params_like(abstract.params),
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),
            loop=ocp.args.JsonRestore(),
        )
        state = TrainState(params=items.params, **items.optimizer)
        return state, items.loop, self._read_shares(step)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Only the parameters of a step; raises as `restore` does."""
        return self._read(step, params=_params_like(abstract)).params

    def restore_teacher(self, step: int, abstract: Any) -> Any:
        """The curriculum's arrays in the shapes and shardings of `abstract`; raises as `restore`
        does."""
        return self._read(step, teacher=ocp.args.StandardRestore(abstract)).teacher

    def _write_share(self, step: int, share: bytes) -> None:
        directory, count = self._shares / str(step), f"of{jax.process_count()}"
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / f"host{jax.process_index()}{count}", [share])
        if not jax.process_index():
            kept = {str(step), *map(str, self.steps())}
            for other in self._shares.iterdir():
                if other.name not in kept:
                    other.rmtree()
            for other in directory.iterdir():  # of a run that was killed before its step was whole
                if not other.name.endswith(count):
                    other.unlink()

    def _read_shares(self, step: int) -> list[bytes]:
        directory = self._shares / str(step)
        counts = {int(path.name.rpartition("of")[2]) for path in directory.glob("host*of*")}
        paths = [directory / f"host{i}of{n}" for n in counts for i in range(n)]
        if len(counts) != 1 or not all(path.exists() for path in paths):
            raise UserError(
                f"{directory} does not hold one share of checkpoint step {step} for each host; put "
                "the run's own files back, or give another --workdir"
            )
        return [path.read_bytes() for path in paths]

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint step {step} below {self._directory} does not fit this configuration "
                f"({str(error).splitlines()[0]}); use the one that saved it, or another --workdir"
            ) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()


class Weights:
    """Steps of parameters and probe alone, to be published; every host takes part in each call.

    Args:
      directory: of all steps.
    """

    def __init__(self, directory: epath.Path):
        self._manager = _open(directory, None)
        self._directory = directory

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        """What the publisher reads, once `wait` has returned."""
        return self._directory / str(step)

    def save(self, step: int, params: Any, probe: dict[str, Any]) -> None:
        """Starts to save, unless the step stands already; returns when everything is copied.

        Raises:
          RunError: if this or the previous save failed.
        """
        _save(self._manager, step, params=_params(params), probe=ocp.args.JsonSave(probe))

    def wait(self) -> None:
        """Returns when all saves are on disk; raises a RunError if one failed."""
        _wait(self._manager)

    def keep_only(self, steps: set[int]) -> list[int]:
        """Deletes the other steps and returns them: as a rule, those without a version."""
        self.wait()
        gone = [step for step in self.steps() if step not in steps]
        for step in gone:
            self._manager.delete(step)
        return gone

    def close(self) -> None:
        self.wait()
        self._manager.close()


_ARRAYS, _JSON = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler


def _open(directory: epath.Path, keep: int | None, **items: Any) -> ocp.CheckpointManager:
    # Compression would take a tenth off random-looking floats and make the publisher wait for it.
    params = ocp.PyTreeCheckpointHandler(use_compression=False)
    handlers = {"params": params, "probe": _JSON(), **{name: new() for name, new in items.items()}}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        # Hosts meet under a name: two managers that save one step must not meet under the same.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=directory.name
        ),
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _params(params: Any) -> ocp.args.PyTreeSave:
    """Parameters in chunks that the publisher can read one at a time, none across layers."""

    def chunks(path: Any, _: Any) -> ocp.SaveArgs:
        stacked = path[0].key == "layers"
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    return ocp.args.PyTreeSave(params, jax.tree_util.tree_map_with_path(chunks, params))


def _params_like(abstract: Any) -> ocp.args.PyTreeRestore:
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, arguments)


def _save(manager: ocp.CheckpointManager, step: int, **items: Any) -> None:
    with _saving(manager):
        manager.check_for_errors()
        started = manager.save(step, args=ocp.args.Composite(**items))
        if not started and step not in manager.all_steps():
            raise ValueError(f"step {step} is older than the newest")


def _wait(manager: ocp.CheckpointManager) -> None:
    with _saving(manager):
        manager.wait_until_finished()
        manager.check_for_errors()


@contextlib.contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns whatever a save raises into a RunError that says what is left."""
    try:
        yield
    except Exception as error:
        kept = ", ".join(map(str, sorted(manager.all_steps()))) or "none"
        raise RunError(
            f"a checkpoint could not be saved below {manager.directory} ({type(error).__name__}: "
            f"{error}); free space or mend the directory, then start again: it resumes from the "
            f"newest whole step (have: {kept})"
        ) from error


def _without_params(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    return {**rest, "skipped_in_a_row": state.skipped_in_a_row}
