"""Points at the scale of arXiv 2602.19362, and what they cost by `oapl_jax.plan`.

The hours are a lower bound: docs/plan_table.json has the roofline of a step whose responses all
have their greatest length. The fleet has to generate as fast as the learner takes; how many servers
that needs was not measured, and it is not in the cost. `--topology` and `--price` of
`experiments.launch` and `experiments.readme` give another slice, and today's price of its chips.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from experiments.sweep import Add, Point, Values, point
from oapl_jax.errors import UserError

SHARE = "/mnt/oapl"
BENCHMARKS = ("aime25", "hmmt25_feb", "hmmt25_nov", "brumo25")
STEPS = tuple(range(100, 1001, 100))  # whose checkpoints are graded
SEEDS = 1  # the paper's runs have one
MATHS: Values = {
    "releases": f"{SHARE}/releases",
    "model.path": f"{SHARE}/models/Qwen3-4B-Thinking-2507",
    "fleet.servers_file": f"{SHARE}/servers.txt",
    "checkpoint.keep": 20,  # for pass@k against steps
}
CODE: Values = {"releases": f"{SHARE}/releases", "fleet.servers_file": f"{SHARE}/servers.txt"}
TOPOLOGY = "v5e:8x8"
# Dollars a chip and hour, on demand. Those of other chips have to be given.
PRICES = {"v5e": 1.20, "v5p": 4.20}
PRICE_SOURCE = (
    "list prices as of February 2025, from cloud.google.com/tpu/pricing as quoted in 'How to Scale "
    "Your Model', part 8, 'Serving LLaMA 3 on TPUs' (jax-ml.github.io/scaling-book)"
)
PLANNED = {
    "competition_math": "qwen3-4b-thinking-2507",
    "code_contests": "r1-distill-qwen-14b",
}
TABLE = Path(__file__).parent.parent / "docs/plan_table.json"


def runs(
    *grids: Any, seeds: int = SEEDS, samples: int = 10, at_steps: Sequence[int] = ()
) -> list[Point]:
    """Maths runs, graded on the paper's benchmarks."""
    rows = Add.product(*grids, Add.seeds(seeds))
    grading: dict[str, Any] = dict(benchmarks=BENCHMARKS, samples=samples, at_steps=at_steps)
    return [
        without_defaults(point("competition_math", {**MATHS, **row}, **grading)) for row in rows
    ]


def without_defaults(run: Point) -> Point:
    """Drops overrides that change nothing, so that figures share the default's run."""
    default = dataclasses.replace(run, overrides=()).flat_config
    changes = tuple((key, value) for key, value in run.overrides if default.get(key) != value)
    return dataclasses.replace(run, overrides=changes)


def base(samples: int = 10) -> Point:
    """The base model, imported by a run without a step."""
    values = {**MATHS, "objective": "oapl", "num_steps": 0, "rollout.sampler": "local"}
    return point("competition_math", values, benchmarks=BENCHMARKS, samples=samples)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the training of all points, one after the other, on one slice."""

    topology: str
    points: int
    hours: float
    dollars: float
    fleet: float  # generated tokens/s that keep the learner busy

    def __str__(self) -> str:
        fleet = f", a fleet of {self.fleet:,.0f} generated tokens/s" if self.fleet else ""
        return (
            f"{self.points} points, {self.topology}{fleet}: at least {self.hours:.1f} h, "
            f"${self.dollars:,.0f}"
        )


def cost(points: Iterable[Point], topology: str = TOPOLOGY, price: float | None = None) -> Cost:
    """Cost by the plan's table.

    Raises a UserError for a slice that the table does not have, or a chip without a price.
    """
    table = json.loads(TABLE.read_text())
    generation, _, shape = topology.partition(":")
    if price is None and generation not in PRICES:
        raise UserError(
            f"--topology={topology} has no list price here; give --price, of a chip-hour"
        )
    seconds, fleet, count = 0.0, 0.0, 0
    for trained in {each.trained for each in points if each.kind == "train"}:
        module = trained.config.partition(":")[0]
        line = table.get(f"{module} {PLANNED[module]} {topology}", {})
        if not line.get("fits"):
            raise UserError(f"--topology={topology} does not fit {module}; see docs/plan.md")
        num_steps = trained.resolve(epath.Path("/")).num_steps
        seconds += num_steps * line["roofline"]["seconds"] / line["fleet"]["learning"]
        fleet = max(fleet, line["fleet"]["tokens_per_second"])
        count += 1
    chips = math.prod(map(int, shape.split("x")))
    hourly = chips * (PRICES[generation] if price is None else price)
    return Cost(topology, count, seconds / 3600, seconds / 3600 * hourly, fleet)


def costs(points: Iterable[Point], topology: str, price: float | None) -> list[Cost]:
    """Costs of the points at the paper's scale, a configuration each."""
    of: dict[str, list[Point]] = {}
    for each in points:
        of.setdefault(each.config.partition(":")[0], []).append(each)
    return [cost(of[module], topology, price) for module in of if module in PLANNED]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default=TOPOLOGY, help="slice whose hours and cost are shown")
    parser.add_argument("--price", type=float, help="dollars a chip-hour, for its list price")
