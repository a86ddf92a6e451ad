"""Finished Orbax steps, opened without restoring them: parameters by TensorStore, and the probe."""

import os
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from oapl_jax.errors import UserError, one_line
from oapl_jax.files import is_local


def steps_of(directory: epath.Path) -> list[int]:
    """The finished steps below a directory, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(directory))


def open_params(source: epath.Path) -> dict[str, ts.TensorStore]:
    """The arrays of a step's item `params` by path; nothing of them is read yet.

    Raises:
      UserError: if there is no such step, or it was not saved to its end.
    """
    have = steps_of(source.parent)
    if not source.name.isdigit() or int(source.name) not in have:
        listed = ", ".join(map(str, have)) or "none"
        raise UserError(f"{source} is no finished Orbax step (have: {listed}); name one that is")
    place = f"{os.fspath(source)}/params/"
    base = {"driver": "file", "path": place} if is_local(source) else place
    context = ts.Context()
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
        names = [
            key.decode().removesuffix("/.zarray")
            for key in store.list().result()
            if key.endswith(b"/.zarray")
        ]
        opening = {
            name.replace(".", "/"): ts.open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                    "fill_missing_data_reads": False,  # a lost chunk must not read as zeros
                },
                context=context,
                read=True,
                open=True,
            )
            for name in names
        }
        return {path: array.result() for path, array in opening.items()}
    except ValueError as error:
        raise UserError(
            f"the parameters of Orbax step {source} can't be read ({one_line(error)}); publish "
            "another step"
        ) from error


def load_probe(source: epath.Path) -> dict[str, Any]:
    """A step's item `probe`; raises a UserError if the step has none."""
    try:
        return dict(ocp.JsonCheckpointHandler().restore(source / "probe"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Orbax step {source} has no readable probe ({one_line(error)}); publish a step that "
            "has one"
        ) from error
