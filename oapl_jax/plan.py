"""Plans a configuration for a TPU slice; no TPU is needed, only its compiler.

python -m oapl_jax.plan --config=configs/competition_math.py --topology=v5e:8x8 [--config.…]
    [--model=qwen3-4b] [--workdir=runs/plan] [--storage=1e9] [--sweep [--enough=6]]
"""

import functools
import json
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from etils import epath

from oapl_jax.build import Config
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.launch import read_command_line
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import REMAT_POLICIES
from oapl_jax.planning import digest, report
from oapl_jax.planning.estimate import estimate
from oapl_jax.planning.layouts import FULL, Choice, applied, family, meshes
from oapl_jax.planning.model_choice import model_of
from oapl_jax.planning.sweep import Record, sweep
from oapl_jax.planning.topology import Slice, open_slice
from oapl_jax.tracking.progress import say
from oapl_jax.weights.publisher import config_hash


def main() -> None:
    topology = flags.DEFINE_string("topology", None, "the slice, as v5e:8x8 or v5p:4x4x4")
    model = flags.DEFINE_string("model", None, "a published model's sizes, not model.path's")
    storage = flags.DEFINE_float("storage", 1e9, "bytes/s between a host and what keeps versions")
    sweeps = flags.DEFINE_boolean("sweep", False, "try meshes, remat policies and micro-batches")
    enough = flags.DEFINE_integer(
        "enough", 6, "meshes that fit, after which a sweep tries no more", 1
    )
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU
    flags.FLAGS.set_default("workdir", "runs/plan")
    config, workdir = read_command_line()
    if topology.value is None:
        raise UserError("--topology is missing; add, for example, --topology=v5e:8x8")
    where = open_slice(topology.value)
    with tempfile.TemporaryDirectory() as scratch:
        sizes, from_checkpoint = model_of(config, model.value, epath.Path(scratch), say)
    workdir.mkdir(parents=True, exist_ok=True)
    name = where.name.replace(":", "-")
    plan_of = functools.partial(
        estimate, from_checkpoint=from_checkpoint, storage=storage.value, say=say
    )
    if sweeps.value:
        made_with = f", {digest.code()}, {from_checkpoint}, {storage.value:g} bytes/s"
        record = Record(workdir / f"sweep-{name}.json", made_with)
        plan = swept(config, sizes, where, plan_of, record, enough.value)
    else:
        plan = plan_of(config, sizes, where)
    say(report.text(plan))
    path = workdir / f"{name}.json"
    path.write_text(json.dumps(plan, indent=1) + "\n")
    say(f"\n{path}")


def swept(
    config: Config,
    sizes: ModelConfig,
    where: Slice,
    plan_of: Callable[[Config, ModelConfig, Slice], dict[str, Any]],
    record: Record,
    enough: int,
) -> dict[str, Any]:
    """The plan of the fastest layout that fits, and a table of the others.

    Raises:
      UserError: if none fits.
    """
    refusals = []

    def made(chosen: Config) -> dict[str, Any]:
        try:
            return plan_of(chosen, sizes, where)
        except (UserError, RunError) as error:  # of this layout; there are others
            return {"fits": False, "chip_fits": False, "refused": str(error)}

    def plan(choice: Choice) -> dict[str, Any]:
        chosen = applied(config, choice)
        say(f"trying {choice}")
        key = f"{choice}; configuration {config_hash(chosen.to_dict())[:12]}, {sizes}"
        found = record.get(key, lambda: made(chosen))
        if "refused" in found:
            say(f"refused: {found['refused']}")
            refusals.append(found["refused"])
        return found

    remats = [FULL, *(remat for remat in reversed(REMAT_POLICIES) if remat != FULL)]
    of_mesh = functools.partial(family, config)
    tried = meshes(config, sizes, len(where.devices))
    found = sweep(tried, remats, of_mesh, plan, enough=enough)
    if not found:
        last = f"; the last refusal: {refusals[-1]}" if refusals else ""
        raise UserError(f"nothing fits {where.name}; name a larger --topology{last}")
    say(report.ranking(found))
    return found[0][1]


if __name__ == "__main__":
    exit_with_code(main)
