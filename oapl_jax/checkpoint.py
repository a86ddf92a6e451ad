"""Checkpoints to resume from: everything that moves, in one Orbax step.

A step holds four items. `params` alone serves evaluation. The order of a restore: params and
optimizer into their shardings (the mesh may differ from the one that saved), then the buffer from
`loop` and `groups`, then the worker's place in the prompts from `loop`. The lag phase and all
random numbers follow from the step.
"""

import copy
import json
from typing import Any

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
        """Starts to save, unless the step stands already; returns when everything is copied.

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
            started = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_without_params(state)),
                    # A copy: it is written later, from a thread, and the caller's goes on changing.
                    loop=ocp.args.JsonSave(copy.deepcopy(loop)),
                    groups=ocp.args.StandardSave(groups),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error
        if not started and step not in self.steps():
            raise self._failed(ValueError(f"step {step} is older than the newest"))

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
            f"a checkpoint could not be saved below {self._directory} ({type(error).__name__}: "
            f"{error}); free space or mend the directory, then start again: it resumes from the "
            f"newest whole step (have: {kept})"
        )

    def restore(
        self, step: int, abstract: TrainState
    ) -> tuple[TrainState, dict, dict[str, np.ndarray]]:
        """Reads a step into the shapes and shardings of `abstract`.

        Raises:
          UserError: if the step's arrays do not have these shapes.
        """
        items = self._read(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(_without_params(abstract)),
            loop=ocp.args.JsonRestore(),
            groups=ocp.args.StandardRestore(),
        )
        state = TrainState(params=items.params, **items.optimizer)
        return state, items.loop, {k: np.asarray(v) for k, v in items.groups.items()}

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Only the parameters of a step; raises as `restore` does."""
        return self._read(step, params=ocp.args.StandardRestore(abstract)).params

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
