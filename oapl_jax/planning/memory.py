"""HBM of one chip while a program runs, by kind, from what the compiler says of it.

The verdict is the compiler's: a program that it refuses does not fit, and one that it accepts fits
if its own figure and what lies beside it leave no more than is there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from oapl_jax.errors import RunError
from oapl_jax.planning import compiler_log
from oapl_jax.planning.module import Module
from oapl_jax.planning.programs import Program, per_chip
from oapl_jax.planning.traffic import HBM

REFUSALS = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a program fits.

    Attributes:
      fits: the answer.
      because: one sentence.
      hbm: kind -> bytes on a chip; empty if the compiler refused, arguments if it was not asked.
      donated: arguments whose memory becomes a result's, and bytes of the results that have memory
        of their own.
      compiled: the program, None if there is none.
      text: the compiled program, read.
      offloaded: bytes of the host's memory that it takes for a chip.
      replicated: arrays that the compiler reshards by replicating them whole on every chip.
    """

    fits: bool
    because: str
    hbm: Mapping[str, int]
    donated: Mapping[str, int]
    compiled: Any
    text: Module | None
    offloaded: int
    replicated: int


def too_large(program: Program, available: int) -> Verdict | None:
    """The verdict on a program that is not worth compiling: what it is given and what lies beside
    it take more than there is. None for any other."""
    hbm = {kind: per_chip(tree) for kind, tree in program.arguments.items()}
    hbm |= program.beside
    total = sum(hbm.values())
    if total <= available:
        return None
    because = f"arguments alone are {total / 2**30:.2f} GiB of {available / 2**30:.2f} GiB"
    return Verdict(False, because, hbm, {}, None, None, 0, 0)


def judge(program: Program, traced: Any, available: int) -> Verdict:
    """Compiles a traced program and weighs it against `available` bytes of HBM.

    Raises:
      RunError: if the compiler fails for another reason than memory.
    """
    try:
        with compiler_log.heard() as lines:
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sentence = " ".join(str(error).split())
        if any(word in sentence for word in REFUSALS):
            return Verdict(False, f"the compiler: {sentence}", {}, {}, None, None, 0, 0)
        raise RunError(f"{program.name} does not compile for this slice: {sentence}") from error
    text = Module(compiled.as_text())
    hbm = by_kind(program, compiled.memory_analysis(), text)
    total = sum(hbm.values())
    fits = total <= available
    because = f"{total / 2**30:.2f} GiB of {available / 2**30:.2f} GiB"
    return Verdict(
        fits=fits,
        because=because,
        hbm=hbm,
        donated=donation(compiled, text),
        compiled=compiled,
        text=text,
        offloaded=compiled.memory_analysis().host_temp_size_in_bytes,
        replicated=compiler_log.replicated(lines),
    )


def by_kind(program: Program, said: Any, text: Module) -> dict[str, int]:
    """Kinds of HBM; they add up to no less than the compiler's own figures.

    Args:
      program: for the sizes of its arguments.
      said: of the compiled program's memory_analysis().
      text: for what its loops keep for one another.
    """
    kinds = {kind: per_chip(tree) for kind, tree in program.arguments.items()}
    # What the program does not use is no parameter of it, and lies there all the same.
    entry = text.computations[text.entry].instructions.values()
    used = sum(a.bytes for i in entry if i.opcode == "parameter" for a in i.arrays)
    kinds["padding"] = said.argument_size_in_bytes - used
    results = said.output_size_in_bytes - said.alias_size_in_bytes
    arguments = said.argument_size_in_bytes
    # A chip's peak is another figure of the compiler, with the host's memory in it: the greater one
    # counts.
    peak = said.peak_memory_in_bytes - said.host_temp_size_in_bytes - arguments
    made = max(said.temp_size_in_bytes + results, peak)
    kept = min(kept_bytes(text), made - results)
    kinds |= {
        "activations": kept,
        "temporaries": made - results - kept,
        "results": results,
        "program": said.generated_code_size_in_bytes,
    }
    kinds |= program.beside
    return {kind: size for kind, size in kinds.items() if size}


def donation(compiled: Any, text: Module) -> dict[str, int]:
    said = compiled.memory_analysis()
    return {
        "arrays": text.header.count("-alias)"),
        "bytes": said.alias_size_in_bytes,
        "results not in an argument's place": said.output_size_in_bytes - said.alias_size_in_bytes,
    }


def kept_bytes(text: Module) -> int:
    """Bytes in HBM that one loop of the program makes and a later one takes: what a forward pass
    keeps for its backward pass."""
    total = 0
    for computation in text.sequences():
        seen = set()
        for loop in computation.instructions.values():
            if loop.opcode != "while":
                continue
            start = computation.instructions[loop.operands[0]]
            for name in start.operands:
                source = text.made_by_loop(computation, name)
                if source is not None and source not in seen:
                    seen.add(source)
                    array = computation.instructions[source[0]].arrays[source[1]]
                    total += array.bytes if array.space == HBM else 0
    return total
