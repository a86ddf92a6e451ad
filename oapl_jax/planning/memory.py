"""HBM of one chip while a program runs, by kind, from the compiler's memory analysis.

The compiler decides: a program that it refuses does not fit; one that it accepts fits if the
compiler's own figure and the arrays beside the program fit the available HBM.
"""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.planning.hardware import Slice
from oapl_jax.planning.hlo import Module, saved_bytes
from oapl_jax.planning.programs import Program

REFUSALS = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")
SIZES = ("argument", "output", "alias", "temp", "host_temp", "generated_code")
FIGURES = (*(f"{kind}_size" for kind in SIZES), "peak_memory")
REPLICATED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Result of compiling a program for a slice."""

    fits: bool
    because: str  # the reason, one sentence
    # Kind -> bytes on a chip; empty if the compiler refused, arguments if it was not asked.
    hbm: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # Arrays and bytes of arguments that results reuse, bytes of results that do not.
    donated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    traced: Any = None  # the jax.stages.Traced
    compiled: Any = None  # the jax.stages.Compiled
    module: Module | None = None  # its HLO text, read
    offloaded: int = 0  # bytes of the host's memory that it needs for a chip
    replicated: int = 0  # arrays that are resharded by replicating them whole on every chip


def memory_analysis(compiled: Any) -> dict[str, int]:
    """Figure -> bytes on one chip; raises a RunError if a figure is missing or negative."""
    analysis = compiled.memory_analysis()
    figures = {}
    for name in FIGURES:
        figures[name] = getattr(analysis, f"{name}_in_bytes", None)
        if not isinstance(figures[name], int) or figures[name] < 0:
            raise RunError(f"the compiler's memory analysis has no known {name}: {figures[name]}")
    return figures


@contextlib.contextmanager
def compiler_log() -> Iterator[list[str]]:
    """Lines that the compiler writes to file descriptor 2; complete when the block has ended."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def available_hbm(where: Slice) -> int:
    """Bytes of a chip's HBM that a program may use.

    The compiler names the figure only when it refuses a program, so it is asked for a petabyte.
    Raises a RunError unless the refusal is also in its log: else warnings could not be read there.
    """
    everywhere = jax.sharding.SingleDeviceSharding(where.devices[0])
    huge = jax.ShapeDtypeStruct((2**48,), np.float32, sharding=everywhere)
    try:
        with compiler_log() as lines:
            jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([0-9.]+)([MG])\)", str(error))
        if not found:
            raise RunError(f"the TPU compiler does not name the available HBM: {error}") from error
        if not any("Ran out of memory" in line for line in lines):
            remedy = "plan in a process that has not loaded libtpu before"
            raise RunError(f"the TPU compiler's log can't be read; {remedy}") from error
        return int(float(found.group(1)) * {"M": 2**20, "G": 2**30}[found.group(2)])
    raise RunError("the TPU compiler accepts a petabyte; its memory analysis can't be trusted")


def compile_program(program: Program, available: int) -> Compilation:
    """Compiles a program and compares its HBM with the `available` bytes.

    If arguments and arrays beside it are already too large, it is not compiled. Raises a RunError
    if the compiler fails for another reason than memory, or its output has an unknown form.
    """
    total, gib = sum(program.hbm.values()), f"GiB of {available / 2**30:.2f} GiB"
    if total > available:
        return Compilation(False, f"arguments alone are {total / 2**30:.2f} {gib}", program.hbm)
    traced = program.trace()
    try:
        with compiler_log() as lines:
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sentence = " ".join(str(error).split())
        if any(word in sentence for word in REFUSALS):
            return Compilation(False, f"the compiler: {sentence}")
        raise RunError(f"{program.name} does not compile for this slice: {sentence}") from error
    module, analysis = Module(compiled.as_text()), memory_analysis(compiled)
    hbm = by_kind(program, analysis, module)
    total, reused = sum(hbm.values()), analysis["alias_size"]
    aliases = module.header.count("-alias)")
    if bool(aliases) != bool(reused):
        raise RunError(f"donated arguments can't be read from {module.header[:120]!r}")
    new = "results not in an argument's place"
    return Compilation(
        fits=total <= available,
        because=f"{total / 2**30:.2f} {gib}",
        hbm=hbm,
        donated={"arrays": aliases, "bytes": reused, new: analysis["output_size"] - reused},
        traced=traced,
        compiled=compiled,
        module=module,
        offloaded=analysis["host_temp_size"],
        replicated=sum(REPLICATED in line for line in lines),
    )


def by_kind(program: Program, analysis: Mapping[str, int], module: Module) -> dict[str, int]:
    """HBM by kind; the kinds add up to no less than the compiler's own figures."""
    # Unused arguments are no parameters of the program and occupy HBM all the same.
    entry = module.entry.instructions.values()
    used = sum(i.bytes for i in entry if i.opcode == "parameter")
    arguments, results = analysis["argument_size"], analysis["output_size"] - analysis["alias_size"]
    # The compiler's second figure, which includes the host's memory: the greater one counts.
    peak = analysis["peak_memory"] - analysis["host_temp_size"] - arguments
    made = max(analysis["temp_size"] + results, peak)
    saved = min(saved_bytes(module), made - results)
    kinds = program.hbm | {
        "padding": arguments - used,
        "activations": saved,
        "temporaries": made - results - saved,
        "results": results,
        "program": analysis["generated_code_size"],
    }
    return {kind: size for kind, size in kinds.items() if size}
