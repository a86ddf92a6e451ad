"""Evaluates a checkpoint on a split or on benchmarks, or compares two results.

python -m oapl_jax.evaluate --config=configs/arithmetic.py --workdir=runs/arithmetic [--step=N]
python -m oapl_jax.evaluate --config=... --workdir=... [--step=N | --version_dir=DIR]
    --benchmark=aime25,hmmt25_feb --n=256 [--to=DIR]
python -m oapl_jax.evaluate --compare=A/result.json,B/result.json [--to=DIR]
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from absl import flags
from etils import epath

from oapl_jax.build import Run
from oapl_jax.data.prompts import all_prompts
from oapl_jax.data.public import releases
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.evaluation import compare, report, table
from oapl_jax.evaluation.benchmark import response_identity, run_benchmark
from oapl_jax.files import absolute
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.record import version_to_sample
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt
from oapl_jax.tracking.progress import say
from oapl_jax.weights import publisher


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
    run = Run(config, workdir)
    try:
        if benchmarks.value:
            directory, results = evaluate_benchmarks(
                run,
                benchmarks.value,
                absolute(to.value) if to.value else workdir / "evaluation",
                step=step.value,
                version_dir=version_dir.value,
                n=config.evaluation.n if n.value is None else n.value,
                log=say,
            )
            say((directory / "results.md").read_text())
            for name in results:
                say(f"{name}: {directory / name / 'result.json'}")
        else:
            found, params = run.params_at(step.value)
            result = run.evaluate(found, params, split.value)
            print(table({str(found): result}))
            print(json.dumps(result))
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
    run: Run,
    names: Sequence[str],
    to: epath.Path,
    *,
    step: int | None,
    version_dir: str | None,
    n: int,
    log: Callable[[str], None],
) -> tuple[epath.Path, dict[str, dict[str, Any]]]:
    """Evaluates one version on each benchmark, or what is left of that to do.

    Args:
      run: model, checkpoints and verifiers.
      names: of config.benchmarks.
      to: DIR/weights gets the version if it is not published yet; DIR/v000012/NAME gets the files
        of version 12, and DIR/v000012 results.md and pass_at_k.png.
      step, version_dir: see `version_to_sample`.
      n: samples of a problem.
      log: takes a sentence for people.

    Returns:
      DIR/v000012, and the results by name, see benchmark.measure.

    Raises:
      UserError: for an unknown name, responses that do not fit the model's context, or a directory
        with responses of another identity.
      RunError: if samples are missing at the end; the others are kept.
    """
    config, run.sampling = run.config, benchmark_sampling(run)
    opened = {name: benchmark_prompts(run, name) for name in dict.fromkeys(names)}
    run.check_grader()
    version, weights = version_to_sample(run, to, step, version_dir)
    directory = publisher.version_path(to, version)
    results = {}
    for name, (prompts, left_out) in opened.items():
        about = response_identity(
            prompts,
            benchmark=name,
            version=version,
            weights=tensor_checksum(weights),
            sampler=config.rollout.sampler,
            seed=config.seed,
            tokenizer=run.policy.tokenizer,
            model=run.policy.config,
            sampling=run.sampling,
        )
        results[name] = run_benchmark(
            directory / name,
            prompts,
            about,
            n=n,
            at_once=config.group_size,
            left_out=left_out,
            sampling=run.sampling,
            # Other random numbers than training; groups of another version are of no use.
            new_sampler=lambda: run.open_sampler(seed=config.seed + 1, allow_older=False),
            weights=weights,
            grader=run.grader,
            grader_settings=dataclasses.asdict(config.rewards),
            threads=config.rollout.reward_threads,
            resamples=config.evaluation.resamples,
            seed=config.seed,
            log=log,
        )
    (directory / "results.md").write_text(report.markdown(results))
    panels = {name: {"": result} for name, result in results.items()}
    report.plot(panels, directory / "pass_at_k.png", title=f"Version {version}")
    return directory, results


def benchmark_sampling(run: Run) -> Sampling:
    """The run's sampling with benchmarks' response length, which may exceed that of training."""
    prompt = run.config.data.max_prompt_tokens
    longest = run.config.evaluation.max_response_tokens
    if prompt + longest > run.policy.config.max_positions:
        raise UserError(
            f"data.max_prompt_tokens={prompt} + evaluation.max_response_tokens={longest} is more "
            f"than the model's max_position_embeddings ({run.policy.config.max_positions}); lower "
            "one"
        )
    return dataclasses.replace(run.sampling, max_response_tokens=longest)


def tensor_checksum(version: epath.Path) -> str:
    """Checksum of a version's tensors, the same whenever and wherever it is published."""
    files = publisher.read_manifest(version)["files"]
    sums = {name: file["xxh128"] for name, file in files.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def benchmark_prompts(run: Run, name: str) -> tuple[list[Prompt], int]:
    """Opens a benchmark: its prompts in order, and the number of those that are too long.

    Raises:
      UserError: for a name that config.benchmarks does not have, or damaged files.
    """
    config = run.config
    sets = config.benchmarks
    if name not in sets:
        have = ", ".join(sorted(sets)) or "none"
        raise UserError(f"--benchmark={name} is not one of config.benchmarks (have: {have})")
    records = releases.open_set(
        name, sets, section="config.benchmarks", data_dir=config.data.data_dir
    )
    prompts = all_prompts(records, run.policy.tokenizer, **run.prompt_settings)
    return prompts, len(records) - len(prompts)


if __name__ == "__main__":
    exit_with_code(main)
