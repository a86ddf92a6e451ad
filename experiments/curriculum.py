"""Curricula on a bank of prompts of which nine tenths are useless.

Claim: actor-curator reaches the final pass@1 of uniform sampling in at most half its steps. What
    knows a prompt only by its past groups (window, learnability) does not help here, where a run
    meets few prompts twice.
Command: python experiments/curriculum.py --to=runs/curriculum
Hardware: 2 CPU cores.
Hours: 0.4 for 4 curricula and 3 seeds.
Expected: at most 0.5 of the steps of uniform, for each seed.
Measured: see below.

The bank is made: 2,000 sums of four digits, as in the default job, of which the warmed-up policy
solves a quarter; 9,000 sums of one number and zeros, which it always solves, since who takes a
minus for a plus there is right all the same; and 9,000 sums of seven or eight digits, which it
can't solve, since their running totals need more tokens than a response may have. Which is which
can be read off a prompt, and nothing else tells a curator. A step is 16 groups of 8 with GRPO, four
steps a version; groups with equal rewards are kept, so that steps count responses. pass@1 is that
of sums of four digits that are not in the bank.

Tuning was done on the validation split with other seeds (100, 101): the learning rate as the best
of four for uniform, then the curator's own and its passes (--split=validation --seeds 100 101).
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath

from configs import arithmetic
from oapl_jax import publisher, train
from oapl_jax.begin import begin
from oapl_jax.data.records import Joined, Record, user
from oapl_jax.data.tasks import TASKS, content_id
from oapl_jax.job import open_job
from oapl_jax.metrics import read_lines
from oapl_jax.report.progress import StopRequest, say

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OTHERS = ("actor_curator", "window", "learnability")  # to be compared with uniform
BANK = dict(useful=2000, solved=9000, impossible=9000)
WARMED_UP_ON = 8000  # useful ones, of which the bank has the first


def sums(terms: Iterable[Sequence[str]]) -> list[Record]:
    """Problems of chain_sum."""
    task, found = TASKS["chain_sum"], []
    for parts in terms:
        metadata = {"terms": list(parts)}
        question, answer = task.question(metadata), task.answer(metadata)
        name = content_id("chain_sum", metadata)
        found.append(Record(name, user(question), answer, "chain_sum", metadata))
    return found


def solved() -> list[Record]:
    """A number and up to three zeros, "37-0+0="."""
    return sums(
        [str(first), *itertools.chain(*((sign, "0") for sign in signs))]
        for zeros in (1, 2, 3)
        for signs in itertools.product("+-", repeat=zeros)
        for first in range(100)
    )


def impossible() -> list[Record]:
    """Seven or eight digits from 7 to 9, "7+9+8+9+7+7+8=": a response has room for four totals, and
    none of the first four is as large as an answer."""
    return sums(
        list("+".join(digits)) for n in (7, 8) for digits in itertools.product("789", repeat=n)
    )


def repeated(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records; no problem comes twice before each has come once."""
    order = np.random.default_rng(0).permutation(len(records))
    return [records[int(i)] for i in np.resize(order, count)]


def get_config(name: str, seed: int) -> Any:
    config: Any = arithmetic.get_config("task=chain_sum,objective=grpo").unlock()
    config.seed, config.num_steps = seed, 60
    config.group_size, config.groups_per_step = 8, 16
    config.data.update(train_size=WARMED_UP_ON, max_prompt_tokens=16)
    config.warmup.demonstrations = WARMED_UP_ON + len(solved())
    config.rollout.update(
        max_response_tokens=12, temperature=0.7, prompts_per_call=16, max_sequences=128
    )
    config.buffer.update(zero_variance="keep", capacity=64)
    config.lag.steps = 4
    config.optim.learning_rate = 5e-4
    config.evaluation.update(every=2, n=8, ks=(1,))
    config.checkpoint.every = config.num_steps
    config.tensorboard = False
    config.curriculum.name = name
    config.curriculum.curator.update(dormant=0, warmup=2, passes=4)
    return config


def start(to: epath.Path, config: Any) -> epath.Path:
    """The policy that all curricula of a seed start from, warmed up on what can be demonstrated."""
    version = publisher.version_path(to / "versions", 0)
    if not (version / publisher.MANIFEST).exists():
        job = open_job(config, to)
        splits = {**job.splits, "train": Joined([job.splits["train"], solved()])}
        job = dataclasses.replace(job, splits=splits)
        state, _ = begin(job)
        job.publish(0, state.params)
        job.close()
    return version


def run(to: epath.Path, config: Any, policy: epath.Path, split: str) -> list[dict[str, Any]]:
    """Trains on the bank, and returns the lines of its metrics."""
    config.model.path, config.warmup.num_steps = str(policy), 0
    if not (to / "result.json").exists():
        job = open_job(config.lock(), to)
        useful = job.splits["train"]
        bank = [useful[i] for i in range(BANK["useful"])]
        bank += repeated(solved(), BANK["solved"]) + repeated(impossible(), BANK["impossible"])
        splits = {**job.splits, "train": bank, "validation": job.splits[split]}
        result = train.run_job(dataclasses.replace(job, splits=splits), StopRequest())
        if result is None:
            raise SystemExit("stopped; the same command goes on")
        (to / "result.json").write_text(json.dumps(result))
    return read_lines(to / "metrics.jsonl")


def curve(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["eval/pass@1"]) for line in lines if "eval/pass@1" in line]


def steps_to(target: float, points: Sequence[tuple[int, float]]) -> int | None:
    """The first step whose evaluation, and the one after it, are at the target; None if none is."""
    for (step, value), (_, after) in itertools.pairwise(points):
        if min(value, after) >= target:
            return step
    return None


def compare(
    to: epath.Path, seeds: Sequence[int], split: str, others: Sequence[str], **changes: Any
) -> dict[str, Any]:
    """Runs uniform sampling and the other curricula with every seed.

    Args:
      to: directory of all runs; those that are there already are not run again.
      seeds: of the runs.
      split: that pass@1 is of.
      others: names of curricula.
      changes: of the configuration, by path.

    Returns:
      For each seed and curriculum its curve, the steps that it takes to the final pass@1 of
      uniform, these as a share of all, and the share of its groups whose rewards are not equal.
    """
    found: dict[str, Any] = {}
    for seed in seeds:
        config = get_config("uniform", seed)
        config.update_from_flattened_dict(changes)
        policy = start(to / f"start-{seed}", config)
        of_seed: dict[str, Any] = {}
        for name in ("uniform", *others):
            config = get_config(name, seed)
            config.update_from_flattened_dict(changes)
            lines = run(to / f"{name}-{seed}", config, policy, split)
            points = curve(lines)
            final = points[-1][1]
            steps = steps_to(of_seed["uniform"]["final"] if of_seed else final, points)
            of_seed[name] = {
                "curve": points,
                "final": final,
                "steps": steps,
                "share": steps and steps / config.num_steps,
                "useful": 1 - float(np.mean([line["zero_variance"] for line in lines])),
            }
            say(f"seed {seed}, {name}: {json.dumps({**of_seed[name], 'curve': len(points)})}")
        found[str(seed)] = of_seed
    return found


def draw(found: dict[str, Any], path: epath.Path) -> None:
    """The curves: a thin line a seed, a thick one for their mean."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for index, name in enumerate(next(iter(found.values()))):
        curves = np.array([of_seed[name]["curve"] for of_seed in found.values()])
        color = f"C{index}"
        axis.plot(curves[..., 0].T, curves[..., 1].T, color=color, alpha=0.3, linewidth=1)
        axis.plot(curves[0, :, 0], curves[..., 1].mean(0), color=color, linewidth=2, label=name)
    axis.set(xlabel="gradient step", ylabel="pass@1 of sums of four digits")
    axis.set_title("A bank of which nine tenths are useless")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=epath.Path, default=epath.Path("runs/curriculum"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--others", choices=OTHERS, nargs="+", default=list(OTHERS))
    arguments = parser.parse_args()
    to = arguments.to / arguments.split
    to.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(to / "compiled"))
    found = compare(to, arguments.seeds, arguments.split, arguments.others)
    (to / "curriculum.json").write_text(json.dumps(found, indent=1))
    draw(found, to / "curriculum.png")
    say(f"{to / 'curriculum.json'}, {to / 'curriculum.png'}")


if __name__ == "__main__":
    main()
