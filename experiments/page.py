"""The words of docs/comparison.md; its tables are those of tables.py.

What the figures are asked, and by which rule they answer, was written before any full run. What
they then say together is written by hand into the page itself, between two marks, and stays there.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping

from experiments import tables
from experiments.arms import Plan, arms, warm_up
from experiments.findings import LEVELS, spread
from experiments.grid import Grid
from experiments.lag import Table
from experiments.objectives import TUNING_SEEDS
from experiments.runs import GRADES

# Of OAPL against every other method.
QUESTIONS = {
    "pass@1": "Which is better?",
    "pass@8": "Does its lead grow with k? Compare with pass@1.",
    "pass@64": "The same; where both are almost 1 there is nothing to see.",
    "entropy": "Is entropy (nats a token) kept? A policy that has learned less has more of it: "
    "read it beside pass@1.",
    **dict.fromkeys(
        LEVELS,
        "Are fewer generations needed for this pass@1 on the validation split? A run that does not "
        "get there counts all that it made, the least that it would need; where for some seed "
        "neither does, it is not known.",
    ),
}
VERDICTS = ("more", "level", "less", "unknown")
BEGIN, END = "<!-- by hand, kept when this page is written again -->\n", "<!-- end -->"
LIMITS = """\
- There is one task, one model of a hundred thousand parameters, answers of ten tokens and at most
  1,024 steps. On long answers clips, ratios of sequences and beta2 are another matter.
- pass@64 is almost 1 before any reinforcement (see above): it can fall, and can hardly grow. What
  is gained beside pass@1 shows at pass@8 alone.
- A run live at lag 128 has two windows, with one sync between them: it shows what a method makes of
  data that is up to 127 steps old, and little of what many syncs do.
- The intervals are those of Student's t for {seeds} seeds, right for normal values; scores are not
  where some runs are lost. None is corrected for their number: by chance alone one in twenty would
  be a "more" or a "less".
- A choice rests on two runs a trial: who varies more from run to run loses more by it. Where the
  chosen rate is the smallest or the largest that was tried, marked by "!", there may be more to be
  had. It is made live at lags of {tuned}; at any other a method takes the choice of the next larger
  one (fresh data too: that of 8), offline that of the largest.
- Replays are of OAPL's own runs: where the trials chose the recorder's constants, its replay is its
  live run again, while all others learn from a foreign stream. They say who can learn from OAPL's
  rollouts, and not who is better; so they are counted apart. Not all methods have them at all lags,
  and `prosper`, whose rewards are preferences, is not compared.
- The learning rate falls to a tenth by a cosine, but in those columns of many syncs that do not say
  "falling": what survives a large step may be saved by the small ones at the end.
- Each problem has one right answer, and greedy decoding knows it for half of them before any
  reinforcement: to learn is to sharpen, and entropy must fall.
- OAPL's beta2 of 0.2 is this repository's default for the task; its beta1 was not tuned. The curves
  that generations are read from have a point for each eighth of a run.
- The tables of robustness have three seeds and no intervals. A run is lost that ends below its
  start; one that learned next to nothing is not. OAPL has three rows and some others one: don't
  compare the best of each. "Best" there is the best of the rates in the table, by the test split.
- Groups with equal rewards are not replaced, so that all runs sample alike; in the default job they
  are (`buffer.zero_variance=drop`), and a step is worth more and costs more. Here they weigh
  nothing, but for `sft`, `mixed`, `asymre` and `oapl, all groups`, which is OAPL as algorithm 1 of
  its paper reads: there they pull to pi_lag, as they would with `oapl_length` and `opmd_kimi`.
- Methods are as docs/methods.md says, some with corrections for stale data that their papers do not
  have; `vcpo` is without its paper's baseline. A batch gets one gradient step, so that the clip of
  `grpo_is`, `rloo`, `vcpo` and `mixed`, which is about the policy of the step itself, never
  acts."""
ARMS = f"""\
Rate and constants are those that the trials chose. Generations are the rollouts that a run trained
on, of a recorded set each counted once; beside them those up to a pass@1 of
{" and of ".join(map(str, LEVELS.values()))}, and how many runs got there. Drift is
KL(pi_lag || pi) in nats a token before the last step of a window. Lost runs ended with a lower
pass@1 than they began with, or failed: loss or gradient were not finite. A failed run counts as a
pass@k of 0, its generations and drift are those of its steps, and what else it would have shown is
unknown."""


def by_hand(text: str) -> str:
    """What somebody wrote into a page."""
    return text.partition(BEGIN)[2].partition(END)[0]


def page(grid: Grid, plan: Plan, pictures: Mapping[str, str], conclusions: str) -> str:
    """The whole text; `pictures` are captions by file name, `conclusions` are kept."""
    found, surfaces = tables.collect(grid, plan), tables.surfaces(grid, plan)
    parts = ["# Objectives at equal lag", introduction(grid, plan)]
    parts += missing(plan, found, surfaces)
    parts += [f"{BEGIN}{conclusions}{END}"]
    if found:
        parts += ["## pass@1 of every objective in every arm", overview(plan, found)]
        parts += ["## OAPL against the others", *questions(plan, found)]
    if surfaces:
        parts += ["## Where robustness to lag and step size ends", *robustness(surfaces.values())]
    if pictures:
        parts += ["## Pictures"]
        parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items()]
    parts += ["## What the figures do not support"]
    at = " and ".join(map(str, plan.tuned_lags))
    parts += [LIMITS.format(seeds=len(plan.seeds), tuned=at)]
    if found:
        parts += ["## Each arm", ARMS]
        parts += [f"### {arm.name}\n\n{tables.of_arm(plan, of)}" for arm, of in found.items()]
    return "\n\n".join(parts) + "\n"


def introduction(grid: Grid, plan: Plan) -> str:
    lines = [line for line in tables.behind(grid, plan) if line["outcome"] != "broken"]
    outcomes = [line["outcome"] for line in lines]
    hours = sum(line.get("core_seconds", 0.0) for line in lines) / 3600
    codes = {line["code"] for line in lines}
    steps, groups = plan.common["num_steps"], plan.common["groups_per_step"]
    validation, test = (
        f"{plan.data[f'data.{split}_size']} problems, {GRADES[split]['n']} samples each"
        for split in ("validation", "test")
    )
    paragraphs = (
        f"""Written by `python -m experiments.objectives` and `python -m experiments.lag`, from the
        results of {outcomes.count("ended")} runs that ended and {outcomes.count("failed")} that
        could not go on, by {len(codes)} state{"s" if len(codes) > 1 else ""} of the package's code;
        they took {hours:.1f} hours of a core. Started again, the commands add what is missing.""",
        f"""A run takes {steps} gradient steps of {groups} groups of 8 rollouts (the default job has
        400 of 32), with `--config=configs/{plan.config.replace(":", ".py:")}`, from a policy that
        is the same for all runs of a seed{beginning(grid, plan)}. Arms are where rollouts come from
        (`experiments/arms.py`): live at a lag of up to L - 1; offline, a set that the first policy
        sampled, gone through twice; a replay of another run's rollouts in their order.""",
        f"""Budget: each of {len(plan.core) + len(plan.rest)} methods gets {plan.trials} trials at
        each lag that is tuned, learning rates by values of its own constants
        (`experiments/objectives.py`), each with seeds {" and ".join(map(str, TUNING_SEEDS))}. The
        last policies' mean pass@1 on the validation split decides ({validation}). The choice then
        trains with {len(plan.seeds)} other seeds, and the test split grades ({test}, temperature
        1). Nothing is chosen by what it says.""",
        """Brackets are 95 % intervals of Student's t over the seeds. Methods are compared by the
        differences of runs of the same seed; "more" and "less" are said, and numbers are bold,
        where the interval of the mean difference lies on one side of 0.""",
    )
    return "\n\n".join(textwrap.fill(" ".join(text.split()), 110) for text in paragraphs)


def missing(plan: Plan, found: tables.Arms, surfaces: Iterable[str]) -> list[str]:
    """A sentence on what has not been run, if there is something."""
    wanted = {(arm, name) for arm, names in arms(plan) for name in names}
    done = {(arm, name) for arm, methods in found.items() for name in methods}
    without = [table.title for table in tables.lag.tables(plan) if table.title not in surfaces]
    if not wanted - done and not without:
        return []
    also = f"; and of the tables of robustness {', '.join(without)}" if without else ""
    text = f"Of {len(wanted)} pairs of a method and an arm {len(wanted - done)} are missing{also}."
    return [textwrap.fill(f"**Not all has been run.** {text}", 110)]


def beginning(grid: Grid, plan: Plan) -> str:
    """The policy after the warm-up."""
    lines = [grid.line(warm_up(plan, seed)) for seed in plan.seeds]
    ended = [line for line in lines if line and line["outcome"] == "ended"]
    if len(ended) < len(lines):
        return ""
    measures = ("pass@1", "pass@8", "pass@64", "entropy")
    means = {k: spread([line["test"][k] for line in ended])[0] for k in measures}
    return f" ({', '.join(f'{k} {mean:.3f}' for k, mean in means.items())})"


def overview(plan: Plan, found: tables.Arms) -> str:
    table = tables.overview(found, (*plan.core, *plan.rest))
    note = f"Means over {len(plan.seeds)} seeds. + and -: more or less than OAPL in that arm."
    return f"{table}\n\n{note}"


def questions(plan: Plan, found: tables.Arms) -> Iterable[str]:
    for measure, question in QUESTIONS.items():
        table, by_kind = tables.differences(found, measure, plan.core)
        counted = "; ".join(
            f"{kind}: "
            + ", ".join(f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts)
            for kind, verdicts in by_kind.items()
        )
        text = f"{question} OAPL's against those of all methods, its variants too: {counted}."
        yield f"### {measure}\n\n{textwrap.fill(text, 110)}\n\n{table}"


def robustness(surfaces: Iterable[tuple[Table, Mapping]]) -> Iterable[str]:
    by_lag = {t.title: cells for t, cells in surfaces if math.isfinite(t.lag)}
    if by_lag:
        good, kept = tables.limits(by_lag)
        yield (
            f"The largest learning rate whose mean pass@1 is within {tables.CLOSE} of the method's "
            f"best at that lag:\n\n{good}"
        )
        yield f"The largest one up to which no run was lost:\n\n{kept}"
    for table, cells in surfaces:
        seeds = len(next(iter(next(iter(cells.values())).values())).lines)
        yield (
            f"### {table.title}\n\n{table.num_steps} steps, {seeds} seeds: smallest and largest "
            f"pass@1; lost runs; drift.\n\n{tables.of_surface(table, cells)}"
        )
