"""Model card of a published version: README.md with lineage, metrics and settings."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import oapl_jax
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig

SHOWN = ("reward", "lag/mean", "kl", "entropy", "length", "truncated", "loss")
# Addresses and files of this installation, which a card that may become public leaves out.
PRIVATE = ("servers", "servers_file", "router", "api_key_file")

WHOLE = "in {dtype}. `transformers` and SGLang load this directory as a checkpoint"
ADAPTERS = "of LoRA adapters alone: `peft` and SGLang load this directory over the initial policy"

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [oapl_jax, reinforcement-learning, off-policy]
---

# {task}, {objective}, step {version}

A {model_type} of {parameters:,} parameters after {version} gradient steps of off-policy
reinforcement learning, {form}.

| lineage | |
|---|---|
| objective | {objective}, denominator {denominator} |
| lag | {lag} |
| initial policy | {initial} |
| task | {task} |
| seed | {seed} |
| Orbax step | {parent} |
| SHA-256 of the configuration | {config_hash} |
| by | oapl_jax {release} |

## Metrics

{metrics}

## Settings

```json
{settings}
```
"""


def model_card(
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    model: ModelConfig,
    *,
    version: int,
    parent: str,
    config_hash: str,
    dtype: str,
    adapters: bool = False,
) -> str:
    """Markdown with the front matter of the Hugging Face Hub.

    Args:
      config: of the run, as saved in its workdir.
      lines: of its metrics.jsonl.
      model: sizes of the published decoder.
      version: gradient steps taken.
      parent: the Orbax step that is published, from the workdir.
      adapters: True for a version that has LoRA adapters and no other weights.
    """
    metrics = latest(lines, version).items()
    rows = [f"| {name} | {value:.4g} | {step} |" for name, (step, value) in metrics]
    table = ["| metric | value | after step |", "|---|---|---|", *rows]
    section = lambda name: config.get(name) or {}
    return CARD.format(
        version=version,
        parent=parent,
        config_hash=config_hash,
        library="peft" if adapters else "transformers",
        form=ADAPTERS if adapters else WHOLE.format(dtype=dtype),
        model_type=model.model_type,
        parameters=hf.parameter_count(model),
        release=oapl_jax.__version__,
        task=section("data").get("task", "?"),
        objective=section("objective").get("name", "?"),
        denominator=section("objective").get("denominator", "?"),
        lag=f"{section('lag').get('mode', '?')} {section('lag').get('steps', '?')}",
        initial=os.path.basename(section("model").get("path", "")) or "a fresh model",
        seed=config.get("seed", "?"),
        metrics="\n".join(table) if rows else "None: no step has been taken.",
        settings=json.dumps(public(config), indent=1, sort_keys=True),
    )


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without addresses of servers and places of keys; of a path the last part."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found[name] = public(value)
        elif name not in PRIVATE:
            path = isinstance(value, str) and value.startswith(("/", "~"))
            found[name] = os.path.basename(value) if path else value
    return found


def latest(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, tuple[int, float]]:
    """Metrics of a card: those of the last line up to `step`, and the last evaluation up to it."""
    found: dict[str, tuple[int, float]] = {}
    for line in lines:
        if line["step"] > step:
            break
        evaluated = {name for name in line if name.startswith("eval/")}
        if evaluated:
            found = {n: v for n, v in found.items() if not n.startswith("eval/")}
        for name in (*SHOWN, *sorted(evaluated)):
            if isinstance(line.get(name), int | float):
                found[name] = (line["step"], line[name])
    return found
