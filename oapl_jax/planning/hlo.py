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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from oapl_jax.errors import RunError


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\S+", text))


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
CALLS = _words("""
    calls to_apply body condition true_computation false_computation branch_computations
    called_computations select scatter
""")
# Callers whose callee's instructions run one by one; a fusion's do not.
CONTROL = ("while", "conditional", "call", "async-start")
# A scope named at_most_N bounds the trips of a loop whose end depends on data; on one chip the
# scope may be jvp(at_most_7).
AT_MOST = re.compile(r'at_most_(\d+)\)*/while"')
MOST_TRIPS = 2**20
# An integer, the elements of a tuple by index, or None if the value depends on data.
Value = int | Callable[[int], Any] | None
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
} | {"add": operator.add, "subtract": operator.sub}
# Instructions without traffic of their own: aliases, metadata, and loops (counted in their bodies).
FREE = _words("""
    parameter constant tuple get-tuple-element bitcast iota while conditional call after-all
    add-dependency optimization-barrier opt-barrier partition-id replica-id domain
    rng-get-and-update-state copy-done slice-done dynamic-slice-done dynamic-update-slice-done
    all-gather-done all-reduce-done collective-permute-done async-done async-update
""")
COPIES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier")
SLICING = ("dynamic-slice", "slice", "gather")
# From one memory to another, asynchronously.
TRANSFERS = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
# A chip of a group of n receives (n - 1) / n of a payload, so many times. The payload is the whole
# array: an all-gather's result, a reduce-scatter's operand.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
COLLECTIVES = {*PASSES, "collective-permute"}
COMMUNICATES = re.compile(r"\b(channel_id|replica_groups|source_target_pairs)=")
# Instructions that read their operands and write their results. Others are known within a fusion
# only, where they do not count.
COMPUTING = _words("""
    abs add and atan2 bitcast-convert broadcast cbrt ceil clamp compare concatenate convert
    convolution copy cosine count-leading-zeros custom-call divide dot dynamic-update-slice erf
    exponential exponential-minus-one floor fusion is-finite log log-plus-one logistic map maximum
    minimum mulhi multiply negate not or pad popcnt power reduce reduce-precision reduce-window
    remainder reshape reverse rng-bit-generator round-nearest-afz round-nearest-even rsqrt scatter
    select select-and-scatter shift-left shift-right-arithmetic shift-right-logical sign sine sort
    sqrt subtract tan tanh topk transpose xor async
""")
KNOWN = {*FREE, *COMPUTING, *COLLECTIVES, *SLICING}


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


@dataclasses.dataclass(eq=False)
class Instruction:
    """An instruction, linked to its operands, its users and the computations that it runs."""

    computation: "Computation"
    name: str
    shape: str  # of the result, as printed
    opcode: str
    literal: str  # between the parentheses: operands, a constant's value, a parameter's number
    rest: str  # attributes
    operands: list["Instruction"] = dataclasses.field(default_factory=list)
    users: list["Instruction"] = dataclasses.field(default_factory=list)
    callees: dict[str, "Computation"] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Arrays of the result, in order."""
        found = []
        unknown = re.sub(r"/\*index=\d+\*/|[(), ]", "", ARRAY.sub("", self.shape))
        for dtype, sizes, layout in ARRAY.findall(self.shape):
            printed = re.search(r"S\((\d+)\)", layout)
            space = int(printed.group(1)) if printed else HBM
            if (layout and not LAYOUT.fullmatch(layout)) or space not in MEMORY_SPACES:
                unknown = layout
            if dtype != "token":
                shape = tuple(int(size) for size in sizes.split(",") if size)
                found.append(Array(dtype, shape, space))
        if unknown:
            raise RunError(f"{unknown} in the shape of instruction {self.name} is not known")
        return tuple(found)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if array.space == HBM)

    def attribute(self, name: str) -> str:
        """The word that follows `name=`, "" if there is none."""
        found = re.search(rf"\b{name}=(\w+)", self.rest)
        return found.group(1) if found else ""

    def callee(self, attribute: str) -> "Computation":
        if attribute not in self.callees:
            raise RunError(f"{self.opcode} {self.name} of the compiled program has no {attribute}")
        return self.callees[attribute]

    @property
    def element(self) -> int | None:
        """The index of a get-tuple-element."""
        return int(self.attribute("index")) if self.opcode == "get-tuple-element" else None

    @property
    def source(self) -> "Instruction":
        """The instruction that this one copies, followed through copies of copies."""
        return self.operands[0].source if self.opcode in COPIES else self

    @functools.cached_property
    def trip_count(self) -> int:
        """Trips of a while loop: as printed, or by evaluating its condition and its counter.

        A loop whose end depends on data makes the most trips that its scope `at_most_n` allows.
        """
        printed = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', self.rest)
        if printed := printed or AT_MOST.search(self.rest):
            return int(printed.group(1))
        condition, body = self.callee("condition"), self.callee("body")
        start = _value(self.operands[0], _constants_of(self.computation))
        constant = _unchanged(self, start)
        if callable(start) and callable(constant):
            read = [i.element for i in condition.instructions.values() if i.element is not None]
            values = {index: start(index) for index in read}
            given = lambda values: (
                lambda _: lambda index: values[index] if index in values else constant(index)
            )
            for trips in range(MOST_TRIPS):
                going = _value(condition.root, given(values))
                if going is None:
                    break
                if not going:
                    return trips
                after = _value(body.root, given(values))
                values = {index: after(index) if callable(after) else None for index in read}
        raise RunError(f"the trip count of loop {self.name} of the compiled program can't be read")

    def passes_through(self, index: int) -> bool:
        """True if the body of a loop returns this element of its state unchanged."""
        root = self.callee("body").root
        if root.opcode != "tuple":
            return False
        new = root.operands[index].source
        return new.element == index and new.operands[0].opcode == "parameter"


@dataclasses.dataclass(eq=False)
class Computation:
    name: str
    is_entry: bool
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    callers: list[tuple[Instruction, str]] = dataclasses.field(default_factory=list)
    root: Instruction = None  # pyright: ignore[reportAssignmentType]

    @functools.cached_property
    def executions(self) -> int:
        """Times that it runs in one run of the program."""
        if self.is_entry:
            return 1
        return sum(
            caller.computation.executions * (caller.trip_count if attribute == "body" else 1)
            for caller, attribute in self.callers
        )

    @functools.cached_property
    def is_sequence(self) -> bool:
        """True if its instructions run one by one: the entry, bodies and branches, no fusions."""
        return self.is_entry or any(caller.opcode in CONTROL for caller, _ in self.callers)

    def parameter(self, number: int) -> Instruction:
        given = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(i for i in given if int(i.literal) == number)


class Module:
    """A scheduled HLO module, read from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.header = text.partition("\n")[0]
        self.computations = {c.name: c for c in read_computations(text)}
        entries = [c for c in self.computations.values() if c.is_entry]
        if not entries:
            raise RunError(f"the compiled program has no ENTRY; it begins with {text[:120]!r}")
        self.entry = entries[0]
        for instruction in self.instructions():
            self._link(instruction)
        for computation in self.computations.values():
            if not computation.callers and not computation.is_entry:
                raise RunError(f"no known instruction of the program runs {computation.name}")

    def _link(self, instruction: Instruction) -> None:
        beside = instruction.computation.instructions
        names = re.findall(r"%([^\s,()]+)", instruction.literal)
        if unknown := set(names) - beside.keys():
            raise RunError(f"operands {sorted(unknown)} of {instruction.name} are not known")
        instruction.operands = [beside[name] for name in names]
        for name in set(names):
            beside[name].users.append(instruction)
        for attribute, names in REFERENCE.findall(instruction.rest):
            for name in (name.strip(" %") for name in names.split(",")):
                callee = self.computations.get(name)
                if attribute in CALLS and callee:
                    instruction.callees[attribute] = callee
                    callee.callers.append((instruction, attribute))
                elif attribute in CALLS or (callee and name not in beside):
                    raise RunError(f"{attribute}=%{name} of {instruction.name} is not known")

    def instructions(self) -> list[Instruction]:
        return [i for c in self.computations.values() for i in c.instructions.values()]

    def scheduled(self) -> list[Instruction]:
        """Instructions that run one by one, not within a fusion."""
        return [i for i in self.instructions() if i.computation.is_sequence]


def read_computations(text: str) -> Iterator[Computation]:
    """Reads the computations and their instructions, without links."""
    computation, lines = None, []
    for line in text.splitlines():
        if computation is None:
            if line.endswith("{") and line.startswith(("%", "ENTRY ")):
                name = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
                computation, lines = Computation(name, line.startswith("ENTRY ")), []
        elif BLOCK_END.fullmatch(line):
            for printed in lines:  # [ROOT] %name = shape opcode(operands), attributes
                found = INSTRUCTION.fullmatch(printed)
                if not found:
                    raise RunError(f"the program has an unknown instruction: {printed[:120]!r}")
                root, name, shape, opcode, literal, rest = found.groups(default="")
                instruction = Instruction(computation, name, shape, opcode, literal, rest)
                computation.instructions[name] = instruction
                computation.root = instruction if root else computation.root
            if computation.root is None:
                raise RunError(f"computation {computation.name} of the program has no ROOT")
            yield computation
            computation = None
        elif line.startswith(("  %", "  ROOT %")):
            lines.append(line)
        elif lines:
            lines[-1] += line  # attributes of a kernel can span lines
        else:
            raise RunError(f"the compiled program has a line of an unknown form: {line[:120]!r}")


def _value(instruction: Instruction, given: Callable[[int], Value]) -> Value:
    """Evaluates an instruction; `given` maps the number of a parameter to its value."""
    instruction = instruction.source
    operand = lambda number: _value(instruction.operands[number], given)
    match instruction.opcode:
        case "constant":
            is_integer = re.fullmatch(r"-?\d+", instruction.literal)
            return int(instruction.literal) if is_integer else None
        case "parameter":
            return given(int(instruction.literal))
        case "tuple":
            return operand
        case "get-tuple-element":
            state, index = operand(0), instruction.element
            return state(index) if callable(state) and index is not None else None
        case "fusion":
            return _value(instruction.callee("calls").root, operand)
        case "while":
            return _unchanged(instruction, operand(0))
        case "add" | "subtract" | "compare":
            kind = instruction.attribute("direction") or instruction.opcode
            left, right = operand(0), operand(1)
            if isinstance(left, int) and isinstance(right, int) and kind in ARITHMETIC:
                return ARITHMETIC[kind](left, right)
    return None


def _constants_of(computation: Computation) -> Callable[[int], Value]:
    """Values of the parameters of a computation: of a loop's body, elements that never change."""
    loops = [caller for caller, _ in computation.callers if caller.opcode == "while"]
    if len(loops) != 1:
        return lambda _: None
    start = _value(loops[0].operands[0], _constants_of(loops[0].computation))
    return lambda _: _unchanged(loops[0], start)


def _unchanged(loop: Instruction, start: Value) -> Value:
    """The elements of a loop's state that all trips leave as they start."""
    if not callable(start):
        return None
    return lambda index: start(index) if loop.passes_through(index) else None


# Collectives


def collective_bytes(module: Module, mesh: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Bytes that a chip receives in one run: kind -> mesh axes ("fsdp", "data+fsdp") -> bytes.

    `mesh` maps its axes to their sizes.
    """
    table: dict[str, dict[str, float]] = {}
    counted, continued = set(), {}
    for instruction in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            if COMMUNICATES.search(instruction.rest):
                raise RunError(f"collective {kind} ({instruction.name}) is not known")
            continue
        executions = instruction.computation.executions
        if not executions:
            continue
        channel = instruction.attribute("channel_id")
        if _continues(instruction):
            continued[channel] = instruction.name
            continue
        counted.add(channel)
        results = instruction.bytes
        if instruction.opcode.endswith("-start"):  # its tuple has operands, results and flags
            results = max((a.bytes for a in instruction.arrays if a.shape), default=0)
        payload = max(results, sum(operand.bytes for operand in instruction.operands))
        if kind == "all-reduce" and _scatters(instruction):
            kind = "reduce-scatter"
        if kind == "collective-permute":
            axes, received = permuted_axes(instruction, mesh), payload
        else:
            group = device_group(instruction, math.prod(mesh.values()))
            axes = axes_of(group, mesh)
            received = PASSES[kind] * payload * (len(group) - 1) / len(group)
        if axes:  # else groups of one chip
            row, name = table.setdefault(kind, {}), "+".join(axes)
            row[name] = row.get(name, 0.0) + received * executions
    for channel in continued.keys() - counted:
        raise RunError(f"the compiled program continues {continued[channel]} and never starts it")
    return table


def _continues(instruction: Instruction) -> bool:
    """True for a later step of a collective that another computation starts.

    The TPU compiler cuts an asynchronous collective into steps, each fused with a piece of the
    arithmetic that hides it, and prints the collective in each of them.
    """
    starts = 'custom_call_target="AsyncCollectiveStart"'
    beside = instruction.computation.instructions.values()
    return "chain_id=" in instruction.rest and not any(starts in other.rest for other in beside)


def _scatters(instruction: Instruction) -> bool:
    """True if each chip keeps only its part of the sum: the TPU compiler's reduce-scatter."""
    users = instruction.users
    while users and all(u.opcode in ("get-tuple-element", "bitcast") for u in users):
        users = [user for u in users for user in u.users]
    return bool(users) and all(u.opcode == "dynamic-slice" for u in users)


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
    """Places in the mesh of a collective's first group, from any of the printed forms."""
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
    once, a lower bound. The host's memory may only be copied from and to.
    """
    hbm = host = 0
    for instruction in module.scheduled():
        opcode, executions = instruction.opcode, instruction.computation.executions
        allocates = opcode == "custom-call" and not instruction.operands
        if opcode in FREE or allocates:
            continue
        if re.sub("-(start|update|done)$", "", opcode) not in KNOWN:
            raise RunError(f"{opcode} ({instruction.name}) is no known instruction")
        if opcode in TRANSFERS:
            count, *spaces = _transfer(instruction)
            hbm += executions * count * spaces.count(HBM)
            if spaces[0] != spaces[1] and HOST in spaces:
                host += executions * count
            continue
        arrays = [a for i in (*instruction.operands, instruction) for a in i.arrays]
        if any(array.space == HOST for array in arrays):
            place = f"{opcode} ({instruction.name})"
            raise RunError(f"the bytes of {place} in the host's memory can't be counted")
        hbm += executions * _moved(instruction)
    return hbm, host


def _transfer(instruction: Instruction) -> tuple[int, int, int]:
    """Bytes, and the memory spaces that they are read from and written to."""
    source = instruction.operands[0].arrays[0]
    if instruction.opcode == "dynamic-update-slice-start":
        part = instruction.operands[1].arrays[0]
        return part.bytes, part.space, source.space
    if instruction.opcode == "copy-start":
        target = instruction.arrays[0]
    else:
        *_, target = (array for array in instruction.arrays if array.shape)  # no index, no flag
    return target.bytes, source.space, target.space


def _moved(instruction: Instruction) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    operands = instruction.operands
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    if instruction.opcode in SLICING:
        source, target = operands[0].arrays[0], instruction.arrays[0]
        return target.bytes * ((source.space == HBM) + (target.space == HBM))
    read, written = [operand.hbm_bytes for operand in operands], instruction.hbm_bytes
    if instruction.opcode == "fusion":
        inside = instruction.callee("calls")
        read = [min(size, _read(inside.parameter(place))) for place, size in enumerate(read)]
        results = inside.root.operands if inside.root.opcode == "tuple" else [inside.root]
        written = min(written, sum(map(_written, results)))
    return sum(read) + written


def _read(source: Instruction) -> int:
    """Bytes of a parameter that a fusion reads."""
    total = 0
    for user in source.users:
        if user.opcode in SLICING and user.operands[0] is source:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] is source:
            continue  # the rest stays where it is
        elif user.opcode == "tuple" or _continues(user):
            continue  # passed on as it is; a collective is counted at its start
        elif user.opcode == "bitcast":
            total += _read(user)
        elif user.opcode == "fusion":
            inside = user.callee("calls")
            places = [place for place, operand in enumerate(user.operands) if operand is source]
            total += sum(_read(inside.parameter(place)) for place in places)
        else:
            return source.bytes
    return min(total, source.bytes)


def _written(result: Instruction) -> int:
    """Bytes of a result that a fusion writes."""
    if result.opcode == "bitcast":
        return _written(result.operands[0])
    if result.opcode == "dynamic-update-slice":
        return result.operands[1].bytes
    return 0 if result.opcode == "parameter" or _continues(result) else result.bytes


def saved_bytes(module: Module) -> int:
    """Bytes in HBM that a loop makes and a later one takes: activations for a backward pass."""
    saved = {}
    for loop in module.scheduled():
        for given in loop.operands[0].operands if loop.opcode == "while" else ():
            element = given.source
            if element.element is None:
                continue
            made_by = element.operands[0].source
            if made_by.opcode == "while" and not made_by.passes_through(element.element):
                array = made_by.arrays[element.element]
                saved[made_by, element.element] = array.bytes if array.space == HBM else 0
    return sum(saved.values())
