"""Publishes a checkpoint step of a finished or running training run as a version.

python -m oapl_jax.publish --from=WORKDIR --step=N --to=DIR [--dtype=bfloat16]
"""

import os
import sys
import tempfile
from typing import Any

from absl import flags
from etils import epath

from oapl_jax.config import load_config
from oapl_jax.errors import UserError, exit_with_code, one_line
from oapl_jax.files import flag_directory
from oapl_jax.model import hf
from oapl_jax.model.tokenizer import check_tokenizer, load_tokenizer
from oapl_jax.weights import checkpoint, publisher

STEPS = ("weights", "checkpoints")  # directories of a workdir with Orbax steps


def publish_step(
    workdir: epath.Path, step: int, directory: epath.Path, *, dtype: str | None
) -> epath.Path:
    """Publishes an Orbax step of a run below the `directory` of versions; returns the version's.

    Model and tokenizer are the run's own, and so is the dtype unless another is given. Raises a
    UserError if there is no such run or step, or the version exists already.
    """
    saved = load_config(workdir)
    if saved is None:
        raise UserError(f"--from={workdir} has no config.json; name the workdir of a run")
    steps = {name: publisher.finished_steps(workdir / name) for name in STEPS}
    found = [name for name, have in steps.items() if step in have]
    if not found:
        have = "; ".join(f"{name}: {', '.join(map(str, s)) or 'none'}" for name, s in steps.items())
        raise UserError(f"--step={step} is not in {workdir} (have {have}); choose one of those")
    if step in publisher.published_versions(directory):
        path = publisher.version_path(directory, step)
        raise UserError(f"{path} exists already; delete it, or give another directory --to")
    model = epath.Path(saved["model"]["path"]) if saved["model"]["path"] else workdir / "model"
    config = hf.load_config(model)
    with tempfile.TemporaryDirectory() as local:  # transformers reads local directories only
        for path in model.iterdir():
            if not path.name.endswith(".safetensors"):
                path.copy(epath.Path(local) / path.name)
        tokenizer = load_tokenizer(local)
    check_tokenizer(tokenizer, config, source=os.fspath(model))
    source = workdir / found[0] / str(step)
    if found[0] == "checkpoints":
        checkpoint.check_params(source, publisher.open_params(source))
    return publisher.publish(
        source,
        config,
        version=step,
        directory=directory,
        tokenizer=tokenizer,
        dtype=dtype or saved["publish_dtype"],
        config_hash=publisher.config_hash(saved),
    )


def main() -> None:
    values = flags.FlagValues()  # separate: other modules define flags of the same names
    source: Any = flags.DEFINE_string("from", None, "workdir of the run", flag_values=values)
    step: Any = flags.DEFINE_integer("step", None, "Orbax step to publish", flag_values=values)
    to: Any = flags.DEFINE_string("to", None, "directory of versions", flag_values=values)
    choices = list(hf.EXPORT_DTYPES)
    dtype = flags.DEFINE_enum("dtype", None, choices, "default: publish_dtype", flag_values=values)
    try:
        words = values(sys.argv)[1:]
    except flags.Error as error:
        raise UserError(f"{one_line(error)} (--from, --step, --to, --dtype)") from error
    if words:
        raise UserError(f"{words[0]!r} is no flag; flags begin with dashes")
    missing = [f"--{flag.name}" for flag in (source, step, to) if flag.value is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; name the run, its step and a directory")
    workdir, directory = (flag_directory(flag.name, flag.value) for flag in (source, to))
    print(publish_step(workdir, step.value, directory, dtype=dtype.value))


if __name__ == "__main__":
    exit_with_code(main)
