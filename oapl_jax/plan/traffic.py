"""Bytes that one run of a program moves between a chip's HBM and its compute units.

Counted from the compiled program: what each instruction reads and writes, without what the
compiler keeps in VMEM, times the executions of its computation. A fusion that takes a slice of a
stacked array reads the slice; one that updates a part in place writes the part. A kernel of our own
is charged its operands and results once, which is a lower bound.
"""

from oapl_jax.plan.hlo import Computation, Instruction
from oapl_jax.plan.module import Module

# Nothing moves: names for what others make, or loops whose bodies are counted.
STILL = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
        *("while", "conditional", "call", "after-all", "add-dependency", "optimization-barrier"),
        *("copy-done", "slice-done", "all-gather-done", "all-reduce-done", "async-done"),
        *("collective-permute-done", "send-done", "recv-done", "async-update"),
        *("partition-id", "replica-id", "rng-get-and-update-state", "domain"),
    )
)
SLICING = ("dynamic-slice", "slice", "gather", "slice-start")
HBM = 0


def hbm_bytes(module: Module) -> int:
    """Bytes read and written in one run of the program, on one chip."""
    total = 0
    for computation in module.sequences():
        moved = sum(
            _moved(module, computation, instruction)
            for instruction in computation.instructions.values()
            if instruction.opcode not in STILL
        )
        total += moved * module.executions(computation.name)
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "custom-call" and not instruction.operands:
        return 0  # a buffer is laid out
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _hbm(computation.instructions[instruction.operands[1]])
    if instruction.opcode in (*SLICING, "copy-start"):
        source = computation.instructions[instruction.operands[0]].arrays[0]
        target = instruction.arrays[instruction.opcode == "slice-start"]
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
