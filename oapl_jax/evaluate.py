"""What was learned: a split of the configured task, benchmarks, or two results compared.

python -m oapl_jax.evaluate --config=configs/arithmetic.py --workdir=runs/arithmetic [--step=N]
python -m oapl_jax.evaluate --config=... --workdir=... [--step=N | --version_dir=DIR]
    --benchmark=aime25,hmmt25_feb --n=256 [--to=DIR]
python -m oapl_jax.evaluate --compare=A/result.json,B/result.json [--to=DIR]
"""

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from absl import flags
from etils import epath

from oapl_jax import build
from oapl_jax.build import Run
from oapl_jax.config import Config
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.evaluation import compare, report, table
from oapl_jax.evaluation.run import run_benchmarks
from oapl_jax.files import absolute
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.tracking.progress import say


def main() -> None:
    if any(argument.partition("=")[0] == "--compare" for argument in sys.argv[1:]):
        compare.main()  # needs no configuration
        return
    step = flags.DEFINE_integer("step", None, "checkpoint step; the newest by default")
    version_dir = flags.DEFINE_string("version_dir", None, "or a published version's directory")
    split = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "which prompts")
    benchmarks = flags.DEFINE_list("benchmark", [], "instead of a split; of config.benchmarks")
    n = flags.DEFINE_integer("n", None, "samples of a problem; evaluation.n by default", 1)
    to = flags.DEFINE_string("to", None, "directory for benchmarks; evaluation/ in the workdir")
    config, workdir = read_command_line()
    names = ("step", "version_dir", "split", "n", "to")
    check_flags(benchmarks.value, {name for name in names if flags.FLAGS[name].present})
    if not benchmarks.value and not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} holds no checkpoints; train there first")
    use_compile_cache(config.compile_cache, workdir)
    run = build.open_run(config, workdir)
    try:
        if benchmarks.value:
            evaluate_benchmarks(
                config,
                run,
                benchmarks.value,
                absolute(to.value) if to.value else workdir / "evaluation",
                step=step.value,
                version_dir=version_dir.value,
                n=config.evaluation.n if n.value is None else n.value,
            )
        else:
            evaluate_split(config, run, step.value, split.value)
    finally:
        run.close()


def check_flags(benchmarks: Sequence[str], given: Collection[str]) -> None:
    """Raises a UserError for flags that do not go together."""
    if not benchmarks:
        for name in sorted({"version_dir", "n", "to"} & set(given)):
            raise UserError(f"--{name} is for benchmarks; name some with --benchmark")
    elif "split" in given:
        raise UserError("--split and --benchmark both name problems; give one of them")
    elif {"step", "version_dir"} <= set(given):
        raise UserError("--step and --version_dir both name a version; give one of them")


def evaluate_benchmarks(
    config: Config, run: Run, names: Sequence[str], to: epath.Path, **what: Any
) -> None:
    """Writes results.md and pass_at_k.png beside what `run` leaves, and prints the table."""
    directory, results = run_benchmarks(config, run, names, to, **what, say=say)
    text = report.markdown(results)
    (directory / "results.md").write_text(text)
    version = next(iter(results.values()))["about"]["version"]
    panels = {name: {"": result} for name, result in results.items()}
    report.draw(panels, directory / "pass_at_k.png", title=f"Version {version}")
    say(text)
    for name in results:
        say(f"{name}: {directory / name / 'result.json'}")


def evaluate_split(config: Config, run: Run, step: int | None, split: str) -> None:
    """Prints the table and the JSON of a checkpoint step on a split."""
    found, params = run.params_at(step)
    result = build.open_evaluator(config, run)(found, params, split)
    print(table({str(found): result}))
    print(json.dumps(result))


if __name__ == "__main__":
    exit_with_code(main)
