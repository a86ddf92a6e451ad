"""Ways to lay a run out on a slice: the mesh, what a layer keeps, and micro-batches."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from oapl_jax.job import Config
from oapl_jax.models.config import ModelConfig

BLOCK = 512  # places of a row that attention takes at a time; a device's are a multiple
DOUBLINGS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Choice:
    data: int
    fsdp: int
    context: int
    tensor: int
    remat: str
    micro_batches: int

    @property
    def mesh(self) -> dict[str, int]:
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


def families(
    config: Config, model: ModelConfig, chips: int, remats: Sequence[str]
) -> Iterator[list[Choice]]:
    """For each mesh and policy, the simplest meshes first: from few micro-batches to many.

    Within a family more micro-batches take less memory and move more weights: the first that fits
    is the best of it.
    """
    sequences = config.group_size * config.groups_per_step
    for data in DOUBLINGS:
        for tensor in DOUBLINGS:
            for context in DOUBLINGS:
                fsdp, rest = divmod(chips, data * tensor * context)
                rows = data * fsdp
                fine = not rest and fsdp and not sequences % rows
                if not fine or model.num_kv_heads % tensor or model.hidden_size % fsdp:
                    continue
                splits = [m for m in range(1, sequences // rows + 1) if not sequences % (m * rows)]
                for remat in remats:
                    yield [Choice(data, fsdp, context, tensor, remat, m) for m in splits]
