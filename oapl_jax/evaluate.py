"""Evaluates a checkpoint on a split or on benchmarks, shows responses, or compares two results.

python -m oapl_jax.evaluate --workdir=runs/arithmetic [--step=N] [--split=train|validation|test]
    [--show=20 [--wrong]]
python -m oapl_jax.evaluate --config=... --workdir=... [--step=N | --version_dir=DIR]
    --benchmark=aime25,hmmt25_feb --n=256 [--to=DIR]
python -m oapl_jax.evaluate --compare=A/result.json,B/result.json [--to=DIR]

Without --config the settings are those of the run in the workdir.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from oapl_jax import multihost
from oapl_jax.build import Run
from oapl_jax.config import shorter
from oapl_jax.data.prompts import all_prompts
from oapl_jax.data.public import releases
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.evaluation import compare, report, table
from oapl_jax.evaluation.benchmark import Grades, Samples, grader_identity, measure
from oapl_jax.evaluation.shown import grade_responses
from oapl_jax.files import flag_directory, write_atomically
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.record import version_to_sample
from oapl_jax.rollout.dataset import Dataset, DatasetWriter, fill, identity, stored
from oapl_jax.structs import Prompt
from oapl_jax.tracking.progress import log
from oapl_jax.weights import lease, publisher

LEAST_AT_ONCE = 16  # prompts sampled at a time for --show
GROUPS_PER_SHARD, SECONDS_PER_SHARD = 64, 60.0  # responses that a kill loses at most


def main() -> None:
    if any(argument.partition("=")[0] == "--compare" for argument in sys.argv[1:]):
        compare.main()  # needs no configuration
        return
    step = flags.DEFINE_integer("step", None, "checkpoint step; the newest by default")
    version_dir = flags.DEFINE_string("version_dir", None, "or a published version's directory")
    split = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "which prompts")
    benchmarks = flags.DEFINE_list("benchmark", [], "instead of a split; of config.benchmarks")
    n = flags.DEFINE_integer("n", None, "samples of a problem; evaluation.n by default", 1)
    show = flags.DEFINE_integer("show", None, "responses to show, instead of an evaluation", 1)
    wrong = flags.DEFINE_bool("wrong", False, "show those that are not right")
    to = flags.DEFINE_string("to", None, "directory for benchmarks; evaluation/ in the workdir")
    config, workdir = read_command_line(or_saved=True)
    names = ("step", "version_dir", "split", "n", "to", "show", "wrong")
    check_flags(benchmarks.value, {name for name in names if flags.FLAGS[name].present})
    if not benchmarks.value and not (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} holds no checkpoints; train there first")
    use_compile_cache(config.compile_cache, workdir)
    with contextlib.closing(Run(config, workdir)) as run:
        if not benchmarks.value:
            found, params = run.params_at(step.value)
            if show.value:
                show_responses(run, found, params, split.value, show.value, wrong=wrong.value)
                return
            result = run.evaluate(found, params, split.value)
            print(table({str(found): result}), json.dumps(result), sep="\n")
            return
        place = workdir / "evaluation" if to.value is None else flag_directory("to", to.value)
        with lease.hold_bucket(place, log=log, lost=multihost.exit_now, of="--to"):
            directory, results = evaluate_benchmarks(
                run,
                benchmarks.value,
                place,
                step=step.value,
                version_dir=version_dir.value,
                n=config.evaluation.n if n.value is None else n.value,
                log=log,
            )
        log((directory / "results.md").read_text())
        for name in results:
            log(f"{name}: {directory / name / 'result.json'}")


def check_flags(benchmarks: Sequence[str], given: Collection[str]) -> None:
    """Raises a UserError for flags that do not go together."""
    if not benchmarks:
        for name in sorted({"version_dir", "n", "to"} & set(given)):
            raise UserError(f"--{name} is for benchmarks; name some with --benchmark")
        if "wrong" in given and "show" not in given:
            raise UserError("--wrong chooses what --show shows; add, for example, --show=20")
    elif {"show", "wrong"} & set(given):
        raise UserError(
            "--show is for a split; of a benchmark, read grades.jsonl, which has the responses, "
            "verdicts and reasons"
        )
    elif "split" in given:
        raise UserError("--split and --benchmark both name problems; give one of them")
    elif {"step", "version_dir"} <= set(given):
        raise UserError("--step and --version_dir both name a version; give one of them")


def show_responses(
    run: Run, step: int, params: Any, split: str, count: int, *, wrong: bool
) -> None:
    """Prints graded responses to the first prompts of a split, or those that are not right."""
    # The random numbers of evaluations.
    sampler = run.open_local_sampler(seed=run.config.seed + 1)
    sampler.set_params(step, run.merged(params))
    prompts, grader = run.prompts(split), run.grader
    shown, seen, at_once = 0, Counter[str](), max(count, LEAST_AT_ONCE)
    for graded in grade_responses(sampler, prompts, grader.grade, run.sampling, at_once=at_once):
        seen[graded.grade.verdict] += 1
        if not wrong or graded.grade.verdict != "right":
            shown += 1
            log(f"[{shown}] step {step}, {split}, prompt {graded.prompt.id}")
            log(graded.format(run.response_text(graded.rollout.tokens)))
        if shown == count:
            break
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in seen.most_common())
    log(f"{shown} responses shown of {seen.total()} sampled ({verdicts}), one a prompt")


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
    """Evaluates one version on each benchmark; resumes an interrupted evaluation.

    Args:
      to: DIR/weights gets the version if it is not published yet; DIR/v000012/NAME gets the files
        of version 12, and DIR/v000012 results.md and pass_at_k.png.
      step, version_dir: see `version_to_sample`.

    Returns:
      DIR/v000012, and the results by name, see benchmark.measure.

    Raises:
      UserError: for an unknown name, responses that do not fit the model's context, or a directory
        with responses of another identity.
      RunError: if samples are missing at the end; the others are kept.
    """
    config = run.config
    prompt, longest = config.data.max_prompt_tokens, config.evaluation.max_response_tokens
    positions = run.policy.config.max_positions
    if prompt + longest > positions:
        raise UserError(
            f"data.max_prompt_tokens={prompt} + evaluation.max_response_tokens={longest} is more "
            f"than the model's max_position_embeddings ({positions}); "
            f"{shorter('evaluation', prompt, positions)}"
        )
    # Responses to benchmarks may be longer than those of training.
    run.sampling = dataclasses.replace(run.sampling, max_response_tokens=longest)
    opened = {name: benchmark_prompts(run, name) for name in dict.fromkeys(names)}
    run.check_grader()
    version, path = version_to_sample(run, to, step, version_dir)
    directory, checksum = publisher.version_path(to, version), tensor_checksum(path)
    results = {}
    for name, (prompts, dropped) in opened.items():
        templated = json.dumps([[p.id, p.tokens.tolist()] for p in prompts])
        about = identity(
            task=config.data.task,
            tokenizer=run.policy.tokenizer,
            model=run.policy.config,
            sampling=run.sampling,
            benchmark=name,
            problems=len(prompts),
            prompts=hashlib.sha256(templated.encode()).hexdigest(),
            version=version,
            weights=checksum,
            sampler=config.rollout.sampler,
            seed=config.seed,
        )
        responses = directory / name / "responses"
        sample(run, prompts, responses, about, path, n=n, log=log)
        result = grade(run, prompts, responses, about, n=n, dropped=dropped, log=log)
        results[name] = result
        write_atomically(directory / name / "result.json", [json.dumps(result).encode()])
    write_atomically(directory / "results.md", [report.markdown(results).encode()])
    panels = {name: {"": result} for name, result in results.items()}
    report.plot(panels, directory / "pass_at_k.png", title=f"Version {version}")
    return directory, results


def sample(
    run: Run,
    prompts: Sequence[Prompt],
    responses: epath.Path,
    about: Mapping[str, Any],
    weights: epath.Path,
    *,
    n: int,
    log: Callable[[str], None],
) -> None:
    """Samples the missing responses, up to n a prompt, from the version in `weights`."""
    if (responses.parent / "responses.jsonl").exists():
        raise UserError(
            f"{responses.parent} holds responses of an older format; name another directory in --to"
        )
    writer = DatasetWriter(
        responses,
        about,
        groups_per_shard=GROUPS_PER_SHARD,
        seconds_per_shard=SECONDS_PER_SHARD,
        weights_digest=lambda version: about["weights"],
        decode=run.response_text,
    )
    with contextlib.closing(writer):
        if stored(writer.samples, len(prompts), n).all():
            return
        # Other random numbers than training; groups of another version are of no use.
        sampler = run.open_sampler(seed=run.config.seed + 1, allow_older=False)
        with contextlib.closing(sampler):
            sampler.refresh(about["version"], weights)
            fill(
                writer,
                prompts,
                sampler,
                lambda prompt, rollout: float("nan"),  # graded later, perhaps more than once
                version=about["version"],
                n=n,
                at_once=run.config.group_size,
                sampling=run.sampling,
                reward_threads=1,
                note=lambda group: None,
                progress=logged(f"{about['benchmark']}: responses sampled", n * len(prompts), log),
            )


def grade(
    run: Run,
    prompts: Sequence[Prompt],
    responses: epath.Path,
    about: Mapping[str, Any],
    *,
    n: int,
    dropped: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Grades responses that this grader has not graded; returns benchmark.measure's result."""
    with contextlib.closing(Dataset(responses)) as dataset:
        samples = Samples(dataset, prompts=len(prompts), n=n)
        grader, rewards = run.grader, dataclasses.asdict(run.config.rewards)
        path, identified = responses.parent / "grades.jsonl", grader_identity(prompts, rewards)
        with contextlib.closing(Grades(path, identified, prompts, samples.logp)) as grades:
            grades.fill(
                dataset,
                lambda prompt, rollouts: (
                    [run.response_text(rollout.tokens) for rollout in rollouts],
                    [grader.grade(prompt, rollout) for rollout in rollouts],
                ),
                grader.metrics,
                threads=run.config.rollout.reward_threads,
                progress=logged(f"{about['benchmark']}: responses graded", n * len(prompts), log),
            )
    return measure(
        prompts,
        samples,
        grades,
        about=about,
        dropped=dropped,
        resamples=run.config.evaluation.resamples,
        seed=run.config.seed,
    )


def logged(name: str, total: int, log: Callable[[str], None]) -> Callable[[int], None]:
    """Progress function that logs every twentieth of the total."""
    logged = 0

    def progress(done: int) -> None:
        nonlocal logged
        if done * 20 // total > logged:
            logged = done * 20 // total
            log(f"{name}: {min(done, total)} of {total}")

    return progress


def tensor_checksum(version: epath.Path) -> str:
    """Checksum of a version's tensors, the same whenever and wherever it is published."""
    files = publisher.read_manifest(version)["files"]
    sums = {name: file["xxh128"] for name, file in files.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def benchmark_prompts(run: Run, name: str) -> tuple[list[Prompt], int]:
    """Opens a benchmark: its prompts in order, and the number of those that are too long."""
    config, sets = run.config, run.config.benchmarks
    if name not in sets:
        have = ", ".join(sorted(sets)) or "none"
        raise UserError(f"--benchmark={name} is not one of config.benchmarks (have: {have})")
    records = releases.open_set(
        name, sets, section="config.benchmarks", data_dir=config.data.data_dir
    )
    prompts = all_prompts(records, run.prompt_template)
    return prompts, len(records) - len(prompts)


if __name__ == "__main__":
    exit_with_code(main)
