"""Writes the generated parts of the documentation: the reference of settings, the picture of lag.

python docs/generate.py
"""

import inspect
from pathlib import Path

from configs import arithmetic
from oapl_jax.config import flatten, sections, settings_of
from oapl_jax.objectives import FAMILY, OBJECTIVES, constants
from oapl_jax.weights.lag import LagPolicy

HERE = Path(__file__).parent
INTRODUCTION = """\
# Settings

Each setting has its value in the file that `--config` names, and can be overridden by
`--config.NAME=VALUE`. A misspelt name, a wrong type or a value outside its range ends the command
with code 2 and one sentence. `--dry-run` prints the value of every setting and its origin
(docs/quickstart.md).

Generated from the typed sections of `oapl_jax/config.py`. The column "default" has the value in
`configs/arithmetic.py`.

    python docs/generate.py
"""
CONSTANTS = """\
## Constants of the objectives

A section has the constants of one objective, `objective.policy_gradient` those of GRPO and its
relatives, and `objective` those of OAPL. docs/methods.md has the equations, `configs/objectives.py`
the values with their sources.
"""


def config_reference() -> str:
    """The page docs/config.md."""
    values = flatten(arithmetic.get_config().to_dict())
    lines, seen = [INTRODUCTION], ""
    for path, section in sections():
        if settings := settings_of(section, path):
            title = f"`{path}`" if path else "The whole run"
            if path == seen and path:
                title += f", {section.__name__}"
            seen = path
            doc = inspect.cleandoc(section.__doc__ or "").replace("\n", " ")
            lines += [
                f"## {title}\n",
                f"{doc}\n",
                "| setting | type | values | default | |",
                "|---|---|---|---|---|",
            ]
        for name, kind, allowed, doc in settings:
            default = shown(values[name]) if name in values else ""
            lines.append(f"| `{name}` | {kind} | {cell(allowed)} | {default} | {cell(doc)} |")
        lines += [""] if settings else []
    lines += [CONSTANTS, "| setting | values | default | objectives |", "|---|---|---|---|"]
    for name, (allowed, users) in sorted(constant_rows().items()):
        default = shown(values[name]) if name in values else ""
        lines.append(f"| `{name}` | {cell(allowed)} | {default} | {', '.join(users)} |")
    return "\n".join(lines) + "\n"


def constant_rows() -> dict[str, tuple[str, list[str]]]:
    """Full name of a constant -> its values, and the objectives that read it."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for name, objective in OBJECTIVES.items():
        for function in (objective.advantage, objective.loss):
            for constant, annotation in constants(function).items():
                if constant == "group_size":
                    continue
                places = [name] if place_of(name, constant) else [objective.shared]
                full = ".".join(filter(None, ("objective", *places, constant)))
                allowed = getattr(annotation, "__metadata__", ("",))[0]
                text = str(allowed).removesuffix(", in float32 too")
                users = rows.setdefault(full, (text, []))[1]
                users += [name] if name not in users else []
    return rows


def place_of(name: str, constant: str) -> bool:
    """True if the default has the constant in the objective's own section."""
    section = arithmetic.get_config().objective.get(name)
    return section is not None and name != FAMILY and constant in section


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown(value: object) -> str:
    text = str(value)
    return f"`{text}`".replace("|", "\\|") if text and len(text) < 40 else ""


def draw_lag(path: Path) -> None:
    """Which version samples the rollouts of each gradient step, for the three lag policies."""
    from matplotlib.figure import Figure

    steps = range(64)
    policies = {
        "window, 16 (the paper)": LagPolicy("window", 16, seed=0),
        "fixed, 16": LagPolicy("fixed", 16, seed=0),
        "uniform, 16": LagPolicy("uniform", 16, seed=0),
    }
    figure = Figure(figsize=(11, 4.2))
    versions, lags = figure.subplots(1, 2)
    versions.plot(steps, steps, color="0.75", label="learner")
    for index, (name, policy) in enumerate(policies.items()):
        served = [policy.serves(step) for step in steps]
        style = dict(where="post", color=f"C{index}", linewidth=1.5 if index < 2 else 0.8)
        versions.step(steps, served, label=name, **style)
        lags.step(
            steps, [step - v for step, v in zip(steps, served, strict=True)], label=name, **style
        )
    versions.set(title="Version that samples", xlabel="gradient step", ylabel="published at step")
    lags.set(title="Lag of the rollouts", xlabel="gradient step", ylabel="gradient steps")
    for axis in (versions, lags):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    (HERE / "config.md").write_text(config_reference())
    draw_lag(HERE / "lag.png")


if __name__ == "__main__":
    main()
