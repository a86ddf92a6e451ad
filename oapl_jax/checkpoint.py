"""Checkpoints to resume from: everything that moves, in one Orbax step.

A step holds four items. `params` alone serves evaluation. The order of a restore: params and optimizer into
their shardings (the mesh may differ from the one that saved), then the buffer from `loop` and `groups`, then
the worker's place in the prompts from `loop`. The lag phase and all random numbers follow from the step.
"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.learner import TrainState


class Checkpoints:
    """Steps below one directory; saving goes on in the background.

    Args:
      directory: of all steps.
      keep: number of newest steps to keep.
    """

    def __init__(self, directory: epath.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory, options=options)
        self._directory = directory

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, loop: dict[str, Any], groups: dict[str, np.ndarray]
    ) -> None:
        """Starts to save; returns when the arrays are copied.

        Args:
          step: the learner's.
          state: parameters, optimizer state and counts.
          loop: JSON-able rest: worker, buffer, published versions, results so far.
          groups: the buffer's arrays.

        Raises:
          RunError: if this or the previous save failed; the run must not go on without checkpoints.
        """
        self.check()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_without_params(state)),
                    loop=ocp.args.JsonSave(loop),
                    groups=ocp.args.StandardSave(groups),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises a RunError if a save in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when all saves are on disk; raises a RunError if one failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return RunError(
            f"a checkpoint could not be saved below {self._directory} ({type(error).__name__}: {error}); free "
            f"space or mend the directory, then start again: it resumes from the newest whole step (have: {kept})"
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, dict[str, np.ndarray]]:
        """Reads a step into the shapes and shardings of `abstract`.

        Raises:
          UserError: if the step's arrays do not have these shapes.
        """
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    optimizer=ocp.args.StandardRestore(_without_params(abstract)),
                    loop=ocp.args.JsonRestore(),
                    groups=ocp.args.StandardRestore(),
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint step {step} below {self._directory} does not fit this configuration "
                f"({str(error).splitlines()[0]}); use the configuration that saved it, or another --workdir"
            ) from error
        state = TrainState(params=items.params, **items.optimizer)
        return state, items.loop, {k: np.asarray(v) for k, v in items.groups.items()}

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Only the parameters of a step."""
        return self._manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        ).params

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _without_params(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    return {**rest, "skipped_in_a_row": state.skipped_in_a_row}


def abstract_state(make: Any, shardings: TrainState) -> TrainState:
    """The shapes of what `make()` returns, each with its sharding."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, jax.eval_shape(make), shardings)


# Sections that shape what is saved or what it means; a workdir belongs to one choice of them.
STRUCTURAL = ("seed", "group_size", "groups_per_step", "model", "data", "warmup", "buffer.mode", "lag.mode")


def check_config(path: epath.Path, config: dict[str, Any]) -> list[str]:
    """Compares a configuration with the one saved in a workdir, saving it if there is none.

    Returns:
      A line for each setting that differs but may (a longer run, another mesh, another learning rate).

    Raises:
      UserError: listing the settings that differ and may not.
    """
    new = flat(config)
    if not path.exists():
        path.write_text(json.dumps(config, indent=1, sort_keys=True))
        return []
    old = flat(json.loads(path.read_text()))
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    structural = lambda key: any(key == s or key.startswith(s + ".") for s in STRUCTURAL)
    refused = [key for key in differing if structural(key) or key not in old or key not in new]
    describe = lambda key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
    if refused:
        raise UserError(
            f"{path} was saved by a run with other settings ({'; '.join(map(describe, refused))}); "
            "set them back, or give another --workdir"
        )
    path.write_text(json.dumps(config, indent=1, sort_keys=True))
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
