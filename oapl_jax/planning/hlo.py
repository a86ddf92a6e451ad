"""Reader of compiled HLO text: executions through loops, collectives by mesh axis, memory traffic.

`cost_analysis()` counts the body of a loop once. Here a computation runs as often as its callers,
times the trip count of a loop. The text has no stable grammar: a form that this module does not
know raises a RunError that names it, so that another libtpu can't change a figure silently.
"""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from oapl_jax.errors import RunError

HBM, HOST = 0, 5
MEMORY_SPACES = range(9)  # 1 is VMEM, 2 sync flags, 6 SMEM, 7 and 8 belong to sparse cores
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
INSTRUCTION = re.compile(r"  (ROOT )?%(\S+) = (.+?) ([a-z][a-z-]*)\(([^()]*)\)(?:, (.*))?")
ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
DTYPE = re.compile(r"(?:[su]|f)(\d+)(?:e\d+m\d+\w*)?")
# Minor-to-major order, then tiles T, element size E, memory space S and others.
LAYOUT = re.compile(r"\{[0-9,]*(?::(?:(?:SC|[DTLESM#*])?\([^()]*\))*)?\}")
REFERENCE = re.compile(r"\b([\w-]+)=\{?((?:%[^\s,{}()]+(?:, *(?=%))?)+)")
BLOCK_END = re.compile(r'\}(, execution_thread="[^"]*")?')  # v5p runs some on sparse cores
# Attributes that name a computation which an instruction runs.
CALLS = frozenset(
    (
        *("calls", "to_apply", "body", "condition", "true_computation", "false_computation"),
        *("branch_computations", "called_computations", "select", "scatter"),
    )
)
# Callers whose callee's instructions run one by one; a fusion's do not.
CONTROL = ("while", "conditional", "call", "async-start")
# A scope named at_most_N bounds the trips of a loop whose end depends on data; on one chip the
# scope may be jvp(at_most_7).
AT_MOST = re.compile(r'at_most_(\d+)\)*/while"')
MOST_TRIPS = 2**20
# An integer, the elements of a tuple by index, or None if it is not known before the program runs.
Value = int | Callable[[int], Any] | None
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
} | {"add": operator.add, "subtract": operator.sub}
# Instructions that move no bytes: names for what others make, or loops counted by their bodies.
FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "while"),
        *("conditional", "call", "after-all", "add-dependency", "optimization-barrier"),
        *("opt-barrier", "partition-id", "replica-id", "rng-get-and-update-state", "domain"),
        *("copy-done", "slice-done", "dynamic-slice-done", "dynamic-update-slice-done"),
        *("all-gather-done", "all-reduce-done", "collective-permute-done"),
        *("async-done", "async-update"),
    )
)
SLICING = ("dynamic-slice", "slice", "gather")
# From one memory to another, asynchronously.
TRANSFERS = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
# Bytes that a chip receives over its links, for a payload (the whole array: an all-gather's result,
# a reduce-scatter's operand) and a group of n chips.
RECEIVED = {
    "all-gather": lambda payload, n: payload * (n - 1) / n,
    "reduce-scatter": lambda payload, n: payload * (n - 1) / n,
    "all-reduce": lambda payload, n: 2 * payload * (n - 1) / n,
    "all-to-all": lambda payload, n: payload * (n - 1) / n,
    "collective-permute": lambda payload, n: payload,
}
# Instructions that read their operands and write their results.
COMPUTING = frozenset(
    re.findall(
        r"\S+",
        """
    abs acos acosh add and asin asinh atan2 atanh bitcast-convert broadcast cbrt ceil cholesky clamp
    compare complex concatenate convert convolution cosine cosh count-leading-zeros custom-call
    divide dot dynamic-update-slice erf exponential exponential-minus-one fft floor fusion
    get-dimension-size imag is-finite log log-plus-one logistic map maximum minimum multiply negate
    not or pad popcnt power real reduce reduce-precision reduce-window remainder reshape reverse rng
    rng-bit-generator round-nearest-afz round-nearest-even rsqrt scatter select select-and-scatter
    set-dimension-size shift-left shift-right-arithmetic shift-right-logical sign sine sinh sort
    sqrt stochastic-convert subtract tan tanh topk transpose triangular-solve xor copy async
    """,
    )
)
KNOWN = FREE | COMPUTING | RECEIVED.keys() | set(SLICING)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result, in memory space 0 (HBM), 5 (the host's memory) or on the chip."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Size without the padding of its layout."""
        width = DTYPE.fullmatch(self.dtype)
        if not width and self.dtype not in BITS:
            raise RunError(f"the compiled program has an array of unknown type {self.dtype!r}")
        bits = int(width.group(1)) if width else BITS[self.dtype]
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    name: str
    opcode: str
    shape: str  # of the result, as printed
    literal: str  # between the parentheses: operands, a constant's value, a parameter's number
    rest: str  # attributes
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.literal)

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the result, in order.

        Raises:
          RunError: for a layout or a memory space that is not known.
        """
        found = []
        for dtype, sizes, layout in ARRAY.findall(self.shape):
            printed = re.search(r"S\((\d+)\)", layout)
            space = int(printed.group(1)) if printed else HBM
            if (layout and not LAYOUT.fullmatch(layout)) or space not in MEMORY_SPACES:
                raise RunError(f"the layout {layout} of instruction {self.name} is not known")
            if dtype != "token":
                shape = tuple(int(size) for size in sizes.split(",") if size)
                found.append(Array(dtype, shape, space))
        return tuple(found)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if array.space == HBM)

    @functools.cached_property
    def references(self) -> list[tuple[str, str]]:
        """(attribute, name) of each instruction or computation that an attribute names."""
        return [
            (attribute, name.strip(" %"))
            for attribute, names in REFERENCE.findall(self.rest)
            for name in names.split(",")
        ]

    def callee(self, attribute: str) -> str:
        for found, name in self.references:
            if found == attribute:
                return name
        raise RunError(f"{self.opcode} {self.name} of the compiled program has no {attribute}")

    def attribute(self, name: str) -> str:
        """The word that follows `name=`, "" if there is none."""
        found = re.search(rf"\b{name}=(\w+)", self.rest)
        return found.group(1) if found else ""

    @property
    def element(self) -> int | None:
        """The index of a get-tuple-element."""
        return int(self.attribute("index")) if self.opcode == "get-tuple-element" else None


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in set(instruction.operands) & users.keys():
                users[name].append(instruction)
        return users

    def users(self, instruction: Instruction) -> list[Instruction]:
        return self._users[instruction.name]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def parameter(self, number: int) -> Instruction:
        given = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(i for i in given if int(i.literal) == number)

    def source(self, instruction: Instruction) -> Instruction:
        """The instruction that this one copies, followed through copies of copies."""
        copies = ("copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier")
        while instruction.opcode in copies:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


class Module:
    """A scheduled HLO module, read from `compiled.as_text()`.

    Raises:
      RunError: for an instruction or a reference to a computation in a form that is not known.
    """

    def __init__(self, text: str):
        self.header = text.partition("\n")[0]
        self.computations, self.entry = read_computations(text)
        self._calls: dict[str, list[tuple[Computation, Instruction, str]]] = {
            name: [] for name in self.computations
        }
        for computation in self.computations.values():
            here = computation.instructions
            for instruction in here.values():
                for attribute, name in instruction.references:
                    if attribute in CALLS and name in self._calls:
                        self._calls[name].append((computation, instruction, attribute))
                    elif attribute in CALLS or name in self.computations.keys() - here.keys():
                        raise RunError(
                            f"{attribute}=%{name} of {instruction.name} in the compiled program is "
                            "not known"
                        )
        for name, calls in self._calls.items():
            if not calls and name != self.entry:
                raise RunError(f"no known instruction of the compiled program runs {name}")

    @functools.cache  # noqa: B019 (a module lives no longer than a plan)
    def executions(self, computation: str) -> int:
        """Times that a computation runs in one run of the program.

        Raises:
          RunError: if the trip count of a loop around it can't be read.
        """
        if computation == self.entry:
            return 1
        return sum(
            self.executions(caller.name)
            * (self.trip_count(caller, instruction) if attribute == "body" else 1)
            for caller, instruction, attribute in self._calls[computation]
        )

    def sequences(self) -> list[Computation]:
        """The entry, and all bodies and branches, whose instructions run one by one."""
        return [
            computation
            for name, computation in self.computations.items()
            if name == self.entry
            or any(instruction.opcode in CONTROL for _, instruction, _ in self._calls[name])
        ]

    @functools.cache  # noqa: B019
    def trip_count(self, caller: Computation, loop: Instruction) -> int:
        """Trips of a while loop: as printed, or by evaluating its condition and its counter.

        A loop whose end depends on data makes the most trips that its scope `at_most_n` allows.

        Raises:
          RunError: if neither can be read.
        """
        printed = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', loop.rest)
        if printed := printed or AT_MOST.search(loop.rest):
            return int(printed.group(1))
        condition = self.computations[loop.callee("condition")]
        body = self.computations[loop.callee("body")]
        start = self._value(caller, loop.operands[0], self._given(caller))
        constant = self._passed_through(loop, start)
        if callable(start) and callable(constant):
            read = [i.element for i in condition.instructions.values() if i.element is not None]
            values = {index: start(index) for index in read}
            given = lambda values: (
                lambda _: lambda index: values[index] if index in values else constant(index)
            )
            for trips in range(MOST_TRIPS):
                going = self._value(condition, condition.root.name, given(values))
                if going is None:
                    break
                if not going:
                    return trips
                after = self._value(body, body.root.name, given(values))
                values = {index: after(index) if callable(after) else None for index in read}
        raise RunError(f"the trip count of loop {loop.name} of the compiled program can't be read")

    def _value(self, where: Computation, name: str, given: Callable[[int], Value]) -> Value:
        """Evaluates an instruction.

        Args:
          where: its computation.
          name: of the instruction.
          given: number of a parameter -> its value.

        Returns:
          An integer, a function from an index to the element of a tuple, or None if not known.
        """
        instruction = where.source(where.instructions[name])
        of = lambda number: self._value(where, instruction.operands[number], given)
        match instruction.opcode:
            case "constant":
                is_integer = re.fullmatch(r"-?\d+", instruction.literal)
                return int(instruction.literal) if is_integer else None
            case "parameter":
                return given(int(instruction.literal))
            case "tuple":
                return of
            case "get-tuple-element":
                state = of(0)
                return state(instruction.element) if callable(state) else None
            case "fusion":
                inside = self.computations[instruction.callee("calls")]
                return self._value(inside, inside.root.name, of)
            case "while":
                return self._passed_through(instruction, of(0))
            case "add" | "subtract" | "compare":
                kind = instruction.attribute("direction") or instruction.opcode
                left, right = of(0), of(1)
                if isinstance(left, int) and isinstance(right, int) and kind in ARITHMETIC:
                    return ARITHMETIC[kind](left, right)
        return None

    def _given(self, computation: Computation) -> Callable[[int], Value]:
        """Values of the parameters of a computation: of a loop's body those that never change."""
        callers = [call for call in self._calls[computation.name] if call[1].opcode == "while"]
        if len(callers) != 1:
            return lambda _: None
        outside, loop, _ = callers[0]
        start = self._value(outside, loop.operands[0], self._given(outside))
        return lambda _: self._passed_through(loop, start)

    def _passed_through(self, loop: Instruction, start: Value) -> Value:
        """The elements of a loop's state that its body returns unchanged."""
        if not callable(start):
            return None
        return lambda index: start(index) if self._passes_through(loop, index) else None

    def _passes_through(self, loop: Instruction, index: int) -> bool:
        body = self.computations[loop.callee("body")]
        if body.root.opcode != "tuple":
            return False
        new = body.source(body.instructions[body.root.operands[index]])
        return new.element == index and body.instructions[new.operands[0]].opcode == "parameter"

    def made_by_loop(self, computation: Computation, name: str) -> tuple[str, int] | None:
        """The loop of this computation that wrote the array `name`, and its place in the loop's
        result; None if no loop did."""
        element = computation.source(computation.instructions[name])
        if element.element is None:
            return None
        loop = computation.source(computation.instructions[element.operands[0]])
        if loop.opcode != "while" or self._passes_through(loop, element.element):
            return None
        return loop.name, element.element


def read_computations(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry.

    Raises:
      RunError: for a line or an instruction in a form that is not known.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if name and BLOCK_END.fullmatch(line):
            instructions = [read_instruction(line) for line in lines]
            computations[name] = Computation(name, {i.name: i for i in instructions})
            if not any(i.root for i in instructions):
                raise RunError(f"computation {name} of the compiled program has no ROOT")
            name = ""
        elif name and line.startswith(("  %", "  ROOT %")):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # attributes of a kernel can span lines
        elif line.endswith("{") and line.startswith(("%", "ENTRY ")):
            name, lines = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0], []
            entry = name if line.startswith("ENTRY ") else entry
        elif name:
            raise RunError(f"the compiled program has a line of an unknown form: {line[:120]!r}")
    if not entry:
        raise RunError(f"the compiled program has no ENTRY; it begins with {text[:120]!r}")
    return computations, entry


def read_instruction(line: str) -> Instruction:
    """Reads `[ROOT] %name = shape opcode(operands), attributes`."""
    found = INSTRUCTION.fullmatch(line)
    if not found or re.sub("-(start|update|done)$", "", found.group(4)) not in KNOWN:
        raise RunError(f"the compiled program has an unknown instruction: {line[:120]!r}")
    root, name, shape, opcode, literal, rest = found.groups(default="")
    return Instruction(name, opcode, shape, literal, rest, bool(root))


# Collectives


def collective_bytes(module: Module, mesh: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that a chip receives in one run, over a mesh with these sizes of axes.

    Returns:
      kind -> mesh axes ("fsdp", "data+fsdp") -> bytes.

    Raises:
      RunError: for a group of devices, or a collective in steps, in a form that is not known.
    """
    table: dict[str, dict[str, float]] = {}
    counted, continued = set(), {}
    for computation in module.computations.values():
        times = module.executions(computation.name)
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in RECEIVED or not times:
                continue
            channel = instruction.attribute("channel_id")
            if _continues(computation, instruction):
                continued[channel] = instruction.name
                continue
            counted.add(channel)
            operands = sum(operand.bytes for operand in computation.operands(instruction))
            payload = max(_payload(instruction), operands)
            if kind == "all-reduce" and _scatters(computation, instruction):
                kind = "reduce-scatter"
            if kind == "collective-permute":
                axes, chips = permuted_axes(instruction, mesh), 2
            else:
                group = device_group(instruction, math.prod(mesh.values()))
                axes, chips = axes_of(group, mesh), len(group)
            if axes:  # else groups of one chip
                row = table.setdefault(kind, {})
                received = RECEIVED[kind](payload, chips) * times
                row["+".join(axes)] = row.get("+".join(axes), 0.0) + received
    for channel in continued.keys() - counted:
        raise RunError(f"the compiled program continues {continued[channel]} and never starts it")
    return table


def _continues(computation: Computation, instruction: Instruction) -> bool:
    """True for a later step of a collective that another computation starts.

    The TPU compiler cuts an asynchronous collective into steps, each fused with a piece of the
    arithmetic that hides it, and prints the collective in each of them.
    """
    if "chain_id=" not in instruction.rest:
        return False
    starts = 'custom_call_target="AsyncCollectiveStart"'
    return not any(starts in other.rest for other in computation.instructions.values())


def _scatters(computation: Computation, instruction: Instruction) -> bool:
    """True if each chip keeps only its part of the sum: the TPU compiler's reduce-scatter."""
    users = computation.users(instruction)
    while users and all(u.opcode in ("get-tuple-element", "bitcast") for u in users):
        users = [user for u in users for user in computation.users(u)]
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


def _payload(instruction: Instruction) -> int:
    if instruction.opcode.endswith("-start"):  # operands, results, and flags
        return max((a.bytes for a in instruction.arrays if a.shape), default=0)
    return instruction.bytes


def permuted_axes(instruction: Instruction, shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which a collective-permute sends anything."""
    text = instruction.rest.partition("source_target_pairs=")[2].partition("}}")[0]
    pairs = re.findall(r"\{(\d+),(\d+)", text)
    if not pairs:
        raise RunError(f"the devices of {instruction.name} can't be read from {text[:80]!r}")
    crossed = {axis for pair in pairs for axis in axes_of([int(place) for place in pair], shape)}
    return tuple(axis for axis in shape if axis in crossed)


ORDER = r"\[([0-9,]+)\](?:T\(([0-9,]+)\))?"


def device_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """Places in the mesh of a collective's first group, from any of the printed forms.

    Raises:
      RunError: for a form that is not known.
    """
    text = instruction.rest.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([0-9,]*)\}", text):
        return tuple(int(place) for place in listed.group(1).split(","))
    if iota := re.match(r"\[(\d+),(\d+)\]<=" + ORDER, text):
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
    if not text or text.startswith("{}"):
        return tuple(range(devices))
    raise RunError(f"the devices of {instruction.name} can't be read from {text[:80]!r}")


def _ordered(devices: int, sizes: str, order: str | None) -> np.ndarray:
    """All places in a row, as "2,4" and "1,0" of the form `[2,4]T(1,0)` order them."""
    places = np.arange(devices).reshape([int(size) for size in sizes.split(",")])
    return places.transpose([int(axis) for axis in order.split(",")] if order else None).reshape(-1)


def axes_of(group: Sequence[int], shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the places of a group differ."""
    coordinates = np.stack(np.unravel_index(np.asarray(group), tuple(shape.values())), axis=-1)
    differs = (coordinates != coordinates[0]).any(axis=0)
    return tuple(itertools.compress(shape, differs))


# Memory traffic


def traffic(module: Module) -> tuple[int, int]:
    """Bytes that one chip reads and writes in HBM, and exchanges with its host, in one run.

    Arrays in VMEM are not counted. A fusion that slices a stacked array reads the slice; one that
    updates a part in place writes the part. A Pallas kernel is charged its operands and results
    once, a lower bound.

    Raises:
      RunError: for an instruction that uses the host's memory in another way than copying.
    """
    hbm = host = 0
    for computation in module.sequences():
        times = module.executions(computation.name)
        for instruction in computation.instructions.values():
            if instruction.opcode in FREE:
                continue
            if instruction.opcode == "custom-call" and not instruction.operands:
                continue  # allocates a buffer
            if instruction.opcode in TRANSFERS:
                count, *spaces = _transfer(computation, instruction)
                hbm += times * count * spaces.count(HBM)
                host += times * count * (spaces[0] != spaces[1] and HOST in spaces)
                continue
            hbm += times * _moved(module, computation, instruction)
            operands = computation.operands(instruction)
            if any(array.space == HOST for i in (*operands, instruction) for array in i.arrays):
                raise RunError(
                    f"the compiled program uses the host's memory by a {instruction.opcode} "
                    f"({instruction.name}), whose bytes can't be counted"
                )
    return hbm, host


def _transfer(computation: Computation, instruction: Instruction) -> tuple[int, int, int]:
    """Bytes, and the memory spaces that they are read from and written to."""
    source, *others = computation.operands(instruction)
    space = source.arrays[0].space
    if instruction.opcode == "dynamic-update-slice-start":
        part = others[0].arrays[0]
        return part.bytes, part.space, space
    if instruction.opcode == "copy-start":
        target = instruction.arrays[0]
    else:
        *_, target = (array for array in instruction.arrays if array.shape)  # no index, no flag
    return target.bytes, space, target.space


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    operands = computation.operands(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    if instruction.opcode in SLICING:
        source, target = operands[0].arrays[0], instruction.arrays[0]
        return target.bytes * ((source.space == HBM) + (target.space == HBM))
    read, written = [operand.hbm_bytes for operand in operands], instruction.hbm_bytes
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.callee("calls")]
        used = [_read(inside, inside.parameter(place)) for place in range(len(read))]
        read = [min(whole, part) for whole, part in zip(read, used, strict=True)]
        results = inside.operands(inside.root) if inside.root.opcode == "tuple" else [inside.root]
        written = min(written, sum(_written(inside, result) for result in results))
    return sum(read) + written


def _read(inside: Computation, source: Instruction) -> int:
    """Bytes of a parameter that a fusion reads."""
    total = 0
    for user in inside.users(source):
        if user.opcode in SLICING and user.operands[0] == source.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # the rest stays where it is
        elif user.opcode == "bitcast":
            total += _read(inside, user)
        else:
            return source.bytes
    return min(total, source.bytes)


def _written(inside: Computation, result: Instruction) -> int:
    """Bytes of a result that a fusion writes."""
    while result.opcode == "bitcast":
        result = inside.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inside.instructions[result.operands[1]].bytes
    return 0 if result.opcode == "parameter" else result.bytes


def saved_bytes(module: Module) -> int:
    """Bytes in HBM that one loop makes and a later one takes: activations saved for a backward
    pass."""
    total = 0
    for computation in module.sequences():
        seen = set()
        for loop in computation.instructions.values():
            if loop.opcode != "while":
                continue
            for name in computation.instructions[loop.operands[0]].operands:
                made = module.made_by_loop(computation, name)
                if made is not None and made not in seen:
                    seen.add(made)
                    array = computation.instructions[made[0]].arrays[made[1]]
                    total += array.bytes if array.space == HBM else 0
    return total
