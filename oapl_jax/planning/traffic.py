"""Bytes that one run of a program moves between a chip's HBM and its compute units, or its host.

Counted from the compiled program: what each instruction reads and writes, without what the
compiler keeps in VMEM, times the executions of its computation. A fusion that takes a slice of a
stacked array reads the slice; one that updates a part in place writes the part. A kernel of our own
is charged its operands and results once, which is a lower bound.
"""

from collections.abc import Callable

from oapl_jax.errors import RunError
from oapl_jax.planning.hlo import Computation, Instruction
from oapl_jax.planning.module import Module

# Nothing moves: names for what others make, or loops whose bodies are counted.
STILL = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
        *("while", "conditional", "call", "after-all", "add-dependency", "optimization-barrier"),
        *("copy-done", "slice-done", "all-gather-done", "all-reduce-done", "async-done"),
        *("dynamic-slice-done", "dynamic-update-slice-done"),
        *("collective-permute-done", "send-done", "recv-done", "async-update"),
        *("partition-id", "replica-id", "rng-get-and-update-state", "domain"),
    )
)
SLICING = ("dynamic-slice", "slice", "gather")
# From one memory to another, while the program goes on.
TRANSFERS = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
HBM, HOST = 0, 5
Moved = Callable[[Module, Computation, Instruction], int]


def hbm_bytes(module: Module) -> int:
    """Bytes read from HBM and written to it in one run of the program, on one chip."""
    return _total(module, _moved)


def host_bytes(module: Module) -> int:
    """Bytes between one chip and its host in one run of the program, both ways.

    Raises:
      RunError: for an instruction that uses the host's memory in another way than copying.
    """
    return _total(module, _over_the_link)


def _total(module: Module, moved: Moved) -> int:
    total = 0
    for computation in module.sequences():
        once = sum(
            moved(module, computation, instruction)
            for instruction in computation.instructions.values()
            if instruction.opcode not in STILL
            # Else a buffer is laid out.
            and (instruction.opcode != "custom-call" or instruction.operands)
        )
        total += once * module.executions(computation.name)
    return total


def _over_the_link(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in TRANSFERS:
        count, *spaces = _transfer(computation, instruction)
        return count * (spaces[0] != spaces[1] and HOST in spaces)
    operands = [computation.instructions[name] for name in instruction.operands]
    if any(array.space == HOST for of in (*operands, instruction) for array in of.arrays):
        raise RunError(
            f"the program uses the host's memory by a {instruction.opcode} ({instruction.name}), "
            "whose bytes can't be counted"
        )
    return 0


def _transfer(computation: Computation, instruction: Instruction) -> tuple[int, int, int]:
    """Bytes, and the spaces that they are read from and written to."""
    source = computation.instructions[instruction.operands[0]].arrays[0]
    if instruction.opcode == "dynamic-update-slice-start":
        part = computation.instructions[instruction.operands[1]].arrays[0]
        return part.bytes, part.space, source.space
    if instruction.opcode == "copy-start":
        target = instruction.arrays[0]
    else:
        *_, target = (array for array in instruction.arrays if array.shape)  # no index, no flag
    return target.bytes, source.space, target.space


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _hbm(computation.instructions[instruction.operands[1]])
    if instruction.opcode in TRANSFERS:
        count, *spaces = _transfer(computation, instruction)
        return count * spaces.count(HBM)
    if instruction.opcode in SLICING:
        source = computation.instructions[instruction.operands[0]].arrays[0]
        target = instruction.arrays[0]
        return target.bytes * ((source.space == HBM) + (target.space == HBM))
    read = [_hbm(computation.instructions[name]) for name in instruction.operands]
    written = _hbm(instruction)
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.callee("calls")]
        used = [_read(inside, inside.parameter(place)) for place in range(len(read))]
        read = [min(whole, part) for whole, part in zip(read, used, strict=True)]
        written = min(written, _produced(inside))
    return sum(read) + written


def _hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.space == HBM)


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays)


def _read(inside: Computation, source: Instruction) -> int:
    """How many bytes of a parameter a fusion reads."""
    total = 0
    for user in inside.users(source.name):
        if user.opcode in SLICING and user.operands[0] == source.name:
            total += _size(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # what is not updated stays where it is
        elif user.opcode == "bitcast":
            total += _read(inside, user)
        else:
            return _size(source)
    return min(total, _size(source))


def _produced(inside: Computation) -> int:
    """How many bytes a fusion writes."""
    root = inside.root
    results = [inside.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return sum(_written(inside, result) for result in results)


def _written(inside: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = inside.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return _size(inside.instructions[result.operands[1]])
    if result.opcode == "parameter":
        return 0  # handed through
    return _size(result)
