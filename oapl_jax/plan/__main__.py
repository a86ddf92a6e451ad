"""Plans a configuration for a TPU slice; no TPU is needed, only its compiler.

python -m oapl_jax.plan --config=configs/competition_math.py --topology=v5e:8x8 [--config.…]
    [--model=qwen3-4b] [--workdir=runs/plan] [--storage=1e9] [--sweep [--enough=6]]
"""

import functools
import json
import tempfile

import jax
from absl import flags
from etils import epath

from oapl_jax.command import read_command_line
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.models.transformer import REMAT_POLICIES
from oapl_jax.plan import report
from oapl_jax.plan.choices import applied, families
from oapl_jax.plan.estimate import estimate
from oapl_jax.plan.settings import model_of
from oapl_jax.plan.sweep import Record, sweep
from oapl_jax.plan.topology import open_slice
from oapl_jax.publisher import config_hash
from oapl_jax.report.progress import say


def main() -> None:
    topology = flags.DEFINE_string("topology", None, "the slice, as v5e:8x8 or v5p:4x4x4")
    model = flags.DEFINE_string("model", None, "a published model's sizes, not model.path's")
    storage = flags.DEFINE_float("storage", 1e9, "bytes/s between a host and what keeps versions")
    sweeps = flags.DEFINE_boolean("sweep", False, "try meshes, remat policies and micro-batches")
    enough = flags.DEFINE_integer("enough", 6, "plans that fit, after which a sweep ends", 1)
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU
    flags.FLAGS.set_default("workdir", "runs/plan")
    config, workdir = read_command_line()
    if topology.value is None:
        raise UserError("--topology is missing; add, for example, --topology=v5e:8x8")
    where = open_slice(topology.value)
    with tempfile.TemporaryDirectory() as scratch:
        sizes, from_checkpoint = model_of(config, model.value, epath.Path(scratch))
    workdir.mkdir(parents=True, exist_ok=True)
    name = where.name.replace(":", "-")
    plan_of = functools.partial(
        estimate, from_checkpoint=from_checkpoint, storage=storage.value, say=say
    )
    if sweeps.value:
        record = Record(workdir / f"sweep-{name}.json")

        def plan_choice(choice):
            chosen = applied(config, choice)
            key = f"{choice}; configuration {config_hash(chosen.to_dict())[:12]}, {sizes}"
            say(f"trying {choice}")
            return record.get(key, lambda: plan_of(chosen, sizes, where))

        chips, remats = len(where.devices), tuple(REMAT_POLICIES)
        tried = families(config, sizes, chips, remats)
        found = sweep(tried, plan_choice, enough=enough.value)
        if not found:
            raise UserError(f"nothing fits {where.name}; name a larger --topology")
        say(report.ranking(found))
        plan = found[0][1]
    else:
        plan = plan_of(config, sizes, where)
    say(report.text(plan))
    path = workdir / f"{name}.json"
    path.write_text(json.dumps(plan, indent=1) + "\n")
    say(f"\n{path}")


if __name__ == "__main__":
    exit_with_code(main)
