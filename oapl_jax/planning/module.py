"""A compiled program: which computation runs which, and how often.

The compiler prints a loop's body once, and its own cost analysis counts it once. Here a computation
runs as often as its callers, times the trip count of a loop.
"""

import dataclasses
import functools
import math
import re

from oapl_jax.errors import RunError
from oapl_jax.planning.hlo import Computation, Instruction, read_computations

COPIES = ("copy", "bitcast", "convert", "copy-done", "optimization-barrier")
AT_MOST = re.compile(r'at_most_(\d+)\)*/while"')  # on one chip it may be jvp(at_most_7)/while
CONTROL = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Call:
    """An instruction that runs a computation."""

    caller: Computation
    instruction: Instruction
    role: str


class Module:
    """A scheduled module, from what `compiled.as_text()` gives."""

    def __init__(self, text: str):
        self.header = text.partition("\n")[0]
        self.computations, self.entry = read_computations(text)
        self._calls: dict[str, list[Call]] = {name: [] for name in self.computations}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for role, callee in instruction.callees:
                    self._calls[callee].append(Call(computation, instruction, role))

    @functools.cache  # noqa: B019 (a module lives no longer than a plan)
    def executions(self, computation: str) -> int:
        """How often a computation runs in one run of the program.

        Raises:
          RunError: if the trip count of a loop above it can't be read.
        """
        if computation == self.entry:
            return 1
        return sum(
            self.executions(call.caller.name)
            * (self.trip_count(call.caller, call.instruction) if call.role == "body" else 1)
            for call in self._calls[computation]
        )

    def sequences(self) -> list[Computation]:
        """The computations whose instructions run one by one: the entry, and the bodies and
        branches below it; not those within a fusion."""
        return [
            computation
            for name, computation in self.computations.items()
            if name == self.entry
            or any(call.instruction.opcode in CONTROL for call in self._calls[name])
        ]

    @functools.cache  # noqa: B019
    def trip_count(self, caller: Computation, loop: Instruction) -> int:
        """Turns of a while loop: as printed, or as its condition `i < n` and its body `i + 1` say;
        the most of them where data decide, as the scope `at_most_n` of the loop says.

        Raises:
          RunError: if neither says it; a guess would make every figure wrong.
        """
        printed = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)', loop.rest)
        printed = printed or AT_MOST.search(loop.rest)
        if printed:
            return int(printed.group(1))
        compare, sides = self._comparison(self.computations[loop.callee("condition")])
        counter = next((i for _, side in sides if (i := _element(side)) is not None), None)
        bounds = [self._constant(where, side) for where, side in sides]
        limit = next((bound for bound in bounds if bound is not None), None)
        if counter is not None and limit is not None:
            start = self._element_of(caller, caller.instructions[loop.operands[0]], counter)
            step = self._step(self.computations[loop.callee("body")], counter)
            direction = compare.attribute("direction")
            if start is not None and step and direction in ("LT", "LE", "GT", "GE"):
                beyond = {"LT": 0, "LE": 1, "GT": 0, "GE": -1}[direction]
                return max(math.ceil((limit - start + beyond) / step), 0)
        raise RunError(f"the number of turns of loop {loop.name} of the program can't be read")

    def made_by_loop(self, computation: Computation, name: str) -> tuple[str, int] | None:
        """The loop of this computation that wrote the array `name`, and its place in the loop's
        result; None if no loop did."""
        element = same(computation, computation.instructions[name])
        index = _element(element)
        if index is None:
            return None
        loop = same(computation, computation.instructions[element.operands[0]])
        if loop.opcode != "while" or self._hands_on(loop, index):
            return None
        return loop.name, index

    def _hands_on(self, loop: Instruction, index: int) -> bool:
        """Whether a loop leaves an element of its state as it is."""
        body = self.computations[loop.callee("body")]
        if body.root.opcode != "tuple":
            return False
        new = same(body, body.instructions[body.root.operands[index]])
        return _element(new) == index and (body.instructions[new.operands[0]].opcode == "parameter")

    def _comparison(
        self, condition: Computation
    ) -> tuple[Instruction, list[tuple[Computation, Instruction]]]:
        """The comparison at the root of a condition, perhaps in a fusion, and its two sides."""
        root = condition.root
        if root.opcode == "fusion":
            inside = self.computations[root.callee("calls")]
            return inside.root, self._sides(inside.root, inside, condition, root)
        return root, self._sides(root, condition, condition, root)

    def _sides(
        self, of: Instruction, inside: Computation, outside: Computation, fusion: Instruction
    ) -> list[tuple[Computation, Instruction]]:
        """What the operands of an instruction are, seen through the parameters of its fusion."""
        found = []
        for name in of.operands:
            side, where = same(inside, inside.instructions[name]), inside
            if side.opcode == "parameter" and inside is not outside:
                given = outside.instructions[fusion.operands[side.number]]
                side, where = same(outside, given), outside
            found.append((where, side))
        return found

    def _step(self, body: Computation, counter: int) -> int | None:
        """What a turn adds to the counter."""
        if body.root.opcode != "tuple":
            return None
        new = same(body, body.instructions[body.root.operands[counter]])
        inside, changed = body, new
        if new.opcode == "fusion":
            inside = self.computations[new.callee("calls")]
            changed = inside.root
        sign = {"add": 1, "subtract": -1}.get(changed.opcode)
        values = [self._constant(*side) for side in self._sides(changed, inside, body, new)]
        step = next((value for value in values if value is not None), None)
        return None if sign is None or step is None else sign * step

    def _constant(self, computation: Computation, instruction: Instruction) -> int | None:
        """The integer that an instruction always is, also if a loop was handed it."""
        if instruction.opcode == "constant":
            value = instruction.rest.partition(")")[0]
            return int(value) if re.fullmatch(r"-?\d+", value) else None
        index = _element(instruction)
        if index is None:
            return None
        source = same(computation, computation.instructions[instruction.operands[0]])
        if source.opcode != "parameter":
            return self._element_of(computation, source, index)
        loops = [c for c in self._calls[computation.name] if c.instruction.opcode == "while"]
        if len(loops) != 1 or not self._hands_on(loops[0].instruction, index):
            return None
        outside, loop = loops[0].caller, loops[0].instruction
        return self._element_of(outside, outside.instructions[loop.operands[0]], index)

    def _element_of(self, computation: Computation, state: Instruction, index: int) -> int | None:
        state = same(computation, state)
        if state.opcode != "tuple":
            return None
        element = computation.instructions[state.operands[index]]
        return self._constant(computation, same(computation, element))


def same(computation: Computation, instruction: Instruction) -> Instruction:
    """The instruction that this one only copies."""
    while instruction.opcode in (*COPIES, "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _element(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute("index"))
