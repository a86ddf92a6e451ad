"""Bytes that collectives move, by kind and mesh axis, read from the compiled program."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from oapl_jax.errors import RunError
from oapl_jax.planning.hlo import Computation, Instruction
from oapl_jax.planning.module import Module

# Bytes that a chip takes in over its links, for a payload and a group of n chips. The payload is
# the whole array: what an all-gather or an all-reduce gives, what a reduce-scatter gets.
RECEIVED = {
    "all-gather": lambda payload, n: payload * (n - 1) / n,
    "reduce-scatter": lambda payload, n: payload * (n - 1) / n,
    "all-reduce": lambda payload, n: 2 * payload * (n - 1) / n,
    "all-to-all": lambda payload, n: payload * (n - 1) / n,
    "collective-permute": lambda payload, n: payload,
}
ORDER = r"\[([0-9,]+)\](?:T\(([0-9,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: a key of RECEIVED.
      axes: the mesh axes over which its groups reach.
      payload: bytes of the whole array.
      received: bytes that each chip takes in, one time.
      times: executions in one run of the program.
      path: where the program asked for it.
    """

    kind: str
    axes: tuple[str, ...]
    payload: int
    received: float
    times: int
    path: str


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """Every collective that runs, each counted once however many steps it is cut into.

    Raises:
      RunError: for a group of devices that is no part of the mesh, or one that can't be read.
    """
    found = []
    for computation in module.computations.values():
        times = module.executions(computation.name)
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in RECEIVED or not times or _goes_on(computation, instruction):
                continue
            payload = max(_bytes(instruction), _operand_bytes(computation, instruction))
            if kind == "all-reduce" and _scatters(computation, instruction):
                kind = "reduce-scatter"
            if kind == "collective-permute":
                axes, chips = permuted_axes(instruction, mesh.shape), 2
            else:
                group = device_group(instruction, mesh.devices.size)
                axes, chips = axes_of(group, mesh.shape), len(group)
            received = RECEIVED[kind](payload, chips)
            path = re.search(r'op_name="([^"]*)"', instruction.rest)
            found.append(
                Collective(kind, axes, payload, received, times, path.group(1) if path else "")
            )
    return found


def by_kind_and_axis(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """kind -> axes ("fsdp", "data+fsdp") -> bytes that a chip receives in one run."""
    table: dict[str, dict[str, float]] = {}
    for c in found:
        if not c.axes:
            continue  # groups of one
        row = table.setdefault(c.kind, {})
        axes = "+".join(c.axes)
        row[axes] = row.get(axes, 0.0) + c.received * c.times
    return table


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
    """Whether this is a later step of a collective that another computation started.

    The TPU compiler cuts an asynchronous collective into steps, each fused with a piece of the
    arithmetic that it hides behind, and prints the collective in each of them.
    """
    if "chain_id=" not in instruction.rest:
        return False
    starts = 'custom_call_target="AsyncCollectiveStart"'
    return not any(starts in other.rest for other in computation.instructions.values())


def _scatters(computation: Computation, instruction: Instruction) -> bool:
    """Whether each chip keeps only its part of the sum: how the TPU compiler writes a
    reduce-scatter."""
    users = computation.users(instruction.name)
    while users and all(u.opcode in ("get-tuple-element", "bitcast") for u in users):
        users = [user for u in users for user in computation.users(u.name)]
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def _bytes(instruction: Instruction) -> int:
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start"):  # operands, results, and flags
        arrays = tuple(a for a in arrays if a.shape)
        return max((a.bytes for a in arrays), default=0)
    return sum(a.bytes for a in arrays)


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    operands = [computation.instructions[name] for name in instruction.operands]
    return sum(a.bytes for operand in operands for a in operand.arrays)


def permuted_axes(instruction: Instruction, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective-permute sends anything."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs"))
    crossed = {axis for pair in pairs for axis in axes_of([int(place) for place in pair], shape)}
    return tuple(axis for axis in shape if axis in crossed)


def device_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Places in the mesh of the first group that takes part, in any of the printed forms.

    Raises:
      RunError: for a form that is not known.
    """
    text = instruction.rest.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([0-9,]*)\}", text)
    if listed:
        return tuple(int(place) for place in listed.group(1).split(","))
    iota = re.match(r"\[(\d+),(\d+)\]<=" + ORDER, text)
    if iota:
        places = _ordered(devices, *iota.groups()[2:])
        return tuple(places.reshape(int(iota.group(1)), -1)[0].tolist())
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(" + ORDER + r"\))?\s*\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        shape = [int(size) for size in sizes.values()]
        over = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named.group(4))]
        if ":(" not in named.group(4) and math.prod(shape) == devices:
            places = _ordered(devices, named.group(2) or str(devices), named.group(3))
            others = [axis for axis in range(len(shape)) if axis not in over]
            places = places.reshape(shape).transpose([*others, *over])
            return tuple(places.reshape(-1, math.prod(shape[axis] for axis in over))[0].tolist())
    if instruction.attribute("replica_groups") in ("{}", ""):
        return tuple(range(devices))
    raise RunError(f"the devices of {instruction.name} can't be read from {text[:80]!r}")


def _ordered(devices: int, sizes: str, order: str | None) -> np.ndarray:
    """All places in a row, as "2,4" and "1,0" of the form `[2,4]T(1,0)` order them."""
    places = np.arange(devices).reshape([int(size) for size in sizes.split(",")])
    return places.transpose([int(axis) for axis in order.split(",")] if order else None).reshape(-1)


def axes_of(group: Sequence[int], shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the places of a group differ."""
    coordinates = np.stack(np.unravel_index(np.asarray(group), tuple(shape.values())), axis=-1)
    differs = (coordinates != coordinates[0]).any(axis=0)
    return tuple(itertools.compress(shape, differs))
