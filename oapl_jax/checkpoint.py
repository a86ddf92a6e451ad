"""Orbax steps: checkpoints to resume from, with everything that moves, and weights to publish.

A checkpoint holds five items, a step of weights two of them: `params` and `probe`, which the
publisher reads. `params` alone serves evaluation. The order of a restore: params and
optimizer into their shardings (the mesh may differ from the one that saved), then the buffer from
`loop` and `groups`, then the worker's place in the prompts from `loop`. The lag phase and all
random numbers follow from the step.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.learner import TrainState

CHUNK_BYTES = 64 << 20  # of parameters: what the publisher must hold beside a tensor


class Checkpoints:
    """Steps below one directory; saving goes on in the background.

    Args:
      directory: of all steps.
      keep: number of newest steps to keep.
    """

    def __init__(self, directory: epath.Path, *, keep: int):
        self._manager = _open(directory, keep, optimizer=_ARRAYS, loop=_JSON, groups=_ARRAYS)
        self._directory = directory

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        loop: dict[str, Any],
        groups: dict[str, np.ndarray],
        *,
        probe: dict[str, Any],
    ) -> None:
        """Starts to save, unless the step stands already; returns when everything is copied.

        Args:
          step: the learner's.
          state: parameters, optimizer state and counts.
          loop: JSON-able rest: worker, buffer, published versions, results so far.
          groups: the buffer's arrays.
          probe: rows of tokens and what these parameters say of them (see publisher.read_probe).

        Raises:
          RunError: if this or the previous save failed; the run must not go on without checkpoints.
        """
        _save(
            self._manager,
            step,
            params=_params(state.params),
            probe=ocp.args.JsonSave(probe),
            optimizer=ocp.args.StandardSave(_without_params(state)),
            # A copy: it is written later, from a thread, and the caller's goes on changing.
            loop=ocp.args.JsonSave(copy.deepcopy(loop)),
            groups=ocp.args.StandardSave(groups),
        )

    def check(self) -> None:
        """Raises a RunError if a save in the background has failed."""
        with _saving(self._manager):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all saves are on disk; raises a RunError if one failed."""
        _wait(self._manager)

    def restore(
        self, step: int, abstract: TrainState
    ) -> tuple[TrainState, dict, dict[str, np.ndarray]]:
        """Reads a step into the shapes and shardings of `abstract`.

        Raises:
          UserError: if the step's arrays do not have these shapes.
        """
        items = self._read(
            step,
            params=_params_like(abstract.params),
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),
            loop=ocp.args.JsonRestore(),
            groups=ocp.args.StandardRestore(),
        )
        state = TrainState(params=items.params, **items.optimizer)
        return state, items.loop, {k: np.asarray(v) for k, v in items.groups.items()}

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Only the parameters of a step; raises as `restore` does."""
        return self._read(step, params=_params_like(abstract)).params

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
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
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


# Sections that shape what is saved or what it means; a workdir belongs to one choice of them.
# (After a change of lag.steps, the version that is due may never have been published.)
STRUCTURAL = (
    "seed",
    "group_size",
    "groups_per_step",
    "model",
    "data",
    "warmup",
    "buffer.mode",
    "lag",
    "rollout.source",
    "rollout.shards",
    "rollout.recorded_share",
    "rollout.recorded_order",
    "rollout.recorded_version",
    "rollout.record",
    "evaluation.n",
    "evaluation.ks",
)


def check_config(path: epath.Path, config: dict[str, Any]) -> list[str]:
    """Compares a configuration with the one saved in a workdir, saving it if there is none.

    Returns:
      A line for each setting that differs but may (a longer run, another mesh, another learning
      rate).

    Raises:
      UserError: listing the settings that differ and may not.
    """
    new = flat(config)
    old = flat(json.loads(path.read_text())) if path.exists() else new
    value = lambda config, key: config.get(key, "absent")
    differing = sorted(key for key in old.keys() | new.keys() if value(old, key) != value(new, key))
    structural = lambda key: any(key == s or key.startswith(s + ".") for s in STRUCTURAL)
    refused = [key for key in differing if structural(key) or key not in old or key not in new]
    describe = lambda key: f"{key}: {value(old, key)} -> {value(new, key)}"
    if refused:
        raise UserError(
            f"{path} was saved by a run with other settings ({'; '.join(map(describe, refused))}); "
            "set them back, or give another --workdir"
        )
    aside = path.parent / f"{path.name}.new"  # a kill must not leave half a config
    aside.write_text(json.dumps(config, indent=1, sort_keys=True))
    aside.replace(path)
    return [describe(key) for key in differing]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out
