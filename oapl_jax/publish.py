"""Publishes a checkpoint step of a finished or running training run as a version.

python -m oapl_jax.publish --from=WORKDIR --step=N --to=DIR [--dtype=bfloat16]
    [--merged] [--push-to-hub=USER/NAME]
"""

import os
import sys
from typing import Any

import huggingface_hub
from absl import flags
from etils import epath
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)

from oapl_jax.config import LoraConfig, load_config
from oapl_jax.errors import RunError, UserError, exit_with_code, one_line
from oapl_jax.files import absolute, flag_directory, is_local
from oapl_jax.model import hf
from oapl_jax.model.lora import Lora
from oapl_jax.model.tokenizer import check_tokenizer, load_tokenizer
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.weights import checkpoint, publisher
from oapl_jax.weights.versions import publish_with_card

STEPS = ("weights", "checkpoints")  # directories of a workdir with Orbax steps


def publish_step(
    workdir: epath.Path,
    step: int,
    directory: epath.Path,
    *,
    dtype: str | None,
    merged: bool = False,
) -> epath.Path:
    """Publishes an Orbax step of a run below the `directory` of versions; returns the version's.

    Model and tokenizer are the run's own, and so is the dtype unless another is given. `merged`
    adds LoRA adapters to their base. Raises a UserError if there is no such run or step, or the
    run has no adapters to merge.
    """
    saved = load_config(workdir)
    if saved is None:
        raise UserError(f"--from={workdir} has no config.json; name the workdir of a run")
    steps = {name: publisher.finished_steps(workdir / name) for name in STEPS}
    found = [name for name, have in steps.items() if step in have]
    if not found:
        have = "; ".join(f"{name}: {', '.join(map(str, s)) or 'none'}" for name, s in steps.items())
        raise UserError(f"--step={step} is not in {workdir} (have {have}); choose one of those")
    model = epath.Path(saved["model"]["path"]) if saved["model"]["path"] else workdir / "model"
    adapters, section = None, saved["model"].get("lora", {})
    if section.get("rank"):
        section = LoraConfig.from_dict(section, "model.lora")
        base = os.fspath(absolute(model))
        adapters = hf.Adapters(Lora.of(section), base, merged or section.merged)
    elif merged:
        raise UserError(f"--merged: {workdir} trains all weights and no adapters; leave it out")
    config = hf.load_config(model)
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer, config, source=os.fspath(model))
    source = workdir / found[0] / str(step)
    if found[0] == "checkpoints":
        checkpoint.check_params(source, publisher.open_params(source))
    return publish_with_card(
        source,
        config,
        saved,
        read_lines(workdir / "metrics.jsonl"),
        version=step,
        directory=directory,
        tokenizer=tokenizer,
        dtype=dtype or saved["publish_dtype"],
        adapters=adapters,
    )


def push_to_hub(path: epath.Path, name: str) -> str:
    """Uploads a version to the Hugging Face Hub as one commit of the model NAME; returns its URL.

    A repository that does not exist is made, private. Its other weights and JSON files are deleted:
    they are an older version's. The client takes token and endpoint from its own environment
    (HF_TOKEN, HF_ENDPOINT).

    Raises:
      UserError: for a version that is damaged or not local, or a Hub that refuses.
      RunError: for a Hub that does not answer.
    """
    if not is_local(path):
        raise UserError(f"{path} is in an object store; give a local directory --to, to push it")
    publisher.check_loadable(path)
    publisher.check_version(path)
    try:
        hub = huggingface_hub.HfApi()
        repository = hub.create_repo(name, private=True, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository.repo_id,
            folder_path=os.fspath(path),
            commit_message=f"step {int(path.name[1:])}",
            delete_patterns=["*.safetensors", "*.json"],
        )
    except (HTTPError, OSError, ValueError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if refused or isinstance(error, ValueError):
            raise UserError(
                f"--push-to-hub={name} was refused ({one_line(error)}); log in with `hf auth "
                f"login`, or name a model that you may write. The version is whole: {path}"
            ) from error
        raise RunError(
            f"the Hub does not answer ({one_line(error)}); the version is whole: {path}, and the "
            "same command pushes it"
        ) from error
    return str(commit.commit_url)


def main() -> None:
    values = flags.FlagValues()  # separate: other modules define flags of the same names
    source: Any = flags.DEFINE_string("from", None, "workdir of the run", flag_values=values)
    step: Any = flags.DEFINE_integer("step", None, "Orbax step to publish", flag_values=values)
    to: Any = flags.DEFINE_string("to", None, "directory of versions", flag_values=values)
    hub: Any = flags.DEFINE_string(
        "push-to-hub", None, "model on the Hugging Face Hub, as USER/NAME", flag_values=values
    )
    merged = flags.DEFINE_bool("merged", False, "merge LoRA adapters", flag_values=values)
    choices = list(hf.EXPORT_DTYPES)
    dtype = flags.DEFINE_enum("dtype", None, choices, "default: publish_dtype", flag_values=values)
    try:
        words = values(sys.argv)[1:]
    except flags.Error as error:
        raise UserError(
            f"{one_line(error)} (--from, --step, --to, --dtype, --merged, --push-to-hub)"
        ) from error
    if words:
        raise UserError(f"{words[0]!r} is no flag; flags begin with dashes")
    missing = [f"--{flag.name}" for flag in (source, step, to) if flag.value is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; name the run, its step and a directory")
    workdir, directory = (flag_directory(flag.name, flag.value) for flag in (source, to))
    path = publisher.version_path(directory, step.value)
    exists = step.value in publisher.published_versions(directory)
    if exists and not hub.value:
        raise UserError(f"{path} exists already; delete it, or give another directory --to")
    if not exists:
        how: Any = dict(dtype=dtype.value, merged=merged.value)
        publish_step(workdir, step.value, directory, **how)
    print(path)
    if hub.value:
        print(push_to_hub(path, hub.value))


if __name__ == "__main__":
    exit_with_code(main)
