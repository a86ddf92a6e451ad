"""SmolLM2-135M-Instruct, a pretrained model, learns a made task with words in it at a lag of 8.

Claim: OAPL raises pass@1 on held-out problems by at least .30 from between .05 and .5, without a
    loss of pass@8, of all weights and of adapters alike, within an hour on 2 cores, for 2 of 2
    seeds. GRPO with importance sampling runs beside it, with as many steps on as many groups.
Command: make run-smollm2 (unpacks the model, then the short form: 12 steps, one seed); then
    python -m experiments.smollm2 --to=runs/smollm2-learns
Hardware: 2 CPU cores, 16 GB of memory, 30 GB of disk.
Hours: at most 8 for 8 runs; --runs and --seeds choose among them.
Expected: the claim's numbers (our choice); else the exit code is 1.
Measured: nothing yet.

The runs are `configs/smollm2.py:full,oapl` and the like. pass@k is of the test split, 8 responses
to each of 128 problems at temperature .5; none of them is trained on. A finished run is not
repeated, with other settings it is refused, and an interrupted one resumes. The directory gets
smollm2.md (a table, and responses before and after), smollm2.png and smollm2.json.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from configs import smollm2
from experiments.table import markdown, plt, save
from oapl_jax import build, train
from oapl_jax.config import Config, load_config
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.evaluation.shown import Graded, grade_responses
from oapl_jax.files import absolute
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.tracking.progress import StopRequest, log

RUNS = ("full,oapl", "lora,oapl", "full,grpo_is", "lora,grpo_is")
CLAIMED = "oapl"
BEFORE = (0.05, 0.5)  # pass@1 of the model as it is
MIN_GAIN = 0.30  # of pass@1
MAX_MINUTES, LAG = 60.0, 8
SHOWN = 8  # problems of which responses are kept
# Of minutes: some of the gain, and nothing is claimed.
SHORT = {
    "num_steps": 12,
    "evaluation.every": 6,
    "data.validation_size": 16,
    "data.test_size": 48,
    "checkpoint.every": 12,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
      run: one of RUNS.
      before, after: results on the test split, as of oapl_jax.evaluation.evaluate.
      minutes: of loading the model and of all steps, with validations and checkpoints; without
        interruptions and the two evaluations of the test split.
      lag: the smallest mean lag of a step, from step LAG on.
      curve: step, pass@1 and pass@8 of each validation.
      samples: question, answer, and a response to it before and after.
    """

    run: str
    seed: int
    before: dict[str, Any]
    after: dict[str, Any]
    minutes: float
    lag: float
    curve: list[tuple[int, float, float]]
    samples: list[dict[str, str]]

    def gain(self, measure: str) -> float:
        return self.after[measure] - self.before[measure]

    @property
    def claimed(self) -> bool:
        return self.run.endswith(CLAIMED)

    @property
    def holds(self) -> bool:
        return (
            BEFORE[0] <= self.before["pass@1"] <= BEFORE[1]
            and self.gain("pass@1") >= MIN_GAIN
            and self.gain("pass@8") >= 0
            and self.minutes <= MAX_MINUTES
            and self.lag >= LAG
        )


def run(
    workdir: epath.Path, name: str, seed: int, changes: Mapping[str, Any], stop: StopRequest
) -> Outcome:
    """Trains to the end, unless done before; `changes` are overrides of the configuration.

    Raises a UserError if a run with other settings is in the workdir.
    """
    config = smollm2.get_config(name).unlock()
    config.seed = seed
    config.update_from_flattened_dict(changes)
    typed, done = Config.from_dict(config.to_dict()), workdir / "outcome.json"
    if done.exists():
        saved, alone = Config.from_dict(load_config(workdir) or {}), {"data": 1, "fsdp": 1}
        if saved.derived(alone) != typed.derived(alone):
            raise UserError(
                f"{workdir} holds a finished run with other settings; give another --to"
            )
        log(f"{workdir} is finished and not repeated")
        return Outcome(**json.loads(done.read_text()))
    ended = train.train(build.Run(typed, workdir), stop)
    if ended is None:
        raise SystemExit("stopped; the same command resumes")
    result, state = ended
    train.report(typed, workdir, result)
    lines = read_lines(workdir / "metrics.jsonl")
    of_steps = (line[key] for line in lines for key in line if key.startswith("seconds/"))
    outcome = Outcome(
        run=name,
        seed=seed,
        before=result["before"],
        after=result["after"],
        minutes=(result["seconds"]["warmup"] + sum(of_steps)) / 60,
        lag=min((line["lag/mean"] for line in lines if line["step"] > LAG), default=0.0),
        curve=[
            (line["step"], line["eval/pass@1"], line["eval/pass@8"])
            for line in lines
            if "eval/pass@1" in line
        ],
        samples=samples(typed, workdir, state.params),
    )
    done.write_text(json.dumps(dataclasses.asdict(outcome), indent=1))
    for directory in ("versions", "weights"):  # gigabytes; the last checkpoint stays
        shutil.rmtree(workdir / directory)
    return outcome


def samples(config: Config, workdir: epath.Path, params: Any) -> list[dict[str, str]]:
    """Responses of the model as it was and with `params`, from the same random numbers."""
    opened = build.Run(config, workdir)
    prompts = opened.prompts("test")[:SHOWN]
    sampler = opened.open_local_sampler(seed=config.seed + 1)

    def graded(version: int, params: Any) -> list[Graded]:
        sampler.set_params(version, opened.merged(params))
        parts = sampler, prompts, opened.grader.grade, opened.sampling
        return list(grade_responses(*parts, at_once=SHOWN))

    say = lambda of: f"{opened.response_text(of.rollout.tokens)!r}, {of.grade.verdict}"
    pairs = zip(graded(0, opened.start_params()), graded(config.num_steps, params), strict=True)
    found = [
        dict(question=a.prompt.text, answer=a.prompt.answer, before=say(a), after=say(b))
        for a, b in pairs
    ]
    opened.close()
    return found


def table(found: Sequence[Outcome]) -> str:
    """Markdown: a row for each run."""
    rows = []
    for outcome in found:
        of = lambda measure, x=outcome: f"{x.before[measure]:.3f} -> {x.after[measure]:.3f}"
        claim = ("holds" if outcome.holds else "FAILS") if outcome.claimed else ""
        measures = [of("pass@1"), f"{outcome.gain('pass@1'):+.3f}", of("pass@8"), of("greedy")]
        spent = [f"{outcome.lag:.1f}", f"{outcome.minutes:.0f}"]
        rows.append([f"`{outcome.run}`", str(outcome.seed), *measures, *spent, claim])
    head = ("seed", "pass@1", "gain", "pass@8", "greedy", "lag", "minutes", "claim")
    return markdown(["run", *head], rows)


def page(found: Sequence[Outcome]) -> str:
    """Markdown: the table, and the responses of the first run."""
    names = ("question", "answer", "before", "after")
    one_line = lambda text: " ".join(text.replace("|", "\\|").split())
    rows = [[one_line(sample[name]) for name in names] for sample in found[0].samples]
    title = f"Responses to the first test problems (`{found[0].run}`, seed {found[0].seed}):"
    return f"{table(found)}\n\n{title}\n\n{markdown(names, rows)}\n"


def draw(found: Sequence[Outcome], path: epath.Path) -> None:
    """Plots pass@1 and pass@8 of the validation split, and as stars those of the test split."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(x.run for x in found))}
    for axis, (column, measure) in zip(axes, enumerate(("pass@1", "pass@8"), start=1), strict=True):
        for outcome in found:
            steps = [point[0] for point in outcome.curve]
            style = dict(color=colors[outcome.run], alpha=0.7)
            label = outcome.run if outcome.seed == found[0].seed else None
            axis.plot(steps, [p[column] for p in outcome.curve], marker=".", label=label, **style)
            ends = [outcome.before[measure], outcome.after[measure]]
            axis.plot([0, steps[-1]], ends, "*", markersize=9, **style)
        axis.set(xlabel="gradient step", title=measure, ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", default="runs/smollm2-learns", help="directory of all runs")
    parser.add_argument("--model", default="runs/smollm2-model", help="the unpacked checkpoint")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="train,objective")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--short", action="store_true", help="see SHORT")
    arguments = parser.parse_args()
    to, stop = absolute(arguments.to), StopRequest()
    jax.config.update("jax_compilation_cache_dir", str(to / "programs"))
    changes = {"model.path": arguments.model, **(SHORT if arguments.short else {})}
    found = []
    for seed, name in itertools.product(arguments.seeds, arguments.runs):
        workdir = to / f"{name.replace(',', '-')}-{seed}"
        found.append(run(workdir, name, seed, changes, stop))
        log(table(found[-1:]).splitlines()[-1])
    kept = [{**dataclasses.asdict(x), "holds": x.holds} for x in found]
    (to / "smollm2.json").write_text(json.dumps(kept, indent=1))
    (to / "smollm2.md").write_text(page(found))
    draw(found, to / "smollm2.png")
    log(f"{page(found)}\n{to / 'smollm2.md'}, {to / 'smollm2.png'}, {to / 'smollm2.json'}")
    failed = [f"{x.run}, seed {x.seed}" for x in found if x.claimed and not x.holds]
    if failed and not arguments.short:
        raise SystemExit(f"the claim does not hold for {'; '.join(failed)}")


if __name__ == "__main__":
    exit_with_code(main)
