"""Small train steps compiled for a v5e 2x2 with context, tensor and offloaded activations."""

import functools

import jax
import pytest
from small_plans import ROWS, small_run

from oapl_jax.planning import hardware, memory, programs
from oapl_jax.planning.estimate import step_times

LENGTH = 128
SIZES = dict(hidden_size=256, intermediate_size=512, vocab_size=1024, tie_word_embeddings=False)


@functools.cache
def compiled(remat="full", micro_batches=2, **mesh):
    """The run, its compiled train step, and the times of it."""
    where = hardware.open_slice("v5e:2x2")
    run = small_run(
        where,
        mesh,
        length=LENGTH,
        prompt=32,
        logp_chunk=64,
        sizes=SIZES,
        micro_batches=micro_batches,
        remat=remat,
    )
    step = run.train_step()
    traced = step.trace()
    result = memory.compile_program(step, traced, memory.available_hbm(where))
    assert result.module
    return run, result, step_times(run, where, traced, result.module)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_rows_and_heads_are_split_without_copies_or_replication(axis):
    run, result, times = compiled(fsdp=2, **{axis: 2})
    assert result.fits
    assert result.replicated == 0
    assert result.donated["arrays"] == len(jax.tree.leaves(run.state))
    assert result.donated["bytes"] >= programs.per_chip(run.state)
    assert result.donated["results not in an argument's place"] < 64 * 1024  # the metrics
    rows = times["collectives"].values()
    assert {part for row in rows for axes in row for part in axes.split("+")} == {"fsdp", axis}
    assert min(times["roofline"][term] for term in ("compute", "hbm", "interconnect")) > 0


def test_accumulation_keeps_one_gradient_more_and_nothing_else():
    run, two, _ = compiled(fsdp=2, context=2)
    _, one, _ = compiled(fsdp=2, context=2, micro_batches=1)
    made = lambda result: result.hbm["temporaries"] + result.hbm.get("activations", 0)
    assert 0 < made(two) - made(one) <= programs.per_chip(run.state.params)


def test_offloaded_activations_are_in_the_hosts_memory():
    _, kept, _ = compiled(fsdp=2, context=2)
    assert kept.offloaded == 0
    _, result, times = compiled(fsdp=4, remat="offload")
    layer = ROWS // 4 * LENGTH * 256 * 2  # its input, in bfloat16
    assert 2 * layer < result.offloaded < 16 * layer
    # Out and back for each micro-batch and layer: its input, attention's results in 4 heads of 64,
    # and a float32 of each head's row.
    one = 2 * layer + ROWS // 4 * LENGTH * 4 * 4
    assert times["host_traffic"] == 2 * 2 * 2 * one
    assert times["roofline"]["host"] == times["host_traffic"] / 16e9
    assert result.replicated == 0
