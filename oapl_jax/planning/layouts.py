"""Ways to lay a run out on a slice: the mesh, what a layer keeps, and micro-batches."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from oapl_jax.build import Config
from oapl_jax.model.config import ModelConfig

BLOCK = 512  # places of a row that attention takes at a time; a device's are a multiple
DOUBLINGS = (1, 2, 4, 8)
FULL = "full"  # the policy that keeps the least
OFFLOAD = "offload"  # the one that keeps it elsewhere
Mesh = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Choice:
    data: int
    fsdp: int
    context: int
    tensor: int
    remat: str
    micro_batches: int

    @property
    def mesh(self) -> Mesh:
        return dict(data=self.data, fsdp=self.fsdp, context=self.context, tensor=self.tensor)

    def __str__(self) -> str:
        mesh = " ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        return f"{mesh or 'one chip'}, remat {self.remat}, {self.micro_batches} micro-batches"


def applied(config: Config, choice: Choice) -> Config:
    """The configuration with this choice. Rows become longer where attention's blocks need it."""
    new: Any = copy.deepcopy(config)
    new.mesh.update(choice.mesh)
    new.model.remat = choice.remat
    multiple = BLOCK * choice.context
    rows = choice.data * choice.fsdp
    new.learner.update(
        micro_batches=choice.micro_batches,
        rows_multiple=rows,
        row_length=config.learner.row_length + -config.learner.row_length % multiple,
    )
    return new


def meshes(config: Config, model: ModelConfig, chips: int) -> list[Mesh]:
    """The meshes over all chips that split whole sequences and the model, the simplest first."""
    sequences, found = config.group_size * config.groups_per_step, []
    for data, tensor, context in itertools.product(DOUBLINGS, repeat=3):
        fsdp, rest = divmod(chips, data * tensor * context)
        fine = not rest and fsdp and not sequences % (data * fsdp)
        if fine and not model.num_kv_heads % tensor and not model.hidden_size % fsdp:
            found.append(dict(data=data, fsdp=fsdp, context=context, tensor=tensor))
    return sorted(found, key=lambda mesh: chips // mesh["fsdp"])


def family(config: Config, mesh: Mesh, remat: str) -> list[Choice]:
    """From few micro-batches to many, which take less memory and move more weights: the first that
    fits is the best."""
    rows, rest = divmod(config.group_size * config.groups_per_step, mesh["data"] * mesh["fsdp"])
    splits = [m for m in range(1, rows + 1) if not rows % m]
    return [] if rest else [Choice(**mesh, remat=remat, micro_batches=m) for m in splits]


def layouts(sequences: int, hidden_size: int, chips: int) -> Iterator[Choice]:
    """Rows over all chips, as few as can be at a time; then rows split over more and more chips;
    then all that again with what layers keep in the hosts' memory."""
    splits = [context for context in DOUBLINGS if context <= chips]
    for remat, context in itertools.product((FULL, OFFLOAD), splits):
        fsdp = chips // context
        data = 1
        while fsdp > 1 and (hidden_size % fsdp or sequences % (data * fsdp)):
            data, fsdp = 2 * data, fsdp // 2
        micro_batches = max(sequences // (data * fsdp), 1)
        yield Choice(data, fsdp, context, 1, remat, micro_batches)
