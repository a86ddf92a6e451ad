"""FLOPs of a gradient step: what its mathematics needs by formula, and what the program does.

Both count two for each multiplication of a matrix product and nothing else. A program is counted as
it is traced, whole loops; products below "rematted_computation" are those that remat adds.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Var

from oapl_jax.errors import RunError
from oapl_jax.model.config import ModelConfig

REMAT = "rematted_computation"
# Of the blocks of a causal row's attention, those that the kernel does not skip.
CAUSAL = 0.5
# A loop whose bound is data says its most turns in the name of its scope.
AT_MOST = re.compile(r"at_most_(\d+)\)*$")


def forward_flops(config: ModelConfig, tokens: int, context: float, head_tokens: int) -> float:
    """Of a forward pass over `tokens` that see `context` keys on average, with logits for
    `head_tokens` of them."""
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + keys + 3 * config.intermediate_size)
    attention = 2 * heads * context
    head = config.hidden_size * config.vocab_size
    return 2.0 * (config.num_layers * (layer + attention) * tokens + head * head_tokens)


def step_flops(config: ModelConfig, sequences: int, prompt: int, response: int) -> float:
    """Of a gradient step on `sequences` of these lengths: a backward pass is twice a forward."""
    length = prompt + response
    return 3 * forward_flops(config, sequences * length, length / 2, sequences * response)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs over all chips: of everything, and of what is computed again for the backward pass."""

    total: float
    remat: float


def traced_work(traced: Any) -> Work:
    """The matrix products of a jax.stages.Traced.

    Raises:
      RunError: for products in a loop that ends when it will, as attention on a CPU has.
    """
    total, remat = 0.0, 0.0
    for flops, again in _products(traced.jaxpr.jaxpr, 1.0, False):
        total += flops
        remat += flops if again else 0.0
    return Work(total, remat)


def _products(jaxpr: Any, times: float, again: bool) -> Iterator[tuple[float, bool]]:
    for equation in _live(jaxpr):
        name, params = equation.primitive.name, equation.params
        here = again or REMAT in str(equation.source_info.name_stack)
        if name == "dot_general":
            yield times * _product(equation), here
            continue
        inside = times
        if name == "scan":
            inside *= params["length"]
        elif name == "shard_map":
            inside *= math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            inside *= math.prod(params["grid_mapping"].grid) * CAUSAL
        elif name == "while" and (most := AT_MOST.search(str(equation.source_info.name_stack))):
            inside *= int(most.group(1))
        elif name == "while" and any(_products(params["body_jaxpr"].jaxpr, 1.0, False)):
            raise RunError(
                "the program has a loop with matrix products whose number of turns is not known "
                f"before it runs, at {equation.source_info.name_stack}; its FLOPs can't be counted"
            )
        if name == "cond":
            branches = [list(_products(b.jaxpr, inside, here)) for b in params["branches"]]
            yield from max(branches, key=lambda found: sum(flops for flops, _ in found))
            continue
        for value in params.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    yield from _products(body, inside, here)


def _live(jaxpr: Any) -> list[Any]:
    """The equations without those that nothing takes a result of, which the compiler leaves out.

    Remat traces a layer again and takes of it what a gradient needs. (The rule of JAX's own
    dce_jaxpr keeps a kernel of which nothing is taken.)
    """
    used, live = {v for v in jaxpr.outvars if isinstance(v, Var)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            live.append(equation)
            used.update(v for v in equation.invars if isinstance(v, Var))
    return live


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
