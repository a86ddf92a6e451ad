"""Plans without the compiler: bounds, FLOPs, hosts, model sizes, and refused configurations."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small_runs import typed

from configs import arithmetic, code_contests, competition_math
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.hf import parameter_count
from oapl_jax.model.published import PUBLISHED, published
from oapl_jax.model.sharding import make_mesh, open_meshes
from oapl_jax.plan import model_sizes, plan_run, programs_of, verdict
from oapl_jax.planning import estimate
from oapl_jax.planning.hardware import CHIPS, SLICES, Slice, open_slice
from oapl_jax.planning.programs import program_flops, step_flops

# Billions of parameters, from the model cards.
QWEN3 = {"0.6b": 0.596, "1.7b": 1.721, "4b": 4.022, "8b": 8.191, "14b": 14.768, "32b": 32.762}
SIZES = {f"qwen3-{name}": count for name, count in QWEN3.items()}
SIZES |= {"qwen3-4b-thinking-2507": 4.022, "r1-distill-qwen-14b": 14.770}
SIZES |= {"llama-3-8b": 8.030, "llama-3.1-8b": 8.030}


def test_published_sizes_make_the_published_number_of_parameter_count():
    assert {name: round(parameter_count(published(name)) / 1e9, 3) for name in PUBLISHED} == SIZES


def test_the_roofline_is_arithmetic_in_float64():
    chip = dataclasses.replace(CHIPS["v5e"], flops=200e12, hbm_bandwidth=800e9)
    numbers = dict(flops=2.56e17, model_flops=1.92e17, hbm_bytes=4e12)
    bound = estimate.roofline(
        chip,
        64,
        **numbers,
        host_bytes=1.6e10,
        received={"fsdp": 3e11, "data+fsdp": 1e10},
        bandwidth={"fsdp": 1e11, "data+fsdp": 5e10},
        tokens=4_456_448,
    )
    terms = dict(compute=20.0, hbm=5.0, interconnect=3.2, host=1.0)
    ceilings = dict(tokens_per_second=222822.4, mfu=0.75)
    assert bound == {**terms, "seconds": 20.0, "binds": "compute", **ceilings}
    alone: dict[str, Any] = dict(received={}, bandwidth={}, tokens=1)
    slow = dataclasses.replace(chip, hbm_bandwidth=100e9)
    bound = estimate.roofline(slow, 64, **numbers, host_bytes=0, **alone)
    assert (bound["seconds"], bound["binds"], bound["mfu"]) == (40.0, "hbm", 0.375)
    bound = estimate.roofline(chip, 64, **numbers, host_bytes=1.28e12, **alone)
    assert (bound["seconds"], bound["binds"]) == (80.0, "host")


def test_flops_by_formula_equal_a_step_counted_by_hand():
    config = published("qwen3-4b")
    layer = 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    weights = 36 * layer + 2560 * 151936
    # One prompt token without logits, and 7 response tokens; each sees 4 on average.
    products = 8 * weights - 2560 * 151936 + 36 * 8 * 2 * 4096 * 4
    assert step_flops(config, 1, 1, 7) == 6 * products
    assert step_flops(config, 1, 1, 7, frozen=True) == 4 * products


def test_flops_of_a_program_are_counted_through_loops_and_remat():
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)

    def net(w, x, remat):
        layer = lambda x, w: (jnp.sin(x @ w), None)
        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    one = 2 * 16 * 32 * 32
    flops = lambda f: tuple(program_flops(jax.jit(f).trace(w, x)).values())
    assert flops(lambda w, x: net(w, x, False)) == (5 * one, 0)
    assert flops(lambda w, x: net(w, x, True)) == (5 * one, 0)
    slope = lambda remat: jax.grad(lambda w, x: net(w, x, remat), argnums=(0, 1))
    assert flops(slope(False)) == (15 * one, 0)
    assert flops(slope(True)) == (20 * one, 5 * one)


def test_flops_of_a_loop_without_a_known_trip_count_are_an_error():
    def bounded(x, trips):
        with jax.named_scope("at_most_7"):
            return jax.lax.fori_loop(0, trips, lambda _, x: x @ x, x)

    trips = jax.ShapeDtypeStruct((), jnp.int32)
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    slope = lambda x, trips: jax.jvp(lambda y: bounded(y, trips), (x,), (x,))
    for function, passes in ((bounded, 1), (slope, 3)):
        found = program_flops(jax.jit(function).trace(x, trips))
        assert found["program"] == 7 * passes * 2 * 4**3
    endless = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)
    with pytest.raises(RunError, match="trip count"):
        program_flops(jax.jit(endless).trace(x))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a fresh model's tokenizer is written
    config = arithmetic.get_config().unlock()
    config.rollout.sampler = "fleet"
    config.evaluation.every = 0
    config.warmup.num_steps = 0
    return config


def run_of(config):
    given = typed(config)
    sizes, from_checkpoint = model_sizes(given, None, epath.Path("model"))
    meshes = open_meshes(given.mesh, given.rollout, jax.devices(), host=0)
    return programs_of(given, sizes, *meshes, from_checkpoint=from_checkpoint)


def test_the_longest_batch_has_the_most_rows_and_a_host_a_copy_of_each_chips_part(config):
    run = run_of(config)
    # 256 sequences of 28 tokens, two in a row of 64.
    assert run.longest.tokens.shape == (16, 8, 64)
    assert run.longest.segments.any(-1).all()
    assert run.batch.tokens.sharding.shard_shape((16, 8, 64)) == (16, 1, 64)
    memory = estimate.host_memory(run, 4)
    state = 3 * 4 * parameter_count(run.model.config) / 8  # over 8 chips
    assert 4 * state <= memory["copy of the state for a checkpoint"] < 4 * 1.2 * state
    assert memory["buffer"] == 128 * (8 * 8 * 16 + 4 * 12)


def test_copies_of_the_parameters_beside_a_program_are_counted(config):
    run = run_of(config)
    count = 4 * parameter_count(run.model.config)
    assert dict(run.gradient_step().beside) == {}
    assert [p.name for p in run.programs()] == ["train step", "initialisation", "probe"]
    config.objective.kl_weight = 0.1
    config.rollout.sampler = "local"
    config.evaluation.every = 10
    beside = run_of(config).gradient_step().beside
    assert beside["embedded sampler"] == count
    assert "KV cache" not in beside  # between rounds of sampling it is free
    assert count / 8 <= beside["reference parameters"] < count / 7
    assert "recomputed log-probs" in [p.name for p in run_of(config).programs()]
    config.rollout.overlap = True
    config.rollout.mesh.update(data=4, tensor=2)
    beside = run_of(config).gradient_step().beside
    assert count / 2 < beside["embedded sampler"] < 1.01 * count / 2  # norms are whole
    # 256 slots of 28 places; keys and values of two layers, two heads of 16, in float32. A slot
    # also has its segments, its hidden state and its counts.
    cache = 256 * 28 * (2 * 2 * 2 * 16 * 4) / 8
    assert cache < beside["KV cache"] < 1.1 * cache
    assert beside["sampler's version before"] == beside["embedded sampler"]
    config.rollout.devices = 4
    config.rollout.mesh.update(data=2)
    beside = run_of(config).gradient_step().beside
    assert not {"embedded sampler", "KV cache"} & set(beside)


def test_adapters_and_the_frozen_weights_are_counted_apart(config):
    config.model.path = "/data/models/Qwen3-0.6B"
    config.model.lora.rank = 16
    config.objective.kl_weight = 0.1
    config.mesh.update(data=8, fsdp=1)
    run = run_of(config)
    whole, adapters = (parameter_count(run.model.config, of) for of in (None, run.model.lora))
    assert adapters == 28 * 16 * (2 * (1024 + 2048) + 2 * (1024 + 1024) + 3 * (1024 + 3072))
    norms = 28 * (2 * 1024 + 2 * 128) + 1024  # stay in float32
    assert run.kept["frozen parameters"] == 2 * (whole + norms)
    assert run.kept["parameters"] == run.kept["reference parameters"] == 4 * adapters
    assert 8 * adapters <= run.kept["optimizer"] < 8 * adapters + 100
    for program in run.programs():
        assert program.hbm["frozen parameters"] == 2 * (whole + norms), program.name
    memory = estimate.host_memory(run, 4)
    assert memory["copy of the weights to publish"] == 4 * 4 * adapters


def test_a_fleet_keeps_up_with_the_steps_between_two_publications(config):
    def demand(*seconds):
        sizes, mesh = published("qwen3-0.6b"), make_mesh(**config.mesh)
        run = programs_of(typed(config), sizes, mesh, mesh, from_checkpoint=True)
        return tuple(estimate.fleet_demand(run, *seconds).values())

    config.lag.update(mode="window", steps=50)
    config.buffer.mode = "clear_on_sync"
    generated = 8 * 32 * 16
    assert demand(2.0, 25.0) == (generated / 2.0, 100 / 125)
    config.buffer.mode = "keep_with_anchor"  # the fleet generates while the learner publishes
    assert demand(2.0, 25.0)[0] == 50 * generated / 125
    config.buffer.update(mode="replay", max_reuse=4)
    assert demand(2.0, 25.0)[0] == 50 * generated / 125 / 4
    config.rollout.update(source="both", dataset="recorded", dataset_share=0.75)
    assert demand(2.0, 25.0)[0] == 50 * generated / 125 / 16
    config.rollout.source = "dataset"
    assert demand(2.0, 25.0)[0] == 0
    config.rollout.update(source="live", dataset="")
    config.buffer.mode = "keep_with_anchor"
    config.lag.mode = "fixed"  # a publication a step
    assert demand(2.0, 6.0) == (generated / 8, 0.25)


def test_publishing_writes_the_weights_and_then_the_version():
    # 4 bytes a parameter from 16 hosts at once, then from one, which meanwhile writes 2.
    assert estimate.publish_seconds(4_000_000_000, 2, 16, 1e9) == 1.0 + 16.0
    assert estimate.publish_seconds(1_000_000_000, 4, 1, 2e9) == 2.0 + 2.0


def test_the_verdict_names_the_chip_the_host_and_what_is_not_planned():
    plan = {"chip_fits": True, "fits": True, "not_planned": ["x", "y"], "remedies": []}
    assert "x; y" in verdict(plan)
    host = verdict(plan | {"fits": False})
    assert "NOT FIT THE HOST" in host
    chip = plan | {"fits": False, "chip_fits": False}
    assert "NOT FIT" in verdict(chip) != host
    assert "rollout.max_sequences=64" in verdict(chip | {"remedies": ["rollout.max_sequences=64"]})


def test_a_plan_refuses_what_a_run_on_the_slice_refuses():
    def plan(topology, **mesh):
        config.mesh.update(mesh)
        sizes, where = published("qwen3-0.6b"), open_slice(topology)
        plan_run(typed(config), sizes, where, from_checkpoint=True, storage=1e9)

    config = competition_math.get_config().unlock()
    config.learner.rows_multiple = 256
    for setting, topology, mesh in (
        ("groups_per_step=32", "v5e:16x16", dict(fsdp=256)),
        ("learner.rows_multiple=256", "v5p:2x2x3", dict(fsdp=12)),
        ("learner.row_length=17408", "v5p:2x2x3", dict(fsdp=4, context=3)),
    ):
        with pytest.raises(UserError, match=setting):
            plan(topology, **mesh)


def test_hosts_are_the_workers_that_the_scripts_request():
    table = Path("tpu_setup/slices.sh").read_text().partition('slices="')[2].partition('"')[0]
    rows = [line.split() for line in table.splitlines() if line]
    offered = {f"{g}:{shape}" for g, shapes in SLICES.items() for shape in shapes.values()}
    assert offered <= {name for name, _, _ in rows}
    for name, _, workers in rows:
        generation, _, sizes = name.partition(":")
        shape = tuple(map(int, sizes.split("x")))
        where = Slice(CHIPS[generation], shape, range(int(np.prod(shape))))
        assert where.hosts == int(workers), name
        assert where.hosts * where.chips_per_host == len(where.devices)
        assert where.host_ram > 0


def test_sizes_come_from_a_name_a_checkpoint_or_the_configuration(config, tmp_path):
    sizes_of = lambda name: model_sizes(typed(config), name, epath.Path(tmp_path))
    hidden = lambda name: (sizes_of(name)[0].hidden_size, sizes_of(name)[1])
    assert hidden(None) == (64, False)
    assert hidden("qwen3-0.6b") == (1024, True)
    config.model.path = str(Path(__file__).parents[1] / "golden/qwen3")
    assert sizes_of(None)[1]
    config.model.path = "/no/such/place"
    with pytest.raises(UserError, match="--model="):
        sizes_of(None)
    with pytest.raises(UserError, match="qwen9"):
        sizes_of("qwen9")
    config.rollout.max_response_tokens = 9000
    config.learner.row_length = 10000
    with pytest.raises(UserError, match="max_position_embeddings"):
        sizes_of("llama-3-8b")
    config.learner.row_length = 9000
    with pytest.raises(UserError, match=r"learner\.row_length"):
        sizes_of("qwen3-0.6b")


def test_a_missing_checkpoint_has_the_sizes_of_the_model_in_its_name(tmp_path, capsys):
    for config, name in (
        (competition_math.get_config(), "qwen3-4b-thinking-2507"),
        (code_contests.get_config("round=0"), "r1-distill-qwen-14b"),
    ):
        assert model_sizes(typed(config), None, epath.Path(tmp_path)) == (published(name), True)
        said = capsys.readouterr().out
        assert config.model.path in said
        assert name in said


def test_a_host_holds_what_its_chips_offload(config, monkeypatch):
    programs = [{"fits": True, "offloaded": n} for n in (7, 10**9)]
    monkeypatch.setattr(estimate, "compile_all", lambda *_: (programs, {}))
    monkeypatch.setattr(estimate, "available_hbm", lambda where: 0)
    where, mesh = open_slice("v5e:2x2"), make_mesh(data=1, fsdp=8, context=1, tensor=1)
    run = programs_of(typed(config), published("qwen3-0.6b"), mesh, mesh, from_checkpoint=True)
    held = estimate.estimate(run, where, storage=1e9, log=print)["host_memory"]
    assert held["offloaded"] == 4 * 10**9
    assert held.pop("total") == sum(held.values()) - held["ram"]
