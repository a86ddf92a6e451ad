"""Small train steps compiled for a v5e 2x2 whose mesh splits more than rows."""

import jax
import pytest

from configs import arithmetic
from oapl_jax.model.config import ModelConfig
from oapl_jax.planning import memory, programs, topology
from oapl_jax.planning.estimate import step_times

LENGTH, ROWS = 128, 8


def judged(mesh, micro_batches, remat="full"):
    """Micro-batches of 8 rows, a sequence in each: the plan, and the verdict and the times of its
    train step."""
    where = topology.open_slice("v5e:2x2")
    config = arithmetic.get_config().unlock()
    config.group_size, config.groups_per_step = 4, 2 * micro_batches
    config.data.max_prompt_tokens, config.rollout.max_response_tokens = 32, LENGTH - 32
    config.model.update(dtype="bfloat16", remat=remat)
    config.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1) | mesh)
    config.rollout.sampler, config.evaluation.every = "fleet", 0
    config.learner.update(
        micro_batches=micro_batches, row_length=LENGTH, rows_multiple=ROWS, logp_chunk=64
    )
    sizes = dict(config.model.architecture, hidden_size=256, intermediate_size=512, head_dim=64)
    sizes |= dict(num_hidden_layers=2, vocab_size=1024, max_position_embeddings=LENGTH)
    sizes |= dict(tie_word_embeddings=False)  # test_plan.py has the other ones
    model = ModelConfig.from_hf(sizes, source="this test")
    plan = programs.Learner(config, model, topology.make_mesh(where, config.mesh), False)
    assert plan.longest.tokens.shape == (micro_batches, ROWS, LENGTH)
    step = plan.train_step()
    traced = step.trace()
    verdict = memory.judge(step, traced, topology.hbm_available(where))
    return plan, verdict, step_times(plan, where, traced, verdict.text)


@pytest.fixture(scope="module")
def over_context():
    return judged(dict(fsdp=2, context=2), micro_batches=2)


@pytest.fixture(scope="module")
def over_tensor():
    return judged(dict(fsdp=2, tensor=2), micro_batches=2)


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_rows_and_heads_are_split_without_copies_or_replication(axis, request):
    plan, verdict, times = request.getfixturevalue(f"over_{axis}")
    assert verdict.fits
    assert verdict.replicated == 0
    assert verdict.donated["arrays"] == len(jax.tree.leaves(plan.state))
    assert verdict.donated["bytes"] >= programs.per_chip(plan.state)
    assert verdict.donated["results not in an argument's place"] < 64 * 1024  # the metrics
    rows = times["collectives"].values()
    assert {part for row in rows for axes in row for part in axes.split("+")} == {"fsdp", axis}
    assert min(times["roofline"][term] for term in ("compute", "hbm", "interconnect")) > 0


def test_accumulation_keeps_one_gradient_more_and_nothing_else(over_context):
    plan, two, _ = over_context
    _, one, _ = judged(dict(fsdp=2, context=2), micro_batches=1)
    made = lambda verdict: verdict.hbm["temporaries"] + verdict.hbm.get("activations", 0)
    gradient = programs.per_chip(plan.state.params)
    assert 0 < made(two) - made(one) <= gradient


def test_what_is_offloaded_is_the_hosts(over_context):
    _, kept, _ = over_context
    assert kept.offloaded == 0
    _, verdict, times = judged(dict(fsdp=4), micro_batches=2, remat="offload")
    layer = ROWS // 4 * LENGTH * 256 * 2  # what enters it, in bfloat16
    assert 2 * layer < verdict.offloaded < 16 * layer
    # Out and back for each micro-batch and layer: its input, attention's results in 4 heads of 64,
    # and a float32 of each head's row.
    one = 2 * layer + ROWS // 4 * LENGTH * 4 * 4
    assert times["host_traffic"] == 2 * 2 * 2 * one
    assert times["roofline"]["host"] == times["host_traffic"] / 16e9
    assert verdict.replicated == 0
