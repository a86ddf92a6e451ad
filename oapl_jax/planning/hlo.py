"""The text of a compiled program, read into computations and their instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
CALLEE = re.compile(r"\b(calls|to_apply|body|condition|(?:true|false)_computation)=%([^,\s]+)")
END = re.compile(r'\}(, execution_thread="[^"]*")?')  # v5p has cores beside, for sparse work
CALLEES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `space` 0 is HBM, 1 VMEM, 5 the host."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        bits = BITS.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    name: str
    opcode: str
    shape: str  # of the result, as printed
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant its value first, of a parameter its number
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        found = []
        for dtype, sizes, layout in ARRAY.findall(self.shape):
            space = re.search(r"S\((\d+)\)", layout)
            shape = tuple(int(size) for size in sizes.split(",") if size)
            if dtype != "token":
                found.append(Array(dtype, shape, int(space.group(1)) if space else 0))
        return tuple(found)

    @property
    def number(self) -> int:
        """Of a parameter: its place among the operands of the caller."""
        return int(self.rest.partition(")")[0])

    @property
    def callees(self) -> list[tuple[str, str]]:
        """(role, name) of each computation that this one runs."""
        found = CALLEE.findall(self.rest)
        for names in CALLEES.findall(self.rest):
            found += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
        return found

    def callee(self, role: str) -> str:
        return next(name for r, name in self.callees if r == role)

    def attribute(self, name: str) -> str:
        """The text of an attribute, "" if there is none."""
        found = re.search(rf"\b{name}=", self.rest)
        if not found:
            return ""
        text, depth = self.rest[found.end() :], 0
        for place, letter in enumerate(text):
            depth += (letter in "{[(") - (letter in "}])")
            if depth < 0 or (not depth and letter == ","):
                return text[:place]
        return text


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

    def users(self, name: str) -> list[Instruction]:
        return self._users[name]

    def parameter(self, number: int) -> Instruction:
        given = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(i for i in given if i.number == number)


def read_computations(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry."""
    computations, entry = {}, ""
    for name, is_entry, lines in _blocks(text):
        instructions = [_instruction(line) for line in lines]
        computations[name] = Computation(name, {i.name: i for i in instructions})
        entry = name if is_entry else entry
    return computations, entry


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, is the entry, lines) of each computation."""
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if name and END.fullmatch(line):
            yield name, is_entry, lines
            name = ""
        elif name and line.startswith(("  %", "  ROOT %")):
            lines.append(line)
        elif name:
            lines[-1] += line  # the attributes of a kernel go over several lines
        elif line.endswith("{") and line.startswith(("%", "ENTRY ")):
            is_entry, lines = line.startswith("ENTRY "), []
            name = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]


def _instruction(line: str) -> Instruction:
    """`[ROOT] %name = shape opcode(operands), attributes`."""
    left, _, right = line.strip().partition(" = ")
    end = _close(right) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opcode, _, right = right.partition("(")
    end = _close("(" + right) - 1
    inside, rest = right[: end - 1], right[end:].lstrip(", ")
    if opcode in ("parameter", "constant"):
        rest = f"{inside}), {rest}"
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        shape=shape,
        operands=tuple(re.findall(r"%([^\s,()]+)", inside)),
        rest=rest,
        root=left.startswith("ROOT "),
    )


def _close(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
