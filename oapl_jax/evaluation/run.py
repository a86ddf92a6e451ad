"""The benchmarks of a configuration, in a job that is open: one version, one directory."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from oapl_jax import build
from oapl_jax.build import Run
from oapl_jax.config import Config
from oapl_jax.data.prompts import PROMPT_SETTINGS, all_prompts
from oapl_jax.data.public import releases
from oapl_jax.errors import UserError
from oapl_jax.evaluation import grades, responses
from oapl_jax.evaluation.benchmark import measure, sample
from oapl_jax.evaluation.grades import Grades
from oapl_jax.evaluation.responses import Responses
from oapl_jax.record import fixed_version
from oapl_jax.structs import Prompt, Rollout
from oapl_jax.weights import publisher


def run_benchmarks(
    config: Config,
    run: Run,
    names: Sequence[str],
    to: epath.Path,
    *,
    step: int | None,
    version_dir: str | None,
    n: int,
    say: Callable[[str], None],
) -> tuple[epath.Path, dict[str, dict[str, Any]]]:
    """Evaluates one version on each benchmark, or what is left of that to do.

    Args:
      config, run: an open run; responses may have evaluation.max_response_tokens here.
      names: of config.benchmarks.
      to: DIR/weights gets the version if it must be published, and DIR/v000012/NAME what is made of
        version 12.
      step, version_dir: see rollout.generate.fixed_version.
      n: samples a problem.
      say: takes a sentence for people.

    Returns:
      DIR/v000012, and the results by name, see `measure`.

    Raises:
      UserError: for names that there are not, responses that do not fit the model's context, or a
        directory with responses of another kind.
      RunError: if samples are missing at the end; the others are kept.
    """
    run = with_own_length(config, run)
    opened = {name: benchmark_prompts(config, run, name) for name in dict.fromkeys(names)}
    build.check_grader(config, run)
    version, weights = fixed_version(run, to, step, version_dir)
    directory = publisher.version_path(to, version)
    results = {}
    for name, (prompts, left_out) in opened.items():
        about = responses.describe(
            prompts,
            benchmark=name,
            version=version,
            weights=checksum_of_tensors(weights),
            sampler=config.rollout.sampler,
            seed=config.seed,
            tokenizer=run.policy.tokenizer,
            model=run.policy.config,
            sampling=run.sampling,
        )
        results[name] = _evaluate(
            config, run, directory / name, about, prompts, weights, left_out=left_out, n=n, say=say
        )
    return directory, results


def with_own_length(config: Config, run: Run) -> Run:
    """The job with the response length of benchmarks, which may exceed that of training."""
    prompt = config.data.max_prompt_tokens
    longest = config.evaluation.max_response_tokens
    if prompt + longest > run.policy.config.max_positions:
        raise UserError(
            f"data.max_prompt_tokens={prompt} + evaluation.max_response_tokens={longest} is more "
            f"than the model's max_position_embeddings ({run.policy.config.max_positions}); lower "
            "one"
        )
    sampling = dataclasses.replace(run.sampling, max_response_tokens=longest)
    return dataclasses.replace(run, sampling=sampling)


def checksum_of_tensors(version: epath.Path) -> str:
    """Checksum of a published version's tensors, the same whenever and wherever it is published."""
    files = publisher.read_manifest(version)["files"]
    sums = {name: file["xxh128"] for name, file in files.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def benchmark_prompts(config: Config, run: Run, name: str) -> tuple[list[Prompt], int]:
    """The prompts of a benchmark in order, and how many were left out because they are too long.

    Raises:
      UserError: for a name that config.benchmarks does not have; and what its files deserve.
    """
    sets = {name: dataclasses.asdict(s) for name, s in config.benchmarks.items()}
    if name not in sets:
        have = ", ".join(sorted(sets)) or "none"
        raise UserError(f"--benchmark={name} is not one of config.benchmarks (have: {have})")
    records = releases.open_set(
        name, section="config.benchmarks", data_dir=config.data.data_dir, sets=sets
    )
    prompts = all_prompts(
        records,
        run.policy.tokenizer,
        task=config.data.task,
        limit=None,
        **{key: getattr(config.data, key) for key in PROMPT_SETTINGS},
    )
    return prompts, len(records) - len(prompts)


def _evaluate(
    config: Config,
    run: Run,
    directory: epath.Path,
    about: Mapping[str, Any],
    prompts: Sequence[Prompt],
    weights: epath.Path,
    *,
    left_out: int,
    n: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    name, total = about["benchmark"], len(prompts) * n

    def progress(verb: str) -> Callable[[int], None]:
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if done * 20 // total > told:
                told = done * 20 // total
                say(f"{name}: {done} of {total} responses {verb}")

        return tell

    found = Responses(directory / "responses.jsonl", about, prompts, n=n)
    try:
        if not found.there.all():
            # Other random numbers than training; no group of another version is of use.
            sampler = build.open_sampler(config, run, seed=config.seed + 1, older_versions=False)
            try:
                sampler.refresh(about["version"], weights)
                sample(
                    sampler,
                    prompts,
                    found,
                    at_once=config.group_size,
                    version=about["version"],
                    sampling=run.sampling,
                    progress=progress("sampled"),
                )
            finally:
                sampler.close()
        graded = Grades(
            directory / "grades.jsonl",
            grades.describe(prompts, dataclasses.asdict(config.rewards)),
            prompts,
            found,
        )
        try:
            graded.fill(
                found,
                prompts,
                lambda prompt, rollouts: judge(run.grader, prompt, rollouts),
                run.grader.metrics,
                threads=config.rollout.reward_threads,
                progress=progress("graded"),
            )
        finally:
            graded.close()
        result = measure(
            prompts,
            found,
            graded,
            left_out=left_out,
            resamples=config.evaluation.resamples,
            seed=config.seed,
        )
    finally:
        found.close()
    (directory / "result.json").write_text(json.dumps(result))
    return result


def judge(
    grader: Any, prompt: Prompt, rollouts: Sequence[Rollout]
) -> tuple[list[float], list[str]]:
    """Rewards and final answers of some responses to one prompt."""
    return (
        [grader.reward(prompt, rollout) for rollout in rollouts],
        [grader.final_answer(prompt, rollout) for rollout in rollouts],
    )
