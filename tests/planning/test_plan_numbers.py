"""What a plan computes without a compiler: bounds, FLOPs, hosts, layouts; and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import arithmetic, code_contests, competition_math
from oapl_jax.check import check_sizes
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.published import PUBLISHED, published
from oapl_jax.model.sharding import make_mesh
from oapl_jax.planning import host, report
from oapl_jax.planning.estimate import estimate
from oapl_jax.planning.flops import step_flops, traced_work
from oapl_jax.planning.hardware import CHIPS, SLICES
from oapl_jax.planning.model_choice import model_of
from oapl_jax.planning.programs import Learner
from oapl_jax.planning.roofline import roofline
from oapl_jax.planning.topology import Slice, open_slice

# Billions of parameters, as the model cards have them.
SIZES = {
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-4b-thinking-2507": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "r1-distill-qwen-14b": 14.770,
    "llama-3-8b": 8.030,
    "llama-3.1-8b": 8.030,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_make_the_published_number_of_parameters(name):
    assert round(host.parameters(published(name)) / 1e9, 3) == SIZES[name]


def test_the_roofline_is_arithmetic_in_float64():
    chip = dataclasses.replace(CHIPS["v5e"], flops=200e12, hbm_bandwidth=800e9)
    bound = roofline(
        chip,
        64,
        program_flops=2.56e17,
        model_flops=1.92e17,
        hbm_bytes=4e12,
        host_bytes=1.6e10,
        received={"fsdp": 3e11, "data+fsdp": 1e10},
        bandwidth={"fsdp": 1e11, "data+fsdp": 5e10},
        tokens=4_456_448,
    )
    assert (bound.compute, bound.hbm, bound.interconnect, bound.host) == (20.0, 5.0, 3.2, 1.0)
    assert (bound.seconds, bound.binds) == (20.0, "compute")
    assert bound.tokens_per_second == 222822.4
    assert bound.mfu == 0.75
    slow = dataclasses.replace(chip, hbm_bandwidth=100e9)
    numbers = dict(program_flops=2.56e17, model_flops=1.92e17, hbm_bytes=4e12, tokens=1)
    bound = roofline(slow, 64, **numbers, host_bytes=0, received={}, bandwidth={})
    assert (bound.seconds, bound.binds, bound.mfu) == (40.0, "hbm", 0.375)
    bound = roofline(chip, 64, **numbers, host_bytes=1.28e12, received={}, bandwidth={})
    assert (bound.seconds, bound.binds) == (80.0, "host")


def test_published_bandwidths_of_all_links():
    published_bidirectional = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9}
    for name, chip in CHIPS.items():
        assert chip.link_bandwidth * 2 * 2 * chip.dimensions == published_bidirectional[name]
        for chips, shape in SLICES[name].items():
            sizes = [int(size) for size in shape.split("x")]
            assert len(sizes) == chip.dimensions
            assert np.prod(sizes) == chips


def test_flops_by_formula_are_those_of_a_step_counted_by_hand():
    config = published("qwen3-4b")
    layer = 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    weights = 36 * layer + 2560 * 151936
    # One prompt token, whose logits nobody wants, and 7 response tokens; each sees 4 on average.
    products = 8 * weights - 2560 * 151936 + 36 * 8 * 2 * 4096 * 4
    assert step_flops(config, 1, 1, 7) == 6 * products


def test_flops_of_a_program_are_counted_through_loops_and_remat():
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)

    def net(w, x, remat):
        layer = lambda x, w: (jnp.sin(x @ w), None)
        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    one = 2 * 16 * 32 * 32
    trace = lambda f: traced_work(jax.jit(f).trace(w, x))
    assert trace(lambda w, x: net(w, x, False)) == (forward := trace(lambda w, x: net(w, x, True)))
    assert (forward.total, forward.remat) == (5 * one, 0)
    plain = trace(jax.grad(lambda w, x: net(w, x, False), argnums=(0, 1)))
    again = trace(jax.grad(lambda w, x: net(w, x, True), argnums=(0, 1)))
    assert (plain.total, plain.remat) == (15 * one, 0)
    assert (again.total, again.remat) == (20 * one, 5 * one)


@pytest.fixture
def config():
    config = arithmetic.get_config().unlock()
    config.rollout.sampler = "fleet"
    config.evaluation.every = 0
    config.warmup.num_steps = 0
    return config


@pytest.fixture
def plan(config, tmp_path):
    sizes, from_checkpoint = model_of(config, None, epath.Path(tmp_path), print)
    return Learner(config, sizes, make_mesh(**config.mesh), from_checkpoint)


def test_a_loop_without_a_known_number_of_turns_is_not_counted():
    def bounded(x, turns):
        with jax.named_scope("at_most_7"):
            return jax.lax.fori_loop(0, turns, lambda _, x: x @ x, x)

    turns = jax.ShapeDtypeStruct((), jnp.int32)
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert traced_work(jax.jit(bounded).trace(x, turns)).total == 7 * 2 * 4**3
    slope = lambda x, turns: jax.jvp(lambda y: bounded(y, turns), (x,), (x,))
    assert traced_work(jax.jit(slope).trace(x, turns)).total == 7 * 3 * 2 * 4**3
    endless = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)
    with pytest.raises(RunError, match="turns"):
        traced_work(jax.jit(endless).trace(x))


def test_the_longest_batch_has_the_most_rows(plan):
    # 256 sequences of 28 tokens, two in a row of 64.
    assert plan.longest.tokens.shape == (16, 8, 64)
    assert plan.longest.segments.any(-1).all()
    assert plan.batch.tokens.sharding.shard_shape((16, 8, 64)) == (16, 1, 64)


def test_what_lies_beside_a_program_is_counted(config, plan):
    parameters = 4 * host.parameters(plan.model_config)
    step = plan.train_step()
    assert dict(step.beside) == {}
    assert [p.name for p in plan.programs()] == ["train step", "initialisation", "probe"]
    config.objective.kl_weight = 0.1
    config.rollout.sampler = "local"
    config.evaluation.every = 10
    beside = plan.train_step().beside
    assert beside["embedded samplers"] == 2 * parameters
    assert parameters / 8 <= beside["reference parameters"] < parameters / 7
    assert "recomputed log-probs" in [p.name for p in plan.programs()]


def test_a_fleet_keeps_up_with_the_steps_between_two_publications(config):
    config.lag.update(mode="window", steps=50)
    config.buffer.mode = "clear_on_sync"
    generated = 8 * 32 * 16
    fleet = host.fleet(config, 2.0, 25.0)
    assert fleet.tokens_per_second == generated / 2.0
    assert fleet.learning == 100 / 125
    config.buffer.mode = "keep_with_anchor"  # the fleet generates while the learner publishes
    assert host.fleet(config, 2.0, 25.0).tokens_per_second == 50 * generated / 125
    config.buffer.update(mode="replay", max_reuse=4)
    assert host.fleet(config, 2.0, 25.0).tokens_per_second == 50 * generated / 125 / 4
    config.rollout.update(source="both", recorded_share=0.75)
    assert host.fleet(config, 2.0, 25.0).tokens_per_second == 50 * generated / 125 / 16
    config.rollout.source = "shards"
    assert host.fleet(config, 2.0, 25.0).tokens_per_second == 0
    config.rollout.source = "live"
    config.buffer.mode = "keep_with_anchor"
    config.lag.mode = "fixed"  # a publication a step
    fleet = host.fleet(config, 2.0, 6.0)
    assert (fleet.tokens_per_second, fleet.learning) == (generated / 8, 0.25)


def test_publishing_takes_the_weights_out_and_the_version_in():
    # 4 bytes a parameter from 16 hosts at once, then from one, which meanwhile writes 2.
    assert host.publish_seconds(4_000_000_000, 2, 16, 1e9) == 1.0 + 16.0
    assert host.publish_seconds(1_000_000_000, 4, 1, 2e9) == 2.0 + 2.0


def test_host_memory_holds_a_copy_of_each_chips_part(plan):
    memory = host.host_memory(plan, 4)
    state = 3 * 4 * host.parameters(plan.model_config) / 8  # over 8 chips
    assert 4 * state <= memory["copy of the state for a checkpoint"] < 4 * 1.2 * state
    assert memory["buffer"] == 128 * (8 * 8 * 16 + 4 * 12)


def test_the_verdict_is_of_the_chip_and_of_the_host():
    plan = {"chip_fits": True, "fits": True, "not_planned": []}
    assert report.verdict(plan) == "FITS"
    assert report.verdict(plan | {"not_planned": ["the warm-up", "the curator"]}) == (
        "FITS, but for what is not planned and needs HBM too: the warm-up; the curator"
    )
    assert report.verdict(plan | {"fits": False}) == "DOES NOT FIT THE HOST"
    assert report.verdict(plan | {"fits": False, "chip_fits": False}) == "DOES NOT FIT"


def planned(config, topology, **mesh):
    """A plan that must be refused before anything is compiled."""
    config.mesh.update(mesh)
    unused: Any = None
    estimate(
        config,
        published("qwen3-0.6b"),
        open_slice(topology),
        from_checkpoint=True,
        storage=1e9,
        say=unused,
    )


def test_what_a_run_refuses_on_a_slice_a_plan_refuses():
    config = competition_math.get_config().unlock()
    config.learner.rows_multiple = 256
    with pytest.raises(UserError, match="groups_per_step=32 can't be divided over 64 hosts"):
        planned(config, "v5e:16x16", fsdp=256)
    with pytest.raises(UserError, match=r"learner\.rows_multiple=256 can't be .* = 12 devices"):
        planned(config, "v5p:2x2x3", fsdp=12)
    with pytest.raises(UserError, match=r"learner\.row_length=17408 can't be .* mesh.context=3;"):
        planned(config, "v5p:2x2x3", fsdp=4, context=3)
    config.learner.micro_batches = 0
    with pytest.raises(UserError, match="micro_batches=0 must be"):
        planned(config, "v5e:2x2", fsdp=4, context=1)


def test_a_run_of_these_hosts_refuses_the_same(config):
    check_sizes(config)
    config.learner.rows_multiple = 4
    with pytest.raises(UserError, match=r"learner\.rows_multiple=4 can't be .* = 8 devices"):
        check_sizes(config)


def test_hosts_are_the_workers_that_the_scripts_request():
    table = Path("tpu_setup/slices.sh").read_text().partition('slices="')[2].partition('"')[0]
    rows = [line.split() for line in table.splitlines() if line]
    offered = {f"{g}:{shape}" for g, shapes in SLICES.items() for shape in shapes.values()}
    assert offered <= {name for name, _, _ in rows}
    for name, _, workers in rows:
        generation, _, sizes = name.partition(":")
        shape = tuple(map(int, sizes.split("x")))
        where = Slice(generation, shape, range(int(np.prod(shape))))
        assert where.hosts == int(workers), name
        assert where.hosts * where.chips_per_host == len(where.devices)
        assert where.host_ram > 0


def test_sizes_come_from_a_name_a_checkpoint_or_the_configuration(config, tmp_path):
    said = []
    sizes_of = lambda name: model_of(config, name, epath.Path(tmp_path), said.append)
    sizes, from_checkpoint = sizes_of(None)
    assert (sizes.hidden_size, from_checkpoint) == (64, False)
    sizes, from_checkpoint = sizes_of("qwen3-0.6b")
    assert (sizes.hidden_size, from_checkpoint) == (1024, True)
    config.model.path = "tests/golden/qwen3"
    assert isinstance(sizes_of(None)[0], ModelConfig)
    assert not said
    config.model.path = "/no/such/place"
    with pytest.raises(UserError, match="not on this machine; give its sizes with --model=qwen3"):
        sizes_of(None)
    with pytest.raises(UserError, match="'qwen9' is not known"):
        sizes_of("qwen9")
    config.rollout.max_response_tokens = 9000
    config.learner.row_length = 10000
    with pytest.raises(UserError, match="more than the model's max_position_embeddings"):
        sizes_of("llama-3-8b")


@pytest.mark.parametrize(
    ("get_config", "name"),
    [
        (competition_math.get_config, "qwen3-4b-thinking-2507"),
        (lambda: code_contests.get_config("round=0"), "r1-distill-qwen-14b"),
    ],
)
def test_a_checkpoint_that_is_not_here_has_the_sizes_of_the_model_it_is_called_after(
    get_config, name, tmp_path
):
    config, said = get_config(), []
    found = model_of(config, None, epath.Path(tmp_path), said.append)
    assert found == (published(name), True)
    assert said == [
        f"model.path={config.model.path} is not on this machine; planned with the sizes of {name}"
    ]
